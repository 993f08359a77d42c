"""The engine on a GPU with CUDA graphs on: parity with dense vLLM, graphs against eager, sparse share, batch
sizes.

Needs a GPU; none has run these yet. Everything else about the engine is tested on the CPU.
"""

from __future__ import annotations

import pytest
from engine import engine, greedy, metrics_of, model_of, random_prompt

pytestmark = pytest.mark.gpu

MODEL = {"hidden": 256, "heads": 4, "tied": False, "dtype": "float16", "layers": 4}
PROMPTS = [random_prompt(n, seed=3) for n in (1, 2, 33, 45, 7)]
NEW_TOKENS = 24
GRAPHS = {
    "enforce_eager": False,
    "dtype": "float16",
    "max_num_seqs": 5,
    "block_size": 16,
    "max_logprobs": 20,
    "gpu_memory_utilization": 0.15,  # what vLLM wants to find free: several tests may run beside each other
}
# Two tokens whose log-probabilities dense vLLM rates closer than this may change places in fp16.
MARGIN = 0.05


def run(model, impl, dejavu=None, prompts=PROMPTS, **options):
    """Returns ([tokens], [{token: logprob} by position], metrics or None) of one batch."""
    with engine(model, impl=impl, dejavu=dejavu, **{**GRAPHS, **options}) as llm:
        if impl == "dejavu":
            llm.collective_rpc("dejavu_reset_metrics")  # the warm-up's steps
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts], greedy(NEW_TOKENS, logprobs=10), use_tqdm=False
        )
        counted = metrics_of(llm) if impl == "dejavu" else None
        name = type(model_of(llm)).__name__
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    logprobs = [[{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs] for o in outputs]
    return tokens, logprobs, counted, name


def assert_same_text(found, expected, tolerance):
    """Tokens agree up to a near-tie of `expected`; up to there the log-probabilities agree within
    `tolerance`.
    """
    compared = 0
    for ours, our_steps, theirs, their_steps in zip(*found, *expected, strict=True):
        for token, our_step, other, their_step in zip(ours, our_steps, theirs, their_steps, strict=True):
            if token != other:
                assert their_step[other] - their_step.get(token, -1e9) < MARGIN, (
                    "another token, and not a near-tie"
                )
                break
            assert abs(our_step[token] - their_step[token]) < tolerance
            compared += 1
    assert compared > len(PROMPTS) * NEW_TOKENS / 2, "the texts part too early to say anything"


@pytest.mark.parametrize("lookahead", ["self", "attn_input"])
@pytest.mark.parametrize("overlap", [False, True], ids=["one_stream", "overlap"])
def test_everything_selected_is_dense_vllm(lookahead, overlap, opt, predictors):
    """Full density through the sparse path, in full decode graphs of padded batches, is vLLM's own OPT."""
    model = opt(**MODEL)
    tokens, logprobs, _, name = run(model, "vllm")
    assert name == "OPTForCausalLM"
    artifact = predictors(model, select_all=True, mlp=lookahead, attention="previous")
    ours, our_logprobs, counted, name = run(model, "dejavu", {"predictor": artifact, "overlap": overlap})
    assert name == "DejaVuOPTForCausalLM"
    assert counted["steps"]["sparse"] >= NEW_TOKENS - 1 and counted["sparse_step_share"] > 0.9
    assert counted["mlp_density"] == counted["head_density"] == 1
    assert_same_text((ours, our_logprobs), (tokens, logprobs), 0.02)


@pytest.mark.parametrize("number", [1, 2, 3, 5], ids=lambda n: f"{n}-requests")
def test_graphs_are_eager(number, opt, predictors):
    """Half density: full graphs and eager select the same and say the same, the batch padded or not."""
    model, prompts = opt(**MODEL), PROMPTS[:number]
    artifact = predictors(model, attention="previous")
    eager = run(model, "dejavu", {"predictor": artifact}, prompts, enforce_eager=True)
    graphs = run(model, "dejavu", {"predictor": artifact}, prompts)
    if number == 1:
        assert graphs[0] == eager[0]
    assert graphs[2]["steps"]["piecewise_graph"] <= 1, "decode steps fell to piecewise graphs"
    for layer, other in zip(graphs[2]["layers"], eager[2]["layers"], strict=True):
        for block in ("mlp", "attention"):
            assert layer[block]["rows"] == other[block]["rows"], "padding rows were counted"
            assert abs(layer[block]["density"] - other[block]["density"]) < 0.02


def test_controls_and_dense_mode_run(opt, predictors):
    """The controls turn graphs off; mode dense keeps them and needs no artifact."""
    model = opt(**MODEL)
    artifact = predictors(model)
    for mode in ("oracle", "random", "static"):
        counted = run(model, "dejavu", {"predictor": artifact, "mode": mode})[2]
        assert counted["steps"]["sparse"] > 0 and counted["mlp_density"] < 1
    assert run(model, "dejavu", {"mode": "dense"})[0] == run(model, "vllm")[0]
