"""`apply_to: all`: scoring a text in one go equals decoding it token by token through the sparse path.

So perplexities measured on prompts are those of what is served at batch 1.
"""

from __future__ import annotations

import pytest
import torch
from engine import (
    TOLERANCE,
    Recorder,
    engine,
    greedy,
    metrics_of,
    next_token_log_probs,
    random_prompt,
    run_requests,
)
from replay import Replay
from tolerances import relative_rms

MODEL = {"hidden": 128, "heads": 4, "tied": False}
TEXTS = {"short": random_prompt(9), "medium": random_prompt(40), "long": random_prompt(70)}


def score(model, dejavu, **options):
    """Prompt log-probabilities of all TEXTS, in one batch. Returns ({text: [tokens - 1]}, steps, metrics)."""
    with engine(model, dejavu=dejavu, **options) as llm, Recorder(llm) as recorder:
        outputs = llm.generate(
            [{"prompt_token_ids": t} for t in TEXTS.values()],
            greedy(1, prompt_logprobs=0, flat_logprobs=False),
            use_tqdm=False,
        )
        scores = {
            name: torch.tensor(
                [
                    entry[token].logprob
                    for entry, token in zip(output.prompt_logprobs[1:], text[1:], strict=True)
                ]
            )
            for (name, text), output in zip(TEXTS.items(), outputs, strict=True)
        }
        return scores, recorder.steps, metrics_of(llm)


def decode(model, dejavu, name):
    """One text token by token: a prompt of its first token, then every sampled token forced. Returns as
    `score`.
    """
    text = TEXTS[name]
    with engine(model, dejavu=dejavu) as llm, Recorder(llm, force={name: text}) as recorder:
        generated = run_requests(llm, {0: {name: text[:1]}}, len(text) - 1)
        assert generated[name] == text[1:], "the text was not followed"
        found = next_token_log_probs(recorder.steps)
        return (
            torch.stack([found[name, i][text[i + 1]] for i in range(len(text) - 1)]),
            recorder.steps,
            metrics_of(llm),
        )


@pytest.fixture(scope="module", params=["self", "previous"])
def served(request, opt, predictors):
    """(model, artifact, texts decoded token by token), with MLP and head gates."""
    model = opt(**MODEL)
    artifact = predictors(
        model, mlp="attn_input" if request.param == "self" else "previous", attention=request.param
    )
    return model, artifact, {name: decode(model, {"predictor": artifact}, name) for name in TEXTS}


@pytest.mark.parametrize("budget", [pytest.param(None, id="whole"), pytest.param(16, id="chunked")])
def test_scoring_is_teacher_forced_decoding(served, budget):
    """The same log-probabilities and the same selections, with the texts in one batch and in chunks of 16
    tokens.
    """
    model, artifact, decoded = served
    options = {} if budget is None else {"max_num_batched_tokens": budget}
    scores, steps, counted = score(model, {"predictor": artifact, "apply_to": "all"}, **options)
    assert any(max(s.query_lens) > 1 for s in steps) and counted["steps"]["prefill_or_mixed"] == 0
    assert counted["steps"]["sparse"] == len(steps)
    assert budget is None or len(steps) > 5
    for name, (expected, decode_steps, decode_counted) in decoded.items():
        assert decode_counted["steps"]["sparse"] == len(decode_steps) == len(TEXTS[name]) - 1
        assert relative_rms(scores[name], expected) < TOLERANCE["float32"]
    assert 0.3 < counted["mlp_density"] < 0.7
    selected = sum(gate["selected"] for layer in counted["layers"] for gate in layer.values())
    # the last token of each text is scored, but was never fed when decoding
    recorded = sum(
        int(mask.sum()) for _, s, _ in decoded.values() for step in s for mask, _ in step.gates.values()
    )
    last = sum(
        int(mask[end - 1].sum())
        for s in steps
        for mask, _ in s.gates.values()
        for end, length, request in zip(s.query_start_loc[1:], s.seq_lens, s.requests, strict=True)
        if length == len(list(TEXTS.values())[int(request)])
    )
    assert selected == recorded + last


def test_scoring_is_the_masked_replay(served):
    """Each row of a prompt keeps just its own neurons and heads."""
    model, artifact, _ = served
    _, steps, _ = score(model, {"predictor": artifact, "apply_to": "all"})
    replayed = Replay(model, artifact, row_exact=True).run(steps)
    assert replayed.checked > 100_000 and not replayed.wrong and replayed.flips < 1e-4 * replayed.checked
    assert (
        relative_rms(torch.cat([s.log_probs for s in steps]), torch.cat(replayed.log_probs))
        < TOLERANCE["float32"]
    )


def test_without_apply_to_all_prompts_are_dense(served):
    """Else the tests above would show nothing: the default leaves prompts dense and scores them
    differently.
    """
    model, artifact, decoded = served
    scores, steps, counted = score(model, {"predictor": artifact})
    assert not any(s.sparse for s in steps) and counted["steps"]["sparse"] == 0
    assert all(
        relative_rms(scores[name], expected) > 1000 * TOLERANCE["float32"]
        for name, (expected, *_) in decoded.items()
    )


def test_prefix_caching_is_off(served):
    """A prompt token that came out of the cache would not be scored: apply_to="all" turns the prefix cache
    off.
    """
    model, artifact, _ = served
    with engine(model, dejavu={"predictor": artifact, "apply_to": "all"}, enable_prefix_caching=None) as llm:
        assert not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        with Recorder(llm) as recorder:
            for name in ("first", "second"):
                run_requests(llm, {0: {name: TEXTS["long"]}}, 1)
        assert [s.query_lens for s in recorder.steps] == [[70], [70]]
