"""Nemotron: grouped queries, partly rotated heads, LayerNorm by 1 + w, ReLU²; everything selected is vLLM's
own model, less is what Transformers' says with the same masks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine import (
    TOLERANCE,
    Recorder,
    distance,
    engine,
    generate,
    metrics_of,
    model_of,
    next_token_log_probs,
    random_prompt,
)
from test_engine_replay import recomputed_tokens
from tolerances import relative_rms

from vllm_dejavu import artifact
from vllm_dejavu.predictor_training.gates import Gate
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.masked import Masked

PROMPTS = [random_prompt(1), random_prompt(9), random_prompt(32), random_prompt(70)]
TRAINED = Path(__file__).parents[2] / "shared" / "models" / "nemotron-books-10m"
groups = pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa-2", "gqa-4"])


def run(model, impl="dejavu", dejavu=None, new_tokens=16, texts=None, **options):
    """Tokens, log-probabilities by (request, position), and the counts."""
    with engine(model, impl=impl, dejavu=dejavu, **options) as llm:
        if impl == "dejavu":
            assert type(model_of(llm)).__name__ == "DejaVuNemotronForCausalLM"
        with Recorder(llm, texts) as recorder:
            tokens = generate(llm, PROMPTS, new_tokens)
        counts = metrics_of(llm) if impl == "dejavu" else None
        return tokens, next_token_log_probs(recorder.steps), counts


def assert_all_selected(counts):
    assert counts["steps"]["sparse"] > 0
    for layer in counts["layers"]:
        for block in ("mlp", "attention"):
            assert layer[block]["gated"] and layer[block]["density"] == layer[block]["read_density"] == 1
        assert 0 < layer["mlp"]["survived_density"] < 1


@groups
def test_full_density_is_vllms_nemotron(kv_heads, nemotron, predictors):
    model = nemotron(kv_heads=kv_heads)
    tokens, expected, _ = run(model, "vllm")
    settings = {"predictor": predictors(model, select_all=True)}
    for more in ({}, {"apply_to": "all"}, {"cache_crossover": 0}) if kv_heads == 2 else ({},):
        found_tokens, found, counts = run(model, dejavu=settings | more)
        assert found_tokens == tokens and distance(found, expected) < TOLERANCE["float32"]
        assert_all_selected(counts)


def test_full_density_in_bfloat16(nemotron, predictors):
    """Made to write the same tokens."""
    model = nemotron(dtype="bfloat16")
    tokens, expected, _ = run(model, "vllm", dtype="bfloat16")
    texts = {
        str(i): prompt + written for i, (prompt, written) in enumerate(zip(PROMPTS, tokens, strict=True))
    }
    settings = {"predictor": predictors(model, select_all=True)}
    found_tokens, found, counts = run(model, dejavu=settings, texts=texts, dtype="bfloat16")
    assert found_tokens == tokens and distance(found, expected) < TOLERANCE["bfloat16"]
    assert_all_selected(counts)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_without_predictors(mode, nemotron):
    """The same tokens; in 8 bits as in mode dense; tied embeddings."""
    for variant in ({}, {"tied": True}):
        model = nemotron(**variant)
        tokens, expected, _ = run(model, "vllm")
        found_tokens, found, counts = run(model, dejavu={"mode": mode})
        assert found_tokens == tokens and distance(found, expected) < TOLERANCE["float32"]
    if mode == "exact":
        assert 0 < counts["mlp_density"] < 1
        eight, _, _ = run(model, dejavu={"mode": mode, "weight_bits": 8})
        assert eight == run(model, dejavu={"mode": "dense", "weight_bits": 8})[0]


def masked_log_probs(model, predictor, tokens):
    """Of every next token of one text, by Transformers' model with the artifact's gates as masks."""
    loaded = artifact.load(predictor)
    gates = {
        (i, block): Gate(block, *loaded.gate(i, block))
        for i, layer in enumerate(loaded.manifest.layers)
        for block, spec in layer.items()
        if spec.sparse
    }
    hf = HfModel(str(model))
    masked = Masked(hf, gates)
    with hf.observed(masked.on_attention, masked.on_mlp), torch.inference_mode():
        logits = hf.model(torch.tensor([tokens])).logits[0]
    return logits.double().log_softmax(-1)


@groups
def test_reduced_density_is_the_masked_model(kv_heads, nemotron, predictors):
    """Prompt tokens each by their own selection, then decode steps, one request at a time: the same
    selections, since every unit that differed would show.
    """
    model = nemotron(kv_heads=kv_heads)
    predictor = predictors(model)
    prompt = random_prompt(40)
    with engine(model, dejavu={"predictor": predictor, "apply_to": "all"}) as llm:
        with Recorder(llm) as recorder:
            written = generate(llm, [prompt], 12)[0]
        found = next_token_log_probs(recorder.steps)
        counts = metrics_of(llm)
    expected = masked_log_probs(model, predictor, prompt + written)
    positions = sorted(position for _, position in found)
    assert positions == list(range(39, 51))
    keyed = {position: row for (_, position), row in found.items()}
    assert (
        relative_rms(torch.stack([keyed[p] for p in positions]), expected[positions]) < TOLERANCE["float32"]
    )
    assert 0.3 < counts["mlp_density"] < 0.7 and 0.3 < counts["head_density"] < 0.7


@pytest.mark.parametrize("mode", ["all", "exact"])
def test_preemption_chunks_and_prefix_cache(mode, nemotron, predictors):
    """Too small a cache, prompts in pieces and found again: the same answers, where all tokens of a request
    are computed alike.
    """
    model = nemotron()
    selected = {"predictor": predictors(model), "apply_to": "all", "crossover": 1.0}
    settings = selected if mode == "all" else {"mode": "exact"}
    prompts = [random_prompt(40, seed=i) for i in range(6)]
    answers = []
    for options in (
        {"max_num_seqs": 1},
        {"max_num_seqs": 6, "max_num_batched_tokens": 32, "enable_prefix_caching": mode == "exact"},
        {"max_num_seqs": 6, "num_gpu_blocks_override": 9},
    ):
        with engine(model, dejavu=settings, **options) as llm:
            with Recorder(llm) as recorder:
                answers.append(generate(llm, prompts, 40))
            answers.append(generate(llm, prompts, 40))
    assert all(answer == answers[0] for answer in answers)
    assert recomputed_tokens(recorder.steps) > 20, "nothing was preempted in the last"


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="made for workers on a CPU: here they would share a GPU"
)
@pytest.mark.parametrize("kv_heads", [2, pytest.param(1, marks=pytest.mark.on_demand)], ids=["cut", "copied"])
def test_two_ranks(kv_heads, nemotron, predictors, tmp_path):
    """KV heads shared out, or, where there are fewer, held by both."""
    from test_engine_parallel import in_processes, job

    model = nemotron(kv_heads=kv_heads)
    predictor = predictors(model)
    arguments = job(model, predictor)
    alone = in_processes(tmp_path, arguments)
    arguments["options"] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = in_processes(tmp_path, arguments)
    assert found["tokens"] == alone["tokens"]
    for one, two in zip(alone["metrics"]["layers"], found["metrics"]["layers"], strict=True):
        for block in ("mlp", "attention"):
            assert one[block]["selected"] == two[block]["selected"] > 0


@pytest.mark.skipif(
    not TRAINED.is_dir(), reason=f"no trained Nemotron at {TRAINED.parent.name}/{TRAINED.name}"
)
def test_the_trained_model():
    """Mode exact in fp32: vLLM's own tokens."""
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    prompts = [[2, *torch.randint(5, 8000, (20,), generator=g).tolist()] for g in generators]
    tokens = []
    for impl, dejavu in (("vllm", None), ("dejavu", {"mode": "exact"})):
        with engine(TRAINED, impl=impl, dejavu=dejavu) as llm:
            tokens.append(generate(llm, prompts, 24))
            if dejavu:
                assert metrics_of(llm)["mlp_density"] < 0.4
    assert tokens[0] == tokens[1]
