"""Reduced density is what an independent masked Hugging Face OPT computes over the engine's recorded
schedule.

`replay.Replay` follows the engine step by step (rows, cache slots, selections) and knows nothing of our code.
Compared are the tokens, whole log-probability distributions, and every selection, recomputed from Hugging
Face's hidden states.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from engine import TOLERANCE, Recorder, engine, metrics_of, random_prompt, run_requests
from replay import Replay
from tolerances import relative_rms

MODEL = {"hidden": 128, "heads": 4, "tied": False}  # untied: the greedy texts do not repeat themselves
POST_LN = {"pre_ln": False, "embed_dim": 32}
# At most this share of the selections may sit so near to 0 that float32 decides otherwise.
FLIPS_ALLOWED = 1e-4
BLOCK = 32  # tokens a cache block

# Two requests, one of 33 tokens so that it starts in its second block; two more arrive in the middle, one of
# 1 token.
MIDWAY = {
    0: {"a": random_prompt(20), "b": random_prompt(33)},
    5: {"c": random_prompt(7), "d": random_prompt(1)},
}
TWICE = random_prompt(70, seed=1)


def record(model, artifact, arrivals, max_tokens=24, dejavu=None, **options):
    """Returns (steps, tokens by request, step counts)."""
    with (
        engine(model, dejavu={"predictor": artifact, **(dejavu or {})}, **options) as llm,
        Recorder(llm) as recorder,
    ):
        tokens = run_requests(llm, arrivals, max_tokens)
        return recorder.steps, tokens, metrics_of(llm)["steps"]


def rows(steps):
    """(request, first position, end position) of every request's part of every step."""
    for step in steps:
        for request, length, query in zip(step.requests, step.seq_lens, step.query_lens, strict=True):
            yield request, length - query, length


def recomputed_tokens(steps) -> int:
    """Tokens computed again, because their request was preempted."""
    known, count = {}, 0
    for request, start, end in rows(steps):
        count += max(0, known.get(request, 0) - start)
        known[request] = end
    return count


def first_positions(steps) -> dict[str, int]:
    """Where each request started: after its prefix-cache hit."""
    first = {}
    for request, start, _ in rows(steps):
        first.setdefault(request, start)
    return first


def error(steps, replayed) -> float:
    return relative_rms(torch.cat([s.log_probs for s in steps]), torch.cat(replayed.log_probs))


def assert_replayed(model, artifact, arrivals, steps, tokens, counted, **replay_options):
    """The replay agrees with the engine: path, selections, log-probabilities, tokens."""
    for step in steps:
        assert step.sparse == (max(step.query_lens) == 1), (
            "sparse steps are those in which every request adds one token"
        )
    assert counted["sparse"] == sum(s.sparse for s in steps) > 0
    assert counted["prefill_or_mixed"] == sum(not s.sparse for s in steps) > 0
    replayed = Replay(model, artifact, **replay_options).run(steps)
    assert replayed.checked > 1000
    assert not replayed.wrong, "selections differ (step, layer, block, row, unit, score)"
    assert replayed.flips <= FLIPS_ALLOWED * replayed.checked
    assert error(steps, replayed) < TOLERANCE["float32"]
    chosen = replayed.tokens(steps)
    prompts = {request: prompt for group in arrivals.values() for request, prompt in group.items()}
    for request, generated in tokens.items():
        start = len(prompts[request])
        assert generated == [chosen[request][start + i] for i in range(len(generated))]
    assert tokens.keys() == prompts.keys()
    return replayed


@pytest.mark.parametrize(
    ("variant", "gates", "settings"),
    [
        pytest.param({}, {}, {}, id="self"),
        pytest.param({}, {"mlp": "attn_input"}, {}, id="attn_input"),
        pytest.param({}, {"mlp": "previous", "attention": "previous"}, {}, id="previous"),
        pytest.param({}, {"dense_layers": (1,)}, {}, id="a_dense_layer"),
        pytest.param({}, {"mlp": None}, {}, id="attention_only"),
        pytest.param({}, {}, {"blocks": ["mlp"]}, id="blocks_mlp"),
        pytest.param(POST_LN, {"mlp": "attn_input"}, {}, id="post_ln_attn_input"),
        pytest.param(POST_LN, {"mlp": "previous", "attention": "previous"}, {}, id="post_ln_previous"),
        pytest.param({}, {"density": 0.1}, {}, id="density_0.1"),
        pytest.param({}, {}, {"row_exact": True}, id="row_exact"),
        pytest.param({}, {"dtype": "int8", "attention": "previous"}, {}, id="int8"),
    ],
)
def test_a_request_arriving_midway(variant, gates, settings, opt, predictors):
    """Continuous batching: two requests decode, two join them (a mixed step), all decode on, the first ones
    leave.
    """
    model = opt(**MODEL, **variant)
    artifact = predictors(model, **gates)
    steps, tokens, counted = record(model, artifact, MIDWAY, dejavu=settings)
    assert any(max(s.query_lens) > 1 and min(s.query_lens) == 1 for s in steps), (
        "no step mixed prompts with decoding"
    )
    assert {len(s.requests) for s in steps if s.sparse} >= {2, 4}
    blocks, dense = settings.get("blocks", ("mlp", "attention")), gates.get("dense_layers", ())
    gated = {
        (layer, block)
        for layer in range(3)
        for block in blocks
        if layer not in dense and gates.get(block, "self")
    }
    assert all(step.gates.keys() == gated for step in steps)
    replayed = assert_replayed(
        model, artifact, MIDWAY, steps, tokens, counted, row_exact=settings.get("row_exact", False)
    )
    assert replayed.counts.keys() == gated


def test_preemption(opt, predictors):
    """A cache of 6 blocks for 4 growing requests: some are evicted and their generated tokens recomputed,
    densely.
    """
    model = opt(**MODEL)
    artifact = predictors(model)
    arrivals = {0: {name: random_prompt(20 + i) for i, name in enumerate("abcd")}}
    steps, tokens, counted = record(model, artifact, arrivals, max_tokens=40, num_gpu_blocks_override=7)
    assert recomputed_tokens(steps) > 20, "nothing was preempted"
    assert_replayed(model, artifact, arrivals, steps, tokens, counted)


def test_prefix_caching(opt, predictors):
    """A second prompt with the same first 64 tokens, and one that repeats what was generated, start from
    cached blocks.
    """
    model = opt(**MODEL)
    artifact = predictors(model)
    # What "first" generates is in the cache as sparsity left it; "again" reads it from there.
    settings = {"max_tokens": 30, "enable_prefix_caching": True}
    _, tokens, _ = record(model, artifact, {0: {"first": TWICE}}, **settings)
    again = (TWICE + tokens["first"])[:97]
    arrivals = {0: {"first": TWICE}, 40: {"second": TWICE[:64] + random_prompt(9), "again": again}}
    steps, tokens, counted = record(model, artifact, arrivals, **settings)
    assert first_positions(steps) == {
        "first": 0,
        "second": 64,
        "again": 96,
    }, "the prefix cache was not hit as planned"
    assert_replayed(model, artifact, arrivals, steps, tokens, counted)


def test_chunked_prefill(opt, predictors):
    """A budget of 16 tokens a step: long prompts come in pieces, beside requests that decode; a remainder of
    one token alone is a sparse step."""
    model = opt(**MODEL)
    artifact = predictors(model)
    arrivals = {0: {"a": random_prompt(33)}, 8: {"b": random_prompt(50), "c": random_prompt(3)}}
    steps, tokens, counted = record(model, artifact, arrivals, max_num_batched_tokens=16)
    assert [s.query_lens for s in steps[:3]] == [[16], [16], [1]] and steps[2].sparse
    assert sum(request == "b" and end - start > 1 for request, start, end in rows(steps)) >= 4, (
        "the prompt was not chunked"
    )
    assert_replayed(model, artifact, arrivals, steps, tokens, counted)


def test_everything_at_once(opt, predictors):
    """Arrivals, chunks, prefix hits and preemption together, with a dense layer, row by row masks and late
    lookahead.
    """
    model = opt(**MODEL)
    artifact = predictors(model, mlp="previous", dense_layers=(2,))
    arrivals = {
        0: {"a": TWICE[:40], "b": random_prompt(30)},
        6: {"c": TWICE[:32] + random_prompt(5), "d": random_prompt(1)},
        20: {"e": TWICE[:50], "f": random_prompt(26)},
    }
    steps, tokens, counted = record(
        model,
        artifact,
        arrivals,
        max_tokens=40,
        dejavu={"row_exact": True},
        max_num_batched_tokens=16,
        num_gpu_blocks_override=8,
        enable_prefix_caching=True,
    )
    assert recomputed_tokens(steps) > 0 and first_positions(steps)["e"] == BLOCK
    assert any(len(s.requests) > 1 and max(s.query_lens) > 1 for s in steps)
    assert_replayed(model, artifact, arrivals, steps, tokens, counted, row_exact=True)


@pytest.fixture(scope="module")
def plain(opt, predictors):
    model = opt(**MODEL)
    artifact = predictors(model)
    return model, artifact, record(model, artifact, MIDWAY)[0]


def _edit(steps, change):
    """Copies of the steps with `change(gates)` applied to the last sparse one of four requests."""
    number = max(i for i, s in enumerate(steps) if s.sparse and len(s.requests) == 4)
    gates = {k: (mask.clone(), valid) for k, (mask, valid) in steps[number].gates.items()}
    change(gates)
    return [replace(s, gates=gates) if i == number else s for i, s in enumerate(steps)]


def _toggle_a_head(gates):
    gates[1, "attention"][0][2, 0] ^= True


def _swap_rows(gates):
    mask = gates[0, "attention"][0]
    assert not torch.equal(mask[0], mask[1]), "these rows chose the same heads"
    mask[[0, 1]] = mask[[1, 0]]


def _drop_a_tenth_of_the_neurons(gates):
    gates[2, "mlp"][0][:, ::10] = False


def _run_one_block_dense(gates):
    gates[0, "mlp"] = None


class TestTheReplayWouldNotice:
    """The comparison has teeth: small lies about what the engine did are far outside its tolerance."""

    def test_the_truth_matches(self, plain):
        model, _, steps = plain
        assert error(steps, Replay(model).run(steps)) < TOLERANCE["float32"]

    def test_dense_instead_of_sparse(self, plain):
        model, _, steps = plain
        assert (
            error(steps, Replay(model).run([replace(s, gates={}) for s in steps]))
            > 1000 * TOLERANCE["float32"]
        )

    def test_rows_masked_to_their_own_neurons(self, plain):
        model, _, steps = plain
        assert error(steps, Replay(model, row_exact=True).run(steps)) > 1000 * TOLERANCE["float32"]

    @pytest.mark.parametrize(
        "change", [_toggle_a_head, _swap_rows, _drop_a_tenth_of_the_neurons, _run_one_block_dense]
    )
    def test_one_step_altered(self, plain, change):
        model, _, steps = plain
        assert error(steps, Replay(model).run(_edit(steps, change))) > 100 * TOLERANCE["float32"]

    def test_another_slot(self, plain):
        """A key in another block than the engine's is a NaN or another request's."""
        model, _, steps = plain
        table = steps[-1].block_table.clone()
        table[0] = table[0].roll(1)
        altered = [*steps[:-1], replace(steps[-1], block_table=table)]
        with pytest.raises(AssertionError, match="block table"):
            Replay(model).run(altered)

    def test_another_artifact(self, plain, predictors):
        """Selections recomputed with other predictors differ, far from 0."""
        model, artifact, steps = plain
        other = predictors(model, seed=1)
        replayed = Replay(model, other).run(steps)
        assert len(replayed.wrong) > replayed.checked / 10

    def test_the_manifests_lookahead_matters(self, plain, tmp_path):
        """The same tensors read from another hidden state select differently."""
        model, artifact, steps = plain
        manifest = json.loads((artifact / "dejavu.json").read_text())
        for layer in manifest["layers"]:
            layer["mlp"]["lookahead"] = "attn_input"
        (tmp_path / "dejavu.json").write_text(json.dumps(manifest))
        (tmp_path / "predictors.safetensors").write_bytes((artifact / "predictors.safetensors").read_bytes())
        replayed = Replay(model, tmp_path).run(steps)
        assert len(replayed.wrong) > replayed.checked / 10
