"""Selections, scorers, tasks and statistics of the quality study: by hand, and against made-up scores."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import quality_masks
import quality_scorers
import quality_selections
import quality_tasks as qt
import torch
from quality_run import BOS, arguments_of, some_texts, study_of
from quality_selections import DENSE, Point
from quality_tasks import OWN, Measure, Score, Text

from vllm_dejavu.predictor import quantize
from vllm_dejavu.predictor_training import forms
from vllm_dejavu.predictor_training.train import LayerWeights, fit_heads, fit_mlp


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return study_of(arguments_of(tmp_path_factory.mktemp("quality")))


def test_dense_scores_are_those_of_the_model_itself(study):
    for text, score in zip(some_texts(), study.masked(DENSE).score(some_texts()), strict=True):
        logits = (
            study.opt.model(input_ids=torch.tensor([text.tokens])).logits[0, text.start - 1 : -1].double()
        )
        targets = torch.tensor(text.tokens[text.start :])
        assert torch.allclose(score.nll, -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], atol=1e-4)
        assert score.correct.tolist() == (logits.argmax(-1) == targets).tolist()
    likely = logits[-1].argmax().item()
    sure = study.masked(DENSE).score([Text((*text.tokens[:-1], likely), len(text.tokens) - 1)])[0]
    assert sure.correct.tolist() == [True]


@pytest.mark.parametrize(
    "point",
    [Point(m, "both", d) for m in qt.MODES for d in ("0.5", OWN)],
    ids=lambda p: f"{p.mode}-{p.density}",
)
def test_padding_changes_neither_scores_nor_counts(study, point):
    """Texts of unequal length in one batch, against every text alone."""
    masks = study.selections.masks(point)
    together = quality_scorers.MaskedScorer(study.opt, masks).score(some_texts())
    counts = masks.counts
    masks.counts = {}
    alone = [quality_scorers.MaskedScorer(study.opt, masks).score([t])[0] for t in some_texts()]
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a.nll, b.nll, atol=1e-4)
    layers = {0, 1, 2} if point.density != OWN else {0, 1}
    assert set(counts) == {(i, b) for i in layers for b in ("mlp", "attention")}
    for key in counts:
        assert counts[key][0] == sum(len(t.tokens) for t in some_texts())
        # A score next to a threshold may fall on either side when products are summed in another order.
        assert (counts[key] - masks.counts[key]).abs().max() <= 2
    dense = study.masked(DENSE).score(some_texts())
    apart = max(float((a.nll - b.nll).abs().max()) for a, b in zip(together, dense, strict=True))
    # The truly active neurons (and heads above the tiny artifact's low threshold) are all that a dense model
    # uses.
    assert apart < 1e-4 if point == Point("oracle", "both", OWN) else apart > 1e-3


def test_random_selection_is_exact_even_and_fresh():
    mask = quality_masks.exact_random(np.random.default_rng(0), 4000, 12, 5)
    assert (mask.sum(1) == 5).all()
    assert np.abs(mask.mean(0) - 5 / 12).max() < 5 * math.sqrt(5 / 12 * 7 / 12 / 4000)
    pairs = (mask[:, 3] & mask[:, 9]).mean()  # drawn without replacement
    assert abs(pairs - 5 / 12 * 4 / 11) < 0.03
    assert len({row.tobytes() for row in mask}) > 600  # of 792 subsets
    assert (
        not quality_masks.exact_random(np.random.default_rng(0), 3, 12, 0).any()
        and quality_masks.exact_random(np.random.default_rng(0), 3, 12, 12).all()
    )
    assert (quality_masks.exact_random(np.random.default_rng(1), 500, 1, 1).sum(1) == 1).all()


def test_random_counts_on_text_are_exact(study):
    masks = study.selections.masks(Point("random", "both", "0.3"))
    quality_scorers.MaskedScorer(study.opt, masks).score(some_texts())
    tokens = sum(len(t.tokens) for t in some_texts())
    for (_, block), counts in masks.counts.items():
        assert counts[:2].tolist() == [tokens, tokens * round(0.3 * study.selections.units[block])]


@pytest.fixture(scope="module")
def observed(study):
    """What calibration saw, computed here: (layer, block) -> values; (layer, lookahead state) -> states."""
    s, seen = study.selections, {}

    def keep(layer, block, states, value):
        seen.setdefault((layer, block), []).append(value.clone())
        for name in ("attn_input", "mlp_input", "previous"):
            if block == "mlp" and states.named(name) is not None:
                seen.setdefault((layer, name), []).append(states.named(name).clone())

    tokens = study.windows(study.args.calibration, study.args.calibration_tokens)
    with study.opt.observed(lambda i, s, v: keep(i, "attention", s, v), lambda i, s, v: keep(i, "mlp", s, v)):
        for part in tokens:
            study.opt.decoder(part[None])
    assert tokens.numel() == s.calibration_tokens
    return {k: torch.cat(v) for k, v in seen.items()}


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
def test_thresholds_give_the_density_they_are_for(study, observed, density):
    """Every layer selects that share of the calibration text's pairs; the oracle the largest, and no neuron
    that ReLU stops.
    """
    s, valid = study.selections, SimpleNamespace(valid=torch.ones(len(observed[0, "mlp"]), dtype=torch.bool))
    for layer in range(3):
        weight = study.opt.weight(layer, "fc2")
        z = observed[layer, "mlp"]
        energy = z.clamp_min(0) * weight.norm(dim=0)
        mask = s.rule((layer, "mlp"), "oracle", density)(valid, None, z)
        assert not (mask & (z <= 0)).any()
        assert float(mask.float().mean()) == pytest.approx(
            min(density, float((z > 0).float().mean())), abs=2e-3
        )
        assert float(energy[mask].min()) >= float(energy[~mask].max())
        attn = observed[layer, "attention"]
        per_head = study.opt.weight(layer, "self_attn.out_proj").unflatten(1, attn.shape[1:])
        norms = torch.einsum("ohd,thd->tho", per_head, attn).norm(dim=2)
        mask = s.rule((layer, "attention"), "oracle", density)(valid, None, attn)
        assert float(mask.float().mean()) == pytest.approx(density, abs=2e-3)
        assert float(norms[mask].min()) >= float(norms[~mask].max()) - 1e-5
        for block in ("mlp", "attention"):
            gate = s.predictors[layer, block].at(s.cut("score", (layer, block), density))
            state = "mlp_input" if block == "mlp" else "attn_input" if layer == 0 else "previous"
            mask = gate.predictor.scores(observed[layer, state]) > 0
            assert float(mask.float().mean()) == pytest.approx(density, abs=5e-3), (layer, block)


def test_static_units_are_the_most_frequent_ones(study, observed):
    s = study.selections
    batch = SimpleNamespace(valid=torch.ones(2, dtype=torch.bool))
    for layer in range(3):
        chosen = s.rule((layer, "mlp"), "static", 0.25)(batch, None, torch.zeros(2, 512))
        rates = (observed[layer, "mlp"] > 0).float().mean(0)
        assert chosen.sum(1).tolist() == [128, 128] and (chosen[0] == chosen[1]).all()
        assert rates[chosen[0]].min() >= rates[~chosen[0]].max() - 1e-6


def test_a_gate_at_no_cut_is_the_stored_one_and_layers_without_one_are_fitted(study):
    s = study.selections
    assert s.fitted == [(2, "mlp"), (2, "attention")]
    assert (
        s.predictors[2, "attention"].gate.spec.lookahead == "previous"
        and s.predictors[2, "mlp"].gate.spec.lookahead == "self"
    )
    _, stored = study.loaded.gate(1, "mlp")
    assert torch.equal(s.predictors[1, "mlp"].at(0.0).tensors["bias"], stored["bias"])
    assert s.predictors[2, "attention"].dtype == s.predictors[2, "mlp"].dtype == "int8"


@pytest.mark.parametrize("block", ["mlp", "attention"])
def test_integers_are_put_back_on_one_scale(study, block):
    """Stored scores times their scale are the fitted scores again, which are in the same unit for all units
    of a block.
    """
    s, layer = study.selections, 1
    weights = LayerWeights.of(study.opt, layer)
    if block == "mlp":
        fit = fit_mlp(s.moments, layer, weights, "self", 16, forms.get("closed_form"))
        tensors, look = {"down": fit.down, "up": fit.up, "bias": fit.bias}, "self"
    else:
        fit = fit_heads(s.moments, layer, "previous")
        tensors, look = {"weight": fit.weight, "bias": fit.bias}, "previous"
    integers = quantize(tensors, 8)
    step = tensors["bias"] / integers["bias"].double()
    scale = quality_selections.comparable(s.moments, layer, block, look, integers, weights).double()
    assert float(step.max() / step.min()) > 1.5, "units must have been stored on different scales"
    ratio = scale / step
    assert float(ratio.max() / ratio.min()) < 1.25


def test_total_sparsity_counts_what_is_read(study):
    """Against a sum over every weight matrix, by hand."""
    s, point = study.selections, Point("predictor", "both", "0.5")
    hidden, ffn, heads, rank = 128, 512, 4, 8
    layers = []
    for i in range(3):
        layers.append(
            {
                "mlp": {"gated": True, "rows": 10, "units": ffn, "density": 0.3 + 0.1 * i, "hit": 10 * 32},
                "attention": {"gated": i != 0, "density": 0.25 if i else 1.0},
            }
        )
    read = 0.0
    for i in range(3):
        read += 2 * hidden * hidden  # K and V
        read += 2 * hidden * hidden * (0.25 if i else 1.0)
        read += hidden * ffn * (0.3 + 0.1 * i) + hidden * 32
        used = s.predictors[i, "mlp"].gate.tensors
        assert used["down"].shape == (rank, hidden)
        # bytes of int8 beside 16 bits
        read += (rank * hidden + ffn * rank) / 2 + (heads * hidden / 2 if i else 0)
    dense = 3 * (4 * hidden * hidden + 2 * hidden * ffn)
    found = s.densities(point, layers)
    assert found["total_sparsity"] == pytest.approx(1 - read / dense)
    assert (
        found["mlp_density"] == pytest.approx(0.4)
        and found["head_density"] == pytest.approx(0.5)
        and found["fc2_density"] == pytest.approx(32 / 10 / ffn * 10)
    )
    without = s.densities(Point("oracle", "both", "0.5"), layers)["total_sparsity"]
    assert without > found["total_sparsity"], "an oracle reads no predictor"


def test_tasks_score_what_they_say(study):
    tasks = {t.name: t for t in study.tasks}
    decode = study.tokenizer.decode
    lambada = tasks["lambada"].texts
    assert len(lambada) == 3 and all(
        decode(t.tokens[t.start :]) == " empty" and t.tokens[0] == BOS for t in lambada
    )
    assert all(decode(t.tokens[1 : t.start]).startswith("He said the old house by the") for t in lambada)
    blimp = tasks["blimp"]
    assert Counter(blimp.strata) == {"aa": 2, "ab": 2, "ba": 2} and len(blimp.texts) == 12
    assert decode(blimp.texts[0].tokens[1:]).endswith("sleep.") and decode(
        blimp.texts[1].tokens[1:]
    ).endswith("sleeps very.")
    assert all(t.start == 1 for t in blimp.texts)
    piqa = tasks["piqa"].texts
    assert decode(piqa[1].tokens[1 : piqa[1].start]).startswith("Question: open door") and decode(
        piqa[1].tokens[piqa[1].start :]
    ).startswith(" eat it")
    held = tasks["held"].texts
    assert all(len(t.tokens) == study.seq_len == 127 for t in held)
    long = qt.lambada_task([{"text": "word " * 300 + "end"}], study.tokenizer, BOS, 127).texts[0]
    assert len(long.tokens) == 127 and long.tokens[0] == BOS and decode(long.tokens[long.start :]) == " end"


def made_scores(*nlls, correct=None):
    return [
        Score(torch.tensor(n, dtype=torch.float64), torch.tensor(c))
        for n, c in zip(nlls, correct or [[True] * len(n) for n in nlls], strict=True)
    ]


def test_measures_against_made_up_scores(study):
    tasks = {t.name: t for t in study.tasks}
    scores = made_scores([1.0, 2.0], [1.0], [3.0], correct=[[True, False], [True], [False]])
    values = {name: m.values(scores).tolist() for name, m in tasks["lambada"].measures.items()}
    assert values == {"lambada": [0, 1, 0], "lambada_nll": [3, 1, 3]}
    good_bad = made_scores([1.0, 1.0], [3.0], [2.0], [1.5], *[[1.0]] * 8)
    assert tasks["blimp"].measures["blimp"].values(good_bad).tolist() == [1, 0, 0, 0, 0, 0]
    rows = [
        {"goal": "g", "sol1": "ab", "sol2": "abcdefgh", "label": 1},
        {"goal": "g", "sol1": "ab", "sol2": "cd", "label": 0},
    ]
    piqa = qt.piqa_task(rows, study.tokenizer, BOS, 127)
    ends = made_scores([2.0, 1.0], [4.0], [1.0], [2.0])
    assert piqa.measures["piqa"].values(ends).tolist() == [0, 1]
    # 3 / 3 characters with the space, against 4 / 9
    assert piqa.measures["piqa_norm"].values(ends).tolist() == [
        1,
        1,
    ]
    assert tasks["held"].measures["held"].values(made_scores([1.0, 3.0], [2.0, 2.0])).tolist() == [2, 2]


def test_subsamples_are_even_and_repeatable():
    rows = [(u, n) for u in "abc" for n in range(10)]
    chosen = qt.subsample(rows, 12, 0, lambda r: r[0])
    assert Counter(u for u, _ in chosen) == {"a": 4, "b": 4, "c": 4} and chosen == sorted(chosen)
    assert chosen == qt.subsample(rows, 12, 0, lambda r: r[0]) != qt.subsample(rows, 12, 1, lambda r: r[0])
    assert len(set(chosen)) == 12 and qt.subsample(rows, None, 0) == rows


def test_standard_errors_are_those_of_repeated_draws():
    g = torch.Generator().manual_seed(0)
    population = {"a": torch.rand(1000, generator=g), "b": 3 + 2 * torch.rand(1000, generator=g)}
    means, errors, plain = [], [], []
    for _ in range(400):
        values = torch.cat(
            [
                p[torch.randint(1000, (n,), generator=g)]
                for p, n in ((population["a"], 20), (population["b"], 20))
            ]
        )
        mean, se = qt.mean_se(values, ["a"] * 20 + ["b"] * 20)
        means.append(mean)
        errors.append(se)
        plain.append(qt.mean_se(values)[1])
    truth = float(torch.tensor(means, dtype=torch.float64).std())
    assert sum(errors) / 400 == pytest.approx(truth, rel=0.12)
    assert sum(plain) / 400 > 1.5 * truth, "without strata the difference between groups counts as error"
    assert qt.mean_se(torch.tensor([1.0, 2.0, 4.0]))[1] == pytest.approx(
        np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    )
    assert math.isnan(qt.mean_se(torch.tensor([1.0]))[1])


def test_differences_are_paired():
    dense = torch.tensor([2.0, 5.0, 9.0], dtype=torch.float64)
    found = qt.statistics(Measure("nll", lambda s: s), dense + torch.tensor([0.1, 0.2, 0.3]), dense)
    assert found["difference"] == pytest.approx(0.2) and found["difference_se"] == pytest.approx(
        0.1 / math.sqrt(3)
    )
    assert found["ppl_increase"] == pytest.approx(math.exp(0.2) - 1) and found[
        "ppl_increase_se"
    ] == pytest.approx(math.exp(0.2) * 0.1 / math.sqrt(3))
    assert found["value_se"] > 1 and found["perplexity"] == pytest.approx(math.exp(16.6 / 3))


def test_repetition_by_hand():
    assert qt.distinct([1, 2, 1, 2, 1], 2) == 2 / 4 and qt.distinct([1, 2, 3], 1) == 1
    assert 1 - qt.distinct([7] * 10, 4) == pytest.approx(6 / 7) and math.isnan(qt.distinct([1, 2], 3))
