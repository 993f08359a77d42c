"""Who decides what is selected: the row's own predictor input and nothing else; what is counted is what was
selected.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from engine import (
    TOLERANCE,
    Recorder,
    engine,
    metrics_of,
    model_of,
    next_token_log_probs,
    random_prompt,
    run_requests,
)
from replay import Replay
from safetensors.torch import load_file
from tolerances import relative_rms
from vllm.forward_context import set_forward_context

from vllm_dejavu.kernels import reference

MODEL = {"hidden": 128, "heads": 4, "tied": False}
LAYERS = 3
PROMPTS = {name: random_prompt(9 * i + 5) for i, name in enumerate("abcd")}
NEW_TOKENS = 20
HEAD_THRESHOLD = 4.0  # about the median contribution of a head of MODEL


def record(model, dejavu, prompts=PROMPTS, **options):
    """All prompts at once. Returns (steps, tokens by request, metrics)."""
    with engine(model, dejavu=dejavu, **options) as llm, Recorder(llm) as recorder:
        tokens = run_requests(llm, {0: prompts}, NEW_TOKENS)
        return recorder.steps, tokens, metrics_of(llm)


def by_position(steps) -> dict[tuple, torch.Tensor]:
    """(request, position, layer, block) -> the row's own selection [units], over the sparse steps."""
    return {
        (request, position, layer, block): mask[row]
        for step in steps
        for (layer, block), (mask, _) in ((k, g) for k, g in step.gates.items() if g is not None)
        for row, (request, position) in enumerate(zip(step.requests, step.positions.tolist(), strict=False))
    }


def counted_gates(counted) -> dict[tuple[int, str], dict]:
    return {
        (i, block): layer[block]
        for i, layer in enumerate(counted["layers"])
        for block in layer
        if layer[block]["gated"]
    }


class TestGivenTheSameInputs:
    """The selection ops of a served model, called as in a decode step on chosen inputs."""

    @pytest.fixture(scope="class")
    def choose(self, opt, predictors):
        """choose(x [T, hidden], seq_lens [T]) -> (MLP masks [T, units], union ids, head scores) of layer
        1.
        """
        model = opt(**MODEL)
        with engine(model, dejavu={"predictor": predictors(model, density=0.2), "row_exact": True}) as llm:
            layer, config = model_of(llm).model.decoder.layers[1], llm.llm_engine.vllm_config

            def call(x, seq_lens):
                metadata = SimpleNamespace(
                    max_query_len=1,
                    num_actual_tokens=len(x),
                    seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
                )
                positions = torch.arange(len(x))
                with set_forward_context({layer.self_attn.attention_name: metadata}, config), torch.no_grad():
                    mlp, attention = layer.mlp, layer.self_attn
                    chosen = mlp.choose(x, positions, mlp.call(mlp.sparse_step(len(x)), x))
                    call = attention.call(attention.sparse_step(len(x)), x)
                    return chosen.mask, reference.listed(chosen), attention.choose(x, positions, call)

            yield call

    @pytest.fixture(scope="class")
    def x(self):
        return torch.randn(7, MODEL["hidden"], generator=torch.Generator().manual_seed(5))

    def test_neighbours_and_batch_order_change_no_row(self, choose, x):
        """A row alone, in a batch and in the batch reversed selects the same."""
        mask, _, scores = choose(x, [9] * 7)
        backwards, _, scores_backwards = choose(x.flip(0), [9] * 7)
        assert torch.equal(backwards.flip(0), mask)
        assert torch.equal(scores_backwards.flip(0) > 0, scores > 0)
        for row in range(len(x)):
            alone, _, alone_scores = choose(x[row : row + 1], [9])
            assert torch.equal(alone[0], mask[row])
            assert torch.equal(alone_scores[0] > 0, scores[row] > 0)

    @pytest.mark.parametrize(
        "garbage",
        [
            pytest.param(float("nan"), id="nan"),
            pytest.param(float("inf"), id="inf"),
            pytest.param(1e4, id="large"),
        ],
    )
    def test_padding_selects_nothing(self, choose, x, garbage):
        """Rows of length 0 select no unit, whatever they hold, and change nobody else's selection."""
        mask, ids, scores = choose(x, [9] * 7)
        padded = torch.cat([x, torch.full((5, x.shape[1]), garbage)])
        found, found_ids, found_scores = choose(padded, [9] * 7 + [0] * 5)
        assert torch.equal(found[:7], mask) and not found[7:].any()
        assert torch.equal(found_ids, ids)
        assert torch.equal(found_scores[:7] > 0, scores > 0) and not (found_scores[7:] > 0).any()

    def test_only_padding(self, choose, x):
        mask, ids, scores = choose(x, [0] * 7)
        assert not mask.any() and not len(ids) and not (scores > 0).any()

    def test_the_union_only_adds(self, choose, x):
        """The neurons read are those that some row selected: no more, no less, each once, ascending."""
        mask, ids, _ = choose(x, [9] * 7)
        assert ids.tolist() == mask.any(dim=0).nonzero().flatten().tolist()
        assert mask.sum(dim=1).max() < len(ids) < mask.shape[1], (
            "the rows agree, or select everything: the test says nothing"
        )


class TestNeighbours:
    """The same request alone and in a batch of four, all starting in the same step."""

    @pytest.fixture(scope="class")
    def runs(self, opt, predictors):
        """row_exact -> ((steps, tokens) of the batch, {request: (steps, tokens) alone})."""
        model, out = opt(**MODEL), {}
        for row_exact in (True, False):
            with engine(model, dejavu={"predictor": predictors(model), "row_exact": row_exact}) as llm:
                results = []
                for prompts in (PROMPTS, {"a": PROMPTS["a"]}, {"d": PROMPTS["d"]}):
                    with Recorder(llm) as recorder:
                        tokens = run_requests(llm, {0: prompts}, NEW_TOKENS)
                    results.append((recorder.steps, tokens))
            out[row_exact] = results
        return out

    @pytest.mark.parametrize(("request_id", "number"), [("a", 1), ("d", 2)])
    def test_with_row_exact_neighbours_change_nothing(self, runs, request_id, number):
        """Selections and tokens are identical, log-probabilities too up to the order of sums."""
        (steps, tokens), (alone_steps, alone_tokens) = runs[True][0], runs[True][number]
        assert alone_tokens[request_id] == tokens[request_id]
        batch, alone = by_position(steps), by_position(alone_steps)
        assert len(alone) == (NEW_TOKENS - 1) * LAYERS * 2
        assert all(torch.equal(mask, batch[key]) for key, mask in alone.items())
        expected, found = next_token_log_probs(alone_steps), next_token_log_probs(steps)
        assert max(relative_rms(found[k], expected[k]) for k in expected) < TOLERANCE["float32"]

    def test_without_row_exact_they_do(self, runs):
        """Else the test above would show nothing: the union of a batch gives a row more neurons."""
        (steps, _), (alone_steps, _) = runs[False][0], runs[False][1]
        expected, found = next_token_log_probs(alone_steps), next_token_log_probs(steps)
        assert (
            max(relative_rms(found[k], v) for k, v in expected.items() if k in found)
            > 1000 * TOLERANCE["float32"]
        )

    def test_first_gate_of_a_first_sparse_step(self, runs):
        """Even then the first gate, whose inputs are the same, selects the same."""
        (steps, _), (alone_steps, _) = runs[False][0], runs[False][1]
        first = (("a", len(PROMPTS["a"]), 0, "attention"),)
        batch, alone = by_position(steps), by_position(alone_steps)
        assert all(torch.equal(batch[k], alone[k]) for k in first)


def test_counters_are_what_was_selected(opt, predictors):
    """steps, rows, selected, read and survived equal counts over the recorded masks and the replay's
    activations.
    """
    model = opt(**MODEL)
    artifact = predictors(model, dense_layers=(1,))
    steps, _, counted = record(model, {"predictor": artifact})
    expected = Replay(model, artifact).run(steps).counts
    found = counted_gates(counted)
    assert found.keys() == expected.keys()
    for gate, counts in expected.items():
        assert {k: found[gate][k] for k in ("steps", "rows", "selected", "read")} == {
            k: counts[k] for k in ("steps", "rows", "selected", "read")
        }
        if gate[1] == "mlp":
            assert found[gate]["survived"] == counts["survived"]
            assert 0 < counts["survived"] < counts["read"]
        units = {"mlp": 512, "attention": 4}[gate[1]]
        assert found[gate]["density"] == pytest.approx(counts["selected"] / counts["rows"] / units)
        assert 0.1 < found[gate]["density"] < found[gate]["read_density"] < 1.0 or gate[1] == "attention"
    densities = [found[i, "mlp"]["density"] if i != 1 else 1.0 for i in range(LAYERS)]
    assert counted["mlp_density"] == pytest.approx(sum(densities) / LAYERS), "a dense layer counts 1"
    assert counted["steps"]["sparse"] == sum(s.sparse for s in steps) == NEW_TOKENS - 1


@pytest.fixture(scope="module")
def discerning(opt, predictors, tmp_path_factory):
    """(model, artifact of density 0.3 whose head threshold splits the contributions of a tiny model in
    two).
    """
    model, artifact = opt(**MODEL), tmp_path_factory.mktemp("discerning") / "artifact"
    shutil.copytree(predictors(model, density=0.3), artifact)
    manifest = json.loads((artifact / "dejavu.json").read_text())
    for layer in manifest["layers"]:
        layer["attention"]["threshold"] = HEAD_THRESHOLD
    (artifact / "dejavu.json").write_text(json.dumps(manifest))
    return model, artifact


@pytest.mark.parametrize(
    "prompts", [pytest.param({"a": PROMPTS["a"]}, id="alone"), pytest.param(PROMPTS, id="batch")]
)
def test_measured_recall(prompts, discerning):
    """measure=True counts the truly active units and those found; outputs stay as they are without it.

    Guards a bug: the query of a head that no row selected is not computed, so what such a head would have
    contributed was measured with a query of 0.
    """
    model, artifact = discerning
    steps, tokens, counted = record(model, {"predictor": artifact, "measure": True}, prompts)
    replayed = Replay(model, artifact).run(steps)
    assert not replayed.wrong
    for gate, found in counted_gates(counted).items():
        counts = replayed.counts[gate]
        assert 0 < counts["hit"] < counts["active"] < counts["rows"] * found["units"]
        assert (found["active"], found["hit"]) == (counts["active"], counts["hit"]), gate
        assert found["recall"] == pytest.approx(counts["hit"] / counts["active"])
    plain_steps, plain_tokens, _ = record(model, {"predictor": artifact}, prompts)
    assert tokens == plain_tokens
    assert relative_rms(steps[-1].log_probs, plain_steps[-1].log_probs) < TOLERANCE["float32"]


class TestControls:
    @pytest.fixture(scope="class")
    def model(self, opt):
        return opt(**MODEL)

    def test_oracle_mlp_is_exact(self, model, predictors):
        """Reading just the truly positive neurons is the dense model, at their density."""
        artifact = predictors(model)
        steps, tokens, counted = record(model, {"predictor": artifact, "mode": "oracle", "blocks": ["mlp"]})
        replayed = Replay(model, artifact, oracle=True).run(steps)
        assert replayed.checked > 10_000 and not replayed.wrong and replayed.flips < 10
        assert counted["steps"]["sparse"] == NEW_TOKENS - 1
        assert all(
            0.1 < g["density"] < 0.6 and g["hit"] == g["active"]
            for g in counted_gates(counted).values()
            if g["active"]
        )
        with engine(model, impl="vllm") as llm, Recorder(llm) as recorder:
            dense_tokens = run_requests(llm, {0: PROMPTS}, NEW_TOKENS)
        assert tokens == dense_tokens
        found, expected = next_token_log_probs(steps), next_token_log_probs(recorder.steps)
        assert max(relative_rms(found[k], expected[k]) for k in expected) < TOLERANCE["float32"]

    def test_oracle_of_both_blocks(self, discerning):
        """Heads whose contribution is above the artifact's threshold, neurons that are positive: as the
        replay finds them.
        """
        model, artifact = discerning
        steps, _, counted = record(model, {"predictor": artifact, "mode": "oracle"})
        replayed = Replay(model, artifact, oracle=True).run(steps)
        assert not replayed.wrong and replayed.flips < 10
        assert (
            relative_rms(torch.cat([s.log_probs for s in steps]), torch.cat(replayed.log_probs))
            < TOLERANCE["float32"]
        )
        heads = [g for (_, block), g in counted_gates(counted).items() if block == "attention"]
        assert all(0 < g["density"] < 1 and g["recall"] == 1 for g in heads)

    def test_random_depends_on_seed_and_position_only(self, model, predictors):
        """The same mask at the same position in every request and batch; another mask for another seed; the
        artifact's density.
        """
        artifact = predictors(model, density=0.3)
        runs = [
            record(model, {"predictor": artifact, "mode": "random", "seed": seed}, prompts)
            for seed, prompts in ((7, PROMPTS), (7, {"x": random_prompt(30, seed=3)}), (8, PROMPTS))
        ]
        masks: list[dict] = []
        for steps, _, _ in runs:
            seen = {}
            for (_, *key), mask in by_position(steps).items():
                assert torch.equal(seen.setdefault(tuple(key), mask), mask), "two rows at one position differ"
            masks.append(seen)
        shared = masks[0].keys() & masks[1].keys()
        assert len(shared) >= 10 * LAYERS * 2
        assert all(torch.equal(masks[0][k], masks[1][k]) for k in shared)
        mlp = [k for k in masks[0] if k[2] == "mlp"]
        assert not any(torch.equal(masks[0][k], masks[2][k]) for k in mlp), "the seed changes nothing"
        assert len({masks[0][k].numpy().tobytes() for k in mlp}) == len(mlp), (
            "layers or positions share masks"
        )
        steps, _, counted = runs[0]
        assert all(0.27 < g["density"] < 0.33 for (_, b), g in counted_gates(counted).items() if b == "mlp")
        replayed = Replay(model).run(steps)
        assert (
            relative_rms(torch.cat([s.log_probs for s in steps]), torch.cat(replayed.log_probs))
            < TOLERANCE["float32"]
        )

    def test_static_is_the_most_often_active(self, model, predictors):
        """One mask for all rows and steps: the artifact's density of the units that were most often
        active.
        """
        artifact = predictors(model, density=0.25)
        steps, _, counted = record(model, {"predictor": artifact, "mode": "static"})
        rates = load_file(artifact / "predictors.safetensors")
        for layer in range(LAYERS):
            for block, units in (("mlp", 512), ("attention", 4)):
                rate = rates[f"layers.{layer}.{block}.activation_rate"]
                top = rate >= rate.sort(descending=True).values[units // 4 - 1]
                found = [m for (*_, at, b), m in by_position(steps).items() if (at, b) == (layer, block)]
                assert len(found) == (NEW_TOKENS - 1) * len(PROMPTS)
                assert all(torch.equal(m, top) for m in found)
                assert counted["layers"][layer][block]["density"] == 0.25
        replayed = Replay(model).run(steps)
        assert (
            relative_rms(torch.cat([s.log_probs for s in steps]), torch.cat(replayed.log_probs))
            < TOLERANCE["float32"]
        )


def test_crossover_makes_large_batches_dense(opt, predictors):
    """A layer whose calibrated union density is above the crossover from batch 3 on runs dense there, and
    counts as density 1.
    """
    model = opt(**MODEL)
    union = {str(b): {"mean": d, "upper": d} for b, d in ((1, 0.5), (2, 0.6), (3, 0.75), (4, 0.8))}
    artifact = predictors(model, union_density=union)
    with engine(model, dejavu={"predictor": artifact, "crossover": 0.7}) as llm, Recorder(llm) as recorder:
        first = {"a": PROMPTS["a"], "b": PROMPTS["b"]}
        tokens = run_requests(llm, {0: first, 6: {"c": PROMPTS["c"]}, 9: {"d": PROMPTS["d"]}}, NEW_TOKENS)
        counted = metrics_of(llm)
    steps = recorder.steps
    assert {len(s.requests) for s in steps} == {1, 2, 3, 4}
    for step in steps:
        small_decode = max(step.query_lens) == 1 and len(step.requests) <= 2
        for (_, block), gate in step.gates.items():
            if block == "mlp":
                assert (gate is not None) == small_decode
    replayed = Replay(model, artifact).run(steps)
    assert not replayed.wrong
    assert (
        relative_rms(torch.cat([s.log_probs for s in steps]), torch.cat(replayed.log_probs))
        < TOLERANCE["float32"]
    )
    chosen = replayed.tokens(steps)
    assert all(
        chosen[r][len(PROMPTS[r]) + i] == t
        for r, generated in tokens.items()
        for i, t in enumerate(generated)
    )
    decoding = [len(s.requests) for s in steps if max(s.query_lens) == 1]
    assert counted["steps"]["sparse"] == sum(n <= 2 for n in decoding)
    # heads have the same unions here, so that all of the step is dense
    assert counted["steps"]["above_crossover"] == sum(n > 2 for n in decoding)
    for layer in range(LAYERS):
        gate, counts = counted["layers"][layer]["mlp"], replayed.counts[layer, "mlp"]
        dense_rows = sum(n for n in decoding if n > 2)
        assert gate["rows"] == counts["rows"] + dense_rows
        assert gate["selected"] == counts["selected"] + 512 * dense_rows
        assert gate["read"] == counts["read"] + 512 * sum(n > 2 for n in decoding)
