"""Mode `exact`: real engines without an artifact, against vLLM's own OPT."""

from __future__ import annotations

import json
import shutil
import sys
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
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import quantized

SHIPPED = Path(__file__).parents[1] / "examples" / "opt-books-7m"
EXACT = {"mode": "exact"}
NAN = float("nan")
PROMPTS = [random_prompt(1), random_prompt(9), random_prompt(32), random_prompt(70)]


def run(model, impl="dejavu", dejavu=None, prompts=PROMPTS, new_tokens=16, **options):
    """Tokens, log-probabilities by (request, position), and the counts."""
    with engine(model, impl=impl, dejavu=dejavu, **options) as llm:
        with Recorder(llm) as recorder:
            tokens = generate(llm, prompts, new_tokens)
        counts = metrics_of(llm) if impl == "dejavu" else None
        return tokens, next_token_log_probs(recorder.steps), counts


def fp32_prompts(number):
    """Of 1 to 60 tokens of the shipped model's vocabulary."""
    g = torch.Generator().manual_seed(3)
    return [[2, *torch.randint(5, 8000, (1 + i % 60,), generator=g).tolist()] for i in range(number)]


def test_tokens_are_vllms_own(tmp_path):
    """200 prompts of the shipped model in fp32, in batches and chunks, with a prefix cache; without an
    artifact beside it.
    """
    model = tmp_path / "model"
    shutil.copytree(SHIPPED, model, ignore=shutil.ignore_patterns("dejavu"))
    prompts = fp32_prompts(200)
    options = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "enable_prefix_caching": True}
    options |= {"max_model_len": 256}
    tokens = []
    for impl, dejavu in (("vllm", None), ("dejavu", EXACT)):
        with engine(model, impl=impl, dejavu=dejavu, **options) as llm:
            tokens.append(generate(llm, prompts, 24))
            if dejavu:
                assert type(model_of(llm)).__name__ == "DejaVuOPTForCausalLM"
                counts = metrics_of(llm)
    assert tokens[0] == tokens[1]
    assert counts["mode"] == "exact" and set(counts["steps"]) >= {"sparse"}
    assert counts["steps"]["sparse"] == sum(counts["steps"].values()) > 24
    assert counts["predictor_bytes"] == 0 and counts["artifact"]["digest"] == ""
    for layer in counts["layers"]:
        mlp = layer["mlp"]
        assert 0 < mlp["density"] < mlp["read_density"] < 1, "neurons of a token, of a tile"
        assert not layer["attention"]["gated"]


@pytest.mark.parametrize(
    "variant",
    [{}, {"pre_ln": False, "embed_dim": 32}, {"bias": False}, {"tied": False}],
    ids=["pre_ln", "post_ln_projected", "no_bias", "untied"],
)
def test_log_probabilities_are_vllms_own(variant, opt):
    tokens, expected, _ = run(opt(**variant), "vllm")
    found_tokens, found, _ = run(opt(**variant), dejavu=EXACT)
    assert found_tokens == tokens and distance(found, expected) < TOLERANCE["float32"]


def test_in_bfloat16(opt):
    """Fed the same tokens."""
    model = opt(dtype="bfloat16", tied=False)
    with engine(model, impl="vllm", dtype="bfloat16") as llm, Recorder(llm) as recorder:
        tokens = generate(llm, PROMPTS, 16)
        expected = next_token_log_probs(recorder.steps)
    order = list(dict.fromkeys(request for request, _ in expected))
    texts = {request: p + t for request, p, t in zip(order, PROMPTS, tokens, strict=True)}
    with engine(model, dejavu=EXACT, dtype="bfloat16") as llm, Recorder(llm, texts) as recorder:
        generate(llm, PROMPTS, 16)
        found = next_token_log_probs(recorder.steps)
    assert distance(found, expected) < TOLERANCE["bfloat16"]


def test_compiled(opt):
    """Not eager: the op, its counters and weights inside of vLLM's compiled graph."""
    tokens, _, _ = run(opt(), dejavu=EXACT)
    with engine(opt(), dejavu=EXACT, enforce_eager=False) as llm:
        assert generate(llm, PROMPTS, 16) == tokens
        mlp = metrics_of(llm)["layers"][0]["mlp"]
    assert mlp["rows"] == sum(len(p) for p in PROMPTS) + 15 * len(PROMPTS)


def test_rows_of_silent_neurons_are_not_read(opt):
    """NaN in them changes nothing."""
    fired: dict[int, torch.Tensor] = {}
    model = opt()
    with engine(model, dejavu=EXACT) as llm:
        layers = model_of(llm).model.decoder.layers

        def watch(i):
            def hook(module, inputs, outputs):
                fired[i] = fired.get(i, 0) + (outputs[0] > 0).sum(0)

            return layers[i].mlp.fc1.register_forward_hook(hook)

        hooks = [watch(i) for i in range(len(layers))]
        tokens = generate(llm, PROMPTS, 16)
        for hook in hooks:
            hook.remove()
        for i, layer in enumerate(layers):
            silent = fired[i] == 0
            assert 0 < int(silent.sum()) < len(silent)
            layer.mlp.fc2.weight.data[silent] = NAN
        assert generate(llm, PROMPTS, 16) == tokens
        layers[0].mlp.fc2.weight.data[fired[0] > 0] = NAN
        assert generate(llm, PROMPTS, 16) != tokens, "what is read matters"


def test_the_crossover_decides(opt):
    """What all tokens share, above it; the same tokens."""
    tokens, _, counts = run(opt(), dejavu=EXACT | {"crossover": 1.0})
    others, _, dense = run(opt(), dejavu=EXACT | {"crossover": 1e-9})
    assert tokens == others
    for few, many in zip(counts["layers"], dense["layers"], strict=True):
        assert few["mlp"]["above_crossover"] == 0 < many["mlp"]["above_crossover"]
        assert few["mlp"]["read_density"] < many["mlp"]["read_density"]
        assert few["mlp"]["density"] == many["mlp"]["density"]


def test_our_int8(opt, tmp_path):
    """weight_bits 8 rounds as it does elsewhere: mode dense says the same."""
    expected = run(opt(), dejavu={"mode": "dense", "weight_bits": 8})
    found = run(opt(), dejavu=EXACT | {"weight_bits": 8})
    assert found[0] == expected[0] and distance(found[1], expected[1]) < TOLERANCE["float32"]


@pytest.fixture(scope="module")
def w8a8(opt, tmp_path_factory):
    return quantized.write(opt(tied=False), tmp_path_factory.mktemp("w8a8"), "w8a8")


def test_a_quantized_checkpoint(w8a8, opt):
    """W8A8 as stock vLLM serves it, but fc2, whose inputs are not rounded in fp32: nearer to the model that
    was quantized than stock is, and to stock than stock to that.
    """
    options = {"dtype": "float32", "prompts": PROMPTS, "new_tokens": 1}
    _, exact, counts = run(w8a8, dejavu=EXACT, **options)
    _, stock, _ = run(w8a8, "vllm", **options)
    _, plain, _ = run(opt(tied=False), "vllm", dtype="float32", prompts=PROMPTS, new_tokens=1)
    error = distance(stock, plain)
    assert distance(exact, plain) < error and distance(exact, stock) < error
    assert counts["artifact"]["weights_fingerprint"] and 0 < counts["mlp_density"] < 1
    with engine(w8a8, dejavu=EXACT, dtype="bfloat16") as llm:
        mlp = model_of(llm).model.decoder.layers[0].mlp
        assert mlp.fc2.weight.dtype == torch.int8 and type(mlp.fc1.scheme).__name__.startswith(
            "CompressedTensors"
        )


def test_an_ignored_layer_stays_in_16_bits(w8a8, opt, tmp_path):
    """A checkpoint's `ignore` names layers as checkpoints do."""
    model = tmp_path / "model"
    shutil.copytree(opt(tied=False), model)
    config = json.loads((w8a8 / "config.json").read_text())
    layers = range(config["num_hidden_layers"])
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    names = [f"model.decoder.layers.{i}.{linear}" for i in layers for linear in linears]
    config["quantization_config"]["ignore"] = ["lm_head", *names]
    (model / "config.json").write_text(json.dumps(config))
    assert run(model, dejavu=EXACT)[0] == run(opt(tied=False), dejavu=EXACT)[0]


def test_beside_layers_in_4_bits(opt, tmp_path):
    """fc2 in 16 bits is all that is asked for: the others are stock vLLM's, packed as they are."""
    original = opt(tied=False, hidden=128, dtype="bfloat16")
    model = quantized.write(original, tmp_path / "w4a16", "w4a16")
    config = json.loads((model / "config.json").read_text())
    names = [f"model.decoder.layers.{i}.fc2" for i in range(config["num_hidden_layers"])]
    config["quantization_config"]["ignore"] += names
    (model / "config.json").write_text(json.dumps(config))
    tensors, plain = load_file(model / "model.safetensors"), load_file(original / "model.safetensors")
    for name in names:
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{name}.{part}"]
        tensors[f"{name}.weight"] = plain[f"{name}.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = {"dtype": "bfloat16", "new_tokens": 1}
    _, expected, _ = run(model, "vllm", **options)
    _, found, counts = run(model, dejavu=EXACT, **options)
    assert distance(found, expected) < TOLERANCE["bfloat16"] and counts["weight_bits"] == 4


def with_scheme(model, target, **changes):
    """A copy of W8A8's configuration with other weights."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_what_is_refused(w8a8, opt, tmp_path):
    """With what was found and what to do."""
    four = quantized.write(opt(tied=False, hidden=128), tmp_path / "w4a16", "w4a16")
    cases = [
        (with_scheme(four, tmp_path / "32", group_size=32), EXACT, r"fc2, stored as int4 by group of 32"),
        (with_scheme(w8a8, tmp_path / "asymmetric", symmetric=False), EXACT, "int8 by channel, asymmetric"),
        (with_scheme(w8a8, tmp_path / "tensor", strategy="tensor"), EXACT, "int8 by tensor, symmetric"),
        (w8a8, EXACT | {"weight_bits": 8}, "weight_bits=8 rounds 16-bit weights"),
    ]
    for model, settings, message in cases:
        with pytest.raises(ValueError, match=message), engine(model, dejavu=settings, dtype="bfloat16"):
            pass


def test_without_an_artifact_three_ways_are_offered(opt):
    with pytest.raises(ValueError, match="exact.*auto.*vllm-dejavu train"), engine(opt()):
        pass


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="made for workers on a CPU: here they would share a GPU"
)
@pytest.mark.parametrize(
    "parallel", ["tensor_parallel_size", pytest.param("pipeline_parallel_size", marks=pytest.mark.on_demand)]
)
def test_in_parallel(parallel, tmp_path):
    """Two ranks write what one writes, and all of them count."""
    from test_engine_parallel import in_processes, job

    arguments = job(SHIPPED, SHIPPED / "dejavu") | {"dejavu": EXACT}
    alone = in_processes(tmp_path, arguments)
    arguments["options"] = {parallel: 2, "distributed_executor_backend": "mp"}
    found = in_processes(tmp_path, arguments)
    assert found["tokens"] == alone["tokens"]
    for one, two in zip(alone["metrics"]["layers"], found["metrics"]["layers"], strict=True):
        assert one["mlp"] == two["mlp"]
