"""Moments and the closed form against plain least squares on stored activations."""
import pytest
import tiny
import torch

from vllm_dejavu.kernels import reference
from vllm_dejavu.predictor_training.calibrate import Calibrator, Masked, describe, make_head_gate, make_mlp_gate
from vllm_dejavu.predictor_training.collect import Collector, layer_lookahead
from vllm_dejavu.predictor_training.hf_opt import OptModel
from vllm_dejavu.predictor_training.labels import head_contributions, head_grams, log_contributions
from vllm_dejavu.predictor_training.train import fit_heads, fit_mlp

LOOKAHEADS = [("self", "self"), ("attn_input", "previous"), ("previous", "self")]


@pytest.fixture(scope="module", params=[True, False], ids=["pre-LN", "post-LN"])
def opt(request, tmp_path_factory):
    return OptModel(str(tiny.make_opt(tmp_path_factory.mktemp("opt"), pre_ln=request.param)))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, tiny.VOCAB, (12, 40), generator=torch.Generator().manual_seed(1))


def stored(opt, tokens, lookahead):
    """What the pipeline never keeps: per layer all gate inputs, pre-activations and contributions."""
    out = [{"mlp_x": [], "z": [], "attn_x": [], "attn": []} for _ in opt.layers]

    def on_mlp(layer, states, z):
        out[layer]["mlp_x"].append(states.gate_input("mlp", layer_lookahead(lookahead["mlp"], layer)).clone())
        out[layer]["z"].append(z.clone())

    def on_attention(layer, states, attn):
        out[layer]["attn_x"].append(states.gate_input("attention", layer_lookahead(lookahead["attention"], layer)).clone())
        out[layer]["attn"].append(attn.clone())

    with opt.observed(on_attention, on_mlp):
        opt.decoder(tokens)
    return [{k: torch.cat(v).double() for k, v in layer.items()} for layer in out]


@pytest.mark.parametrize(("mlp", "heads"), LOOKAHEADS, ids=[f"mlp-{m}-heads-{h}" for m, h in LOOKAHEADS])
def test_moments_and_fit_equal_least_squares_on_stored_activations(opt, tokens, tmp_path, mlp, heads):
    lookahead = {"mlp": mlp, "attention": heads}
    moments = Collector(opt, lookahead, tmp_path / "m.safetensors", {}).run(tokens, batch=5)
    assert moments.num_tokens == tokens.numel()
    for i, (layer, s) in enumerate(zip(opt.layers, stored(opt, tokens, lookahead), strict=True)):
        fitted = fit_mlp(moments, i, layer.fc1.weight.detach(), layer.fc1.bias.detach(), rank=opt.config.hidden_size)
        # Full rank: the regression is ordinary (ridge) least squares with intercept.
        x = torch.cat([s["mlp_x"], torch.ones(len(s["mlp_x"]), 1, dtype=torch.double)], 1)
        best = x @ torch.linalg.lstsq(x, s["z"]).solution
        scores = reference.low_rank_scores(s["mlp_x"].float(), fitted.down.float(), fitted.up.float(), fitted.bias.float())
        error, floor = (scores - s["z"]).pow(2).mean(), (best - s["z"]).pow(2).mean()
        assert error <= floor + 2e-3 * s["z"].var()
        if layer_lookahead(mlp, i) == "self":
            assert floor < 1e-8 and fitted.explained > 0.99
        assert torch.allclose(fitted.activation_rate, (s["z"] > 0).double().mean(0), atol=1e-12)

        head_fit = fit_heads(moments, i)
        y = log_contributions(s["attn"].float(), head_grams(layer.self_attn.out_proj.weight, 2)).double()
        x = torch.cat([s["attn_x"], torch.ones(len(y), 1, dtype=torch.double)], 1)
        floor = (x @ torch.linalg.lstsq(x, y).solution - y).pow(2).mean()
        error = (s["attn_x"] @ head_fit.weight.T + head_fit.bias - y).pow(2).mean()
        assert error <= floor + 2e-2 * y.var()


def test_rank_trades_error_and_residual_std_is_what_is_left(opt, tokens, tmp_path):
    lookahead = {"mlp": "self", "attention": "self"}
    moments = Collector(opt, lookahead, tmp_path / "m.safetensors", {}).run(tokens, batch=5)
    s, fc1 = stored(opt, tokens, lookahead)[1], opt.layers[1].fc1
    errors = []
    for rank in (4, 16, 48):
        f = fit_mlp(moments, 1, fc1.weight.detach(), fc1.bias.detach(), rank)
        left = reference.low_rank_scores(s["mlp_x"].float(), f.down.float(), f.up.float(), f.bias.float()) - s["z"]
        assert torch.allclose(left.std(0).double(), f.residual_std, rtol=0.1, atol=0.02)
        assert left.mean(0).abs().max() < 1e-3
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
    specs = describe(opt, gates, tokens, "float32", 5, seed=0)
    s = stored(opt, tokens, {"mlp": "self", "attention": "self"})[0]
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
    lookahead = {"mlp": "self", "attention": "self"}
    moments = Collector(opt, lookahead, tmp_path / "m.safetensors", {}).run(tokens, batch=5)
    mlp = [fit_mlp(moments, i, x.fc1.weight.detach(), x.fc1.bias.detach(), 32) for i, x in enumerate(opt.layers)]
    heads = [fit_heads(moments, i) for i in range(len(opt.layers))]
    gates, record = Calibrator(
        opt, mlp, heads, lookahead, tokens, budget=budget, dtype="float32", batch=5, state=tmp_path / "c.json", key={}
    ).run()
    measured = Masked(opt, gates).nll(tokens, 5) - Masked(opt, {}).nll(tokens, 5)
    assert torch.tensor(measured).expm1() <= budget + 1e-6
    assert record["ppl_increase"] == pytest.approx(float(torch.tensor(measured).expm1()), abs=1e-5)
    if budget == 0.2:
        assert gates, "a generous budget must gate something"


def gates_of(opt, tokens, tmp_path, margin, cut):
    lookahead = {"mlp": "self", "attention": "self"}
    moments = Collector(opt, lookahead, tmp_path / "g.safetensors", {}).run(tokens, batch=5)
    gates = {}
    for i, layer in enumerate(opt.layers):
        fitted = fit_mlp(moments, i, layer.fc1.weight.detach(), layer.fc1.bias.detach(), 16)
        gates[i, "mlp"] = make_mlp_gate(fitted, margin, "self", "float32")
        gates[i, "attention"] = make_head_gate(fit_heads(moments, i), cut, 0.0, torch.zeros(2), "self", "float32")
    return gates


def test_contributions_are_what_dropping_a_head_removes(opt, tokens):
    """||W_h o_h|| really is the change of the attention block's output when head h is zeroed."""
    layer, s = opt.layers[0], stored(opt, tokens, {"mlp": "self", "attention": "self"})[0]
    attn, out_proj = s["attn"].float(), opt.layers[0].self_attn.out_proj
    norms = head_contributions(attn, head_grams(layer.self_attn.out_proj.weight, 2))
    for head in range(2):
        without = attn.clone()
        without[:, head] = 0
        change = (out_proj(attn.flatten(1)) - out_proj(without.flatten(1))).norm(dim=1)
        assert torch.allclose(norms[:, head], change, rtol=1e-3, atol=1e-4)
