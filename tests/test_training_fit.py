"""Moments and fits against plain least squares on stored activations; passes over the text; masked runs and
calibration.
"""

import pytest
import tiny
import torch

from vllm_dejavu.predictor_training.calibrate import CalibrationSettings, Calibrator, Measurements
from vllm_dejavu.predictor_training.collect import Collector, Request, layer_bytes, layer_lookahead, passes
from vllm_dejavu.predictor_training.describe import describe
from vllm_dejavu.predictor_training.forms import FORMS
from vllm_dejavu.predictor_training.gates import make_head_gate, make_mlp_gate
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.labels import Labels, head_contributions, head_grams
from vllm_dejavu.predictor_training.masked import Masked
from vllm_dejavu.predictor_training.train import FittedLayer, LayerWeights, fit_heads, fit_mlp

LOOKAHEADS = [("self", "self"), ("attn_input", "previous"), ("previous", "self")]
BOTH_SELF = {"mlp": "self", "attention": "self"}
CLOSED = FORMS["closed_form"]


@pytest.fixture(scope="module", params=[True, False], ids=["pre-LN", "post-LN"])
def opt(request, tmp_path_factory):
    return HfModel(str(tiny.make_opt(tmp_path_factory.mktemp("opt"), pre_ln=request.param)))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, tiny.VOCAB, (12, 40), generator=torch.Generator().manual_seed(1))


def collect(opt, tokens, lookahead=BOTH_SELF, layers=range(3), **options):
    request = Request({block: (name,) for block, name in lookahead.items()}, layers)
    return Collector(opt, request, **options).run(tokens, batch=5, progress=lambda n: None)


def stored(opt, tokens, lookahead):
    """What the pipeline never keeps: per layer all gate inputs, pre-activations and contributions."""
    out = [{"mlp_x": [], "z": [], "attn_x": [], "attn": []} for _ in opt.layers]

    def on_mlp(layer, states, z):
        out[layer]["mlp_x"].append(states.gate_input("mlp", layer_lookahead(lookahead["mlp"], layer)).clone())
        out[layer]["z"].append(z.clone())

    def on_attention(layer, states, attn):
        out[layer]["attn_x"].append(
            states.gate_input("attention", layer_lookahead(lookahead["attention"], layer)).clone()
        )
        out[layer]["attn"].append(attn.clone())

    with opt.observed(on_attention, on_mlp):
        opt.decoder(tokens)
    return [{k: torch.cat(v).double() for k, v in layer.items()} for layer in out]


@pytest.mark.parametrize(("mlp", "heads"), LOOKAHEADS, ids=[f"mlp-{m}-heads-{h}" for m, h in LOOKAHEADS])
def test_moments_and_fit_equal_least_squares_on_stored_activations(opt, tokens, tmp_path, mlp, heads):
    lookahead = {"mlp": mlp, "attention": heads}
    moments = collect(opt, tokens, lookahead, checkpoint=tmp_path / "m.safetensors")
    assert moments.num_tokens == tokens.numel()
    for i, (layer, s) in enumerate(zip(opt.layers, stored(opt, tokens, lookahead), strict=True)):
        fitted = fit_mlp(moments, i, LayerWeights.of(opt, i), mlp, opt.geometry.hidden_size, CLOSED)
        # Full rank: the regression is ordinary (ridge) least squares with intercept.
        x = torch.cat([s["mlp_x"], torch.ones(len(s["mlp_x"]), 1, dtype=torch.double)], 1)
        best = x @ torch.linalg.lstsq(x, s["z"]).solution
        predicted = in_units_of_z(fitted, s)
        error, floor = (predicted - s["z"]).pow(2).mean(), (best - s["z"]).pow(2).mean()
        assert error <= floor + 2e-3 * s["z"].var()
        if layer_lookahead(mlp, i) == "self":
            assert floor < 1e-8 and fitted.explained > 0.99
        assert torch.allclose(fitted.activation_rate, (s["z"] > 0).double().mean(0), atol=1e-12)
        assert fitted.down.norm(dim=1).sub(1).abs().max() < 1e-9

        head_fit = fit_heads(moments, i, heads)
        y = Labels().head_targets(s["attn"].float(), head_grams(layer.self_attn.out_proj.weight, 2)).double()
        x = torch.cat([s["attn_x"], torch.ones(len(y), 1, dtype=torch.double)], 1)
        floor = (x @ torch.linalg.lstsq(x, y).solution - y).pow(2).mean()
        left = s["attn_x"] @ head_fit.weight.T + head_fit.bias - y
        assert left.pow(2).mean() <= floor + 2e-2 * y.var()
        explained = 1 - left.pow(2).mean(0) / y.var(0, correction=0)
        assert torch.allclose(head_fit.r2, explained, atol=2e-2) and 0 < explained.min() < 0.999


def in_units_of_z(fitted, s):
    """Predictions of z: scores are z in units of a standard deviation of each neuron's own, found here by
    regression.

    A regression on the prediction has slope 1, so that scaling is cov(score, z) / var(score).
    """
    x = s["mlp_x"]
    scores = x @ fitted.down.T @ fitted.up.T + fitted.bias
    centred = scores - scores.mean(0)
    scale = (centred * s["z"]).sum(0) / (centred**2).sum(0)
    return scores * scale


def test_rank_trades_error_and_scores_are_in_residual_standard_deviations(opt, tokens):
    """z / std - score has a standard deviation of 1 for every neuron, std being that of what is left of z: so
    one margin serves all.
    """
    moments, s = collect(opt, tokens), stored(opt, tokens, BOTH_SELF)[1]
    errors = []
    for rank in (4, 16, 48):
        f = fit_mlp(moments, 1, LayerWeights.of(opt, 1), "self", rank, CLOSED)
        predicted = in_units_of_z(f, s)
        left = predicted - s["z"]
        scores = s["mlp_x"] @ f.down.T @ f.up.T + f.bias
        assert torch.allclose(left.std(0), (predicted.std(0) / scores.std(0)), rtol=0.05)
        assert left.mean(0).abs().max() < 1e-2
        errors.append(float(left.pow(2).mean()))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_masked_run_with_everything_selected_is_dense(opt, tokens, tmp_path):
    gates = gates_of(opt, tokens, tmp_path, margin=1e4, cut=-1e4)
    assert Masked(opt, gates).nll(tokens, 5) == pytest.approx(Masked(opt, {}).nll(tokens, 5), abs=1e-6)


def test_masks_take_effect_and_are_counted(opt, tokens, tmp_path):
    """Nothing selected: every block adds only its bias, and the counts say so."""
    gates = gates_of(opt, tokens, tmp_path, margin=-1e4, cut=1e4)
    run = Masked(opt, gates, measure=True)
    assert abs(run.nll(tokens, 5) - Masked(opt, {}).nll(tokens, 5)) > 1e-3
    assert all(int(torch.cat(c).sum()) == 0 for c in run.counts.values()) and not any(run.hit.values())
    assert all(run.active[key] > 0 for key in gates)


def test_describe_counts_what_a_stored_run_shows(opt, tokens, tmp_path):
    gates = {k: g for k, g in gates_of(opt, tokens, tmp_path, margin=0.0, cut=0.0).items() if k == (0, "mlp")}
    specs, _ = describe(opt, gates, tokens, 5, seed=0)
    s = stored(opt, tokens, BOTH_SELF)[0]
    selected = gates[0, "mlp"].predictor.scores(s["mlp_x"].float()) > 0
    truly = s["z"] > 0
    spec = specs[0, "mlp"]
    assert spec.density["mean"] == pytest.approx(float(selected.float().mean()), abs=1e-6)
    assert spec.oracle_density == pytest.approx(float(truly.float().mean()), abs=1e-6)
    assert spec.recall == pytest.approx(float((selected & truly).sum() / truly.sum()), abs=1e-6)
    unions = [spec.union_density[str(b)]["mean"] for b in (1, 2, 4, 8, 16, 32, 64)]
    assert unions == sorted(unions) and unions[0] == pytest.approx(spec.density["mean"], abs=0.05)
    assert specs[1, "mlp"].state == "dense" and specs[1, "mlp"].oracle_density > 0


@pytest.mark.parametrize("budget", [0.0, 0.01, 0.2])
def test_calibration_stays_inside_its_budget_and_uses_it(opt, tokens, tmp_path, budget):
    moments = collect(opt, tokens)
    fitted = [
        FittedLayer(
            fit_mlp(moments, i, LayerWeights.of(opt, i), "self", 32, CLOSED), fit_heads(moments, i, "self")
        )
        for i in range(3)
    ]
    gates, record = Calibrator(
        opt,
        fitted,
        tokens,
        CalibrationSettings(BOTH_SELF, budget, "float32", batch=5),
        Measurements(tmp_path / "c.json", {}),
    ).run()
    measured = Masked(opt, gates).nll(tokens, 5) - Masked(opt, {}).nll(tokens, 5)
    assert torch.tensor(measured).expm1() <= budget + 1e-6
    assert record["ppl_increase"] == pytest.approx(float(torch.tensor(measured).expm1()), abs=1e-5)
    if budget == 0.2:
        assert gates, "a generous budget must gate something"


def gates_of(opt, tokens, tmp_path, margin, cut):
    moments, gates = collect(opt, tokens), {}
    for i in range(3):
        fitted = fit_mlp(moments, i, LayerWeights.of(opt, i), "self", 16, CLOSED)
        gates[i, "mlp"] = make_mlp_gate(fitted, margin, "self", "float32")
        gates[i, "attention"] = make_head_gate(
            fit_heads(moments, i, "self"), cut, 0.0, torch.zeros(2), "self", "float32"
        )
    assert all(gate.spec.rank == (16 if block == "mlp" else 0) for (_, block), gate in gates.items())
    return gates


def test_contributions_are_what_dropping_a_head_removes(opt, tokens):
    """||W_h o_h|| really is the change of the attention block's output when head h is zeroed."""
    layer, s = opt.layers[0], stored(opt, tokens, BOTH_SELF)[0]
    attn, out_proj = s["attn"].float(), opt.layers[0].self_attn.out_proj
    norms = head_contributions(attn, head_grams(layer.self_attn.out_proj.weight, 2))
    for head in range(2):
        without = attn.clone()
        without[:, head] = 0
        change = (out_proj(attn.flatten(1)) - out_proj(without.flatten(1))).norm(dim=1)
        assert torch.allclose(norms[:, head], change, rtol=1e-3, atol=1e-4)


class TestPasses:
    """Layers in several passes over the text, so that their moments fit into memory."""

    @pytest.mark.parametrize("layers", [1, 2, 7, 64])
    @pytest.mark.parametrize("limit", [10, 19, 20, 25, 70, 10**6, None])
    def test_every_layer_once_and_each_pass_within_the_limit(self, layers, limit):
        found = passes(layers, 10, limit)
        assert [i for part in found for i in part] == list(range(layers))
        assert limit is None or all(10 * len(part) <= limit for part in found)
        fewest = 1 if limit is None else -(-layers // (limit // 10))
        assert len(found) == fewest and max(map(len, found)) - min(map(len, found)) < fewest

    def test_no_room_for_one_layer(self):
        with pytest.raises(
            ValueError, match="--max-memory 9 bytes cannot hold the moments of one layer, 10 bytes"
        ):
            passes(3, 10, 9)

    def test_opt_66b(self):
        """Two matrices of 9216^2 fp64 a layer: 1.36 GB, 87 GB for 64 layers; 32 GB hold 23 layers, so 3
        passes of 22, 22 and 20.
        """
        a_layer = layer_bytes(9216, 36864, 72, {"mlp": ("self",), "attention": ("previous",)})
        assert a_layer == pytest.approx(1.365e9, rel=1e-3) and 64 * a_layer == pytest.approx(87.4e9, rel=1e-3)
        assert [len(part) for part in passes(64, a_layer, 32 * 10**9)] == [22, 22, 20]

    @pytest.mark.parametrize(("mlp", "heads"), LOOKAHEADS, ids=[f"mlp-{m}-heads-{h}" for m, h in LOOKAHEADS])
    def test_a_layers_moments_take_what_was_said(self, opt, tokens, mlp, heads):
        """Bug: a vector too many was counted for every matrix of two inputs."""
        lookahead = {"mlp": mlp, "attention": heads}
        moments = collect(opt, tokens[:2], lookahead)
        stated = layer_bytes(64, 256, 2, {block: (name,) for block, name in lookahead.items()})
        for layer in (1, 2):
            assert sum(t.nbytes for t in moments.layer(layer).values()) == stated
        assert sum(t.nbytes for t in moments.layer(0).values()) <= stated

    def test_a_pass_over_some_layers_gives_theirs_and_runs_no_further(self, opt, tokens, monkeypatch):
        whole = collect(opt, tokens, {"mlp": "self", "attention": "previous"})
        run = []
        hooks = [
            layer.register_forward_hook(lambda *_, i=i: run.append(i)) for i, layer in enumerate(opt.layers)
        ]
        part = collect(opt, tokens, {"mlp": "self", "attention": "previous"}, range(1, 2))
        for hook in hooks:
            hook.remove()
        assert set(run) == {0, 1} and part.num_tokens == whole.num_tokens
        assert part.tensors.keys() == {f"layers.1.{name}" for name in whole.layer(1)}
        assert all(
            torch.equal(part.tensors[f"layers.1.{name}"], value) for name, value in whole.layer(1).items()
        )

    def test_moments_of_two_texts_add_up(self, opt, tokens):
        """What workers on parts of the text collect is what one would."""
        one, both = collect(opt, tokens), collect(opt, tokens[:7]) + collect(opt, tokens[7:])
        assert both.num_tokens == one.num_tokens
        assert all(torch.allclose(both.tensors[k], v, rtol=1e-5, atol=1e-4) for k, v in one.tensors.items())
