"""Everything selected, through the sparse path, is vLLM's own OPT.

Each case runs vLLM's OPT and ours over the same prompts of uneven lengths in one batch, and compares tokens
and whole log-probability distributions. The counters prove that the sparse path ran: these tests fail if it
silently ran dense, or if vLLM silently ran its own class.
"""

from __future__ import annotations

import pytest
import torch
from engine import (
    TOLERANCE,
    Recorder,
    engine,
    generate,
    metrics_of,
    model_of,
    next_token_log_probs,
    random_prompt,
    run_requests,
)
from tolerances import relative_rms

from vllm_dejavu.metrics import STEP_REASONS

PROMPTS = {
    "one": random_prompt(1),
    "two": random_prompt(2),
    "block": random_prompt(32),
    "long": random_prompt(45),
}
NEW_TOKENS = 24
POST_LN = {"pre_ln": False, "embed_dim": 32}
# In bfloat16 the better of two tokens may change where vLLM's own OPT rates them closer than this
# (log-probability; the largest difference measured is 0.036, the logits' own spacing 0.016).
MARGIN = 0.08


def run(model, dtype, impl, dejavu=None, force=None):
    """Returns (tokens by request, log-probabilities by (request, position), architecture, metrics or None,
    steps).
    """
    with engine(model, impl=impl, dejavu=dejavu, dtype=dtype) as llm:
        with Recorder(llm, force) as recorder:
            tokens = run_requests(llm, {0: PROMPTS}, NEW_TOKENS)
        counted = metrics_of(llm) if impl == "dejavu" else None
        return (
            tokens,
            next_token_log_probs(recorder.steps),
            type(model_of(llm)).__name__,
            counted,
            recorder.steps,
        )


def all_rms(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys(), "the two engines computed other positions"
    return relative_rms(
        torch.stack([found[k] for k in expected]), torch.stack([expected[k] for k in expected])
    )


def assert_everything_ran_sparse(counted: dict, steps: list) -> None:
    """NEW_TOKENS - 1 decode steps were sparse, every gate saw all their rows and selected all its units.

    A block that ran dense in them (above its crossover) would count density 1 as well, but report no mask,
    and no neurons that survived fc1.
    """
    assert [s.sparse for s in steps] == [False] + [True] * (NEW_TOKENS - 1)
    for step in steps[1:]:
        assert len(step.gates) == 2 * len(counted["layers"])
        assert all(gate is not None and bool(gate[0].all()) for gate in step.gates.values()), (
            "a block ran dense"
        )
    assert counted["steps"]["sparse"] == NEW_TOKENS - 1
    assert counted["steps"]["prefill_or_mixed"] == 1
    for layer in counted["layers"]:
        for block in ("mlp", "attention"):
            assert layer[block]["gated"], "a gate is missing"
            assert layer[block]["rows"] == (NEW_TOKENS - 1) * len(PROMPTS)
            assert layer[block]["density"] == layer[block]["read_density"] == 1
        assert 0 < layer["mlp"]["survived_density"] < 1
    assert counted["artifact"]["fingerprint_verified"]


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, id="pre_ln"),
        pytest.param(POST_LN, id="post_ln_projected"),
        pytest.param({"tied": False}, id="untied"),
        pytest.param({"tied": False, **POST_LN}, id="untied_post_ln_projected"),
        pytest.param({"bias": False}, id="no_bias"),
        pytest.param({"hidden": 160, "heads": 2}, id="head_size_80"),
    ],
)
def test_full_density_is_vllms_opt(variant, opt, predictors):
    """float32: the same tokens, the same log-probabilities."""
    model = opt(**variant)
    tokens, expected, architecture, *_ = run(model, "float32", "vllm")
    assert architecture == "OPTForCausalLM"
    found_tokens, found, architecture, counted, steps = run(
        model, "float32", "dejavu", {"predictor": predictors(model, select_all=True)}
    )
    assert architecture == "DejaVuOPTForCausalLM"
    assert_everything_ran_sparse(counted, steps)
    assert found_tokens == tokens
    assert all_rms(found, expected) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    "variant", [pytest.param({}, id="pre_ln"), pytest.param(POST_LN, id="post_ln_projected")]
)
def test_full_density_is_vllms_opt_in_bfloat16(variant, opt, predictors):
    """bfloat16: fed the same tokens, the same log-probabilities within its tolerance, and the same choice
    where it is clear.
    """
    model = opt(dtype="bfloat16", tied=False, **variant)
    tokens, expected, *_ = run(model, "bfloat16", "vllm")
    texts = {request: PROMPTS[request] + tokens[request] for request in PROMPTS}
    found_tokens, found, architecture, counted, steps = run(
        model, "bfloat16", "dejavu", {"predictor": predictors(model, select_all=True)}, force=texts
    )
    assert architecture == "DejaVuOPTForCausalLM"
    assert_everything_ran_sparse(counted, steps)
    assert found_tokens == tokens, "the forced tokens were not taken"
    assert all_rms(found, expected) < TOLERANCE["bfloat16"]
    best = {k: v.topk(2).values for k, v in expected.items()}
    clear = [k for k, v in best.items() if v[0] - v[1] > MARGIN]
    assert len(clear) > len(expected) / 2, "hardly a token is clear: the comparison says nothing"
    assert [int(found[k].argmax()) for k in clear] == [int(expected[k].argmax()) for k in clear]


def test_mode_dense_is_vllms_opt(opt):
    """mode="dense" needs no artifact, counts every step as mode_dense and gives vLLM's result."""
    model = opt()
    tokens, expected, *_ = run(model, "float32", "vllm")
    found_tokens, found, architecture, counted, _ = run(model, "float32", "dejavu", {"mode": "dense"})
    assert architecture == "DejaVuOPTForCausalLM"
    assert counted["steps"] == {**dict.fromkeys(STEP_REASONS, 0), "mode_dense": NEW_TOKENS}
    assert counted["mlp_density"] == counted["head_density"] == 1
    assert found_tokens == tokens
    assert all_rms(found, expected) < TOLERANCE["float32"]


@pytest.mark.slow
def test_compiled_is_eager(opt, predictors):
    """torch.compile on and off give the same tokens, and the same counts of the same selections, at density
    0.5.
    """
    model = opt(tied=False)
    results = []
    for eager in (True, False):
        with engine(
            model, dejavu={"predictor": predictors(model, attention="previous")}, enforce_eager=eager
        ) as llm:
            tokens = generate(llm, list(PROMPTS.values()), NEW_TOKENS)
            counted = metrics_of(llm)
        results.append(
            (
                tokens,
                counted["steps"],
                [(g["mlp"]["selected"], g["attention"]["selected"]) for g in counted["layers"]],
            )
        )
    assert results[0] == results[1]
    assert results[0][1]["sparse"] == NEW_TOKENS - 1
