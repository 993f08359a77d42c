"""Runs that start in the middle of a model, models spread over memory and disk, and the choice of operating
points.
"""

import itertools
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from vllm_dejavu.predictor_training.calibrate import (
    DENSITY_MULTIPLES,
    HEAD_DENSITIES,
    CalibrationSettings,
    Calibrator,
    Measurements,
    Point,
    _refined,
)
from vllm_dejavu.predictor_training.collect import Collector, Request, layer_lookahead
from vllm_dejavu.predictor_training.describe import describe
from vllm_dejavu.predictor_training.forms import FORMS
from vllm_dejavu.predictor_training.gates import Gate, make_head_gate, make_mlp_gate
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.masked import Masked
from vllm_dejavu.predictor_training.run_directory import RunDirectory
from vllm_dejavu.predictor_training.train import FittedLayer, LayerWeights, fit_heads, fit_mlp

LAYERS, FFN = 3, 256
VARIANTS = {
    "pre-LN": {},
    "post-LN": {"pre_ln": False},
    "projected": {"pre_ln": False, "embed_dim": 32},
    "no-bias": {"bias": False},
}
LOOKAHEAD = {"mlp": "self", "attention": "previous"}


@pytest.fixture(scope="module", params=VARIANTS)
def opt(request, tmp_path_factory):
    return HfModel(str(tiny.make_opt(tmp_path_factory.mktemp("opt"), **VARIANTS[request.param])))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return HfModel(str(tiny.make_opt(tmp_path_factory.mktemp("plain"))))


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, tiny.VOCAB, (12, 40), generator=torch.Generator().manual_seed(1))


def fit(opt, tokens, lookahead=LOOKAHEAD, rank=32):
    moments = Collector(opt, Request({b: (x,) for b, x in lookahead.items()}, range(LAYERS))).run(
        tokens, 5, progress=lambda n: None
    )
    return [
        FittedLayer(
            fit_mlp(moments, i, LayerWeights.of(opt, i), lookahead["mlp"], rank, FORMS["closed_form"]),
            fit_heads(moments, i, lookahead["attention"]),
        )
        for i in range(LAYERS)
    ]


def calibrator(opt, tokens, budget=0.05, measurements=None):
    settings = CalibrationSettings(LOOKAHEAD, budget, "int8", batch=5)
    return Calibrator(opt, fit(opt, tokens), tokens, settings, measurements)


def gates_of(opt, tokens, lookahead):
    """About half the neurons, and those heads whose score is above the layer's median."""
    gates = {}
    for i, (mlp, heads) in enumerate(fit(opt, tokens, lookahead)):
        look = {block: layer_lookahead(name, i) for block, name in lookahead.items()}
        gates[i, "mlp"] = make_mlp_gate(mlp, 0.3, look["mlp"], "float32")
        gates[i, "attention"] = make_head_gate(
            heads, float(heads.bias.mean()), 0.0, torch.zeros(2), look["attention"], "float32"
        )
    return gates


# Runs that start in the middle


@pytest.mark.parametrize("start", range(LAYERS + 1))
def test_nll_from_any_layer_is_the_whole_nll(opt, tokens, start):
    run = opt.start(tokens)
    for _ in range(start):
        run = opt.advance(run)
    assert run.layer == start
    assert torch.equal(opt.nll_from(run), opt.nll(tokens))


def test_nll_is_what_hugging_face_computes(opt, tokens):
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(
            opt.model(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
    assert torch.allclose(opt.nll(tokens), expected, atol=1e-4)


class Recorded(Masked):
    """A masked run that keeps what every gate selected."""

    def _mask(self, key, states, value, truth):
        mask = super()._mask(key, states, value, truth)
        if key in self.gates:
            self.__dict__.setdefault("masks", {}).setdefault(key, []).append(mask.clone())
        return mask


@pytest.mark.parametrize(
    "lookahead",
    [LOOKAHEAD, {"mlp": "previous", "attention": "previous"}, {"mlp": "attn_input", "attention": "self"}],
    ids=lambda x: "-".join(x.values()),
)
@pytest.mark.parametrize("start", range(LAYERS))
def test_a_gated_run_from_a_layer_is_the_whole_gated_run(opt, tokens, start, lookahead):
    """What `previous` names was computed before the run was cut, in another batch's midst; losses and every
    selection are the same.
    """
    gates = {k: g for k, g in gates_of(opt, tokens, lookahead).items() if k[0] >= start}
    runs = [opt.start(part) for part in tokens.split(5)]
    for _ in range(start):
        runs = [opt.advance(run) for run in runs]
    part, whole = Recorded(opt, gates), Recorded(opt, gates)
    assert part.nll_from(runs) == pytest.approx(whole.nll(tokens, 5), abs=1e-7)
    assert abs(part.nll_from(runs) - Masked(opt, {}).nll(tokens, 5)) > 1e-4, "the gates do nothing"
    assert part.masks.keys() == whole.masks.keys() == gates.keys()
    for key in gates:
        a, b = (torch.cat(r.masks[key][: len(runs)]) for r in (part, whole))
        assert torch.equal(a, b) and 0 < int(a.sum()) < a.numel()


def test_candidates_are_measured_as_in_a_run_of_their_own(plain, tokens):
    """Each from its own layer on, next to a dense front: the loss that a whole run has with that gate
    alone.
    """
    search = calibrator(plain, tokens)
    points = search.points()
    dense = Masked(plain, {}).nll(search.probe, 5)
    for key, candidates in points.items():
        point = candidates[len(candidates) // 2]
        if point.gate is not None:
            measured = Masked(plain, {key: point.gate}).nll(search.probe, 5)
            assert point.nats == pytest.approx(max(0.0, measured - dense), abs=1e-6), key
    for (layer, block), candidates in points.items():
        densities = [p.density for p in candidates]
        assert densities == sorted(densities, reverse=True) and candidates[0].gate is None
        assert all(p.gate.spec.lookahead == layer_lookahead(LOOKAHEAD[block], layer) for p in candidates[1:])


# Device maps


@pytest.fixture(scope="module")
def spread(plain, tmp_path_factory):
    """The same model with room for about a layer in memory; accelerate keeps the others on disk."""
    return HfModel(
        plain.name, "auto", offload=tmp_path_factory.mktemp("offload"), max_memory={"cpu": 450_000}
    )


class TestSpread:
    def test_some_of_it_is_on_disk(self, spread):
        places = set(spread.model.hf_device_map.values())
        assert "disk" in places and len(places) > 1
        assert any(p.device.type == "meta" for p in spread.model.parameters())

    def test_weights_are_found_wherever_they_are(self, spread, plain):
        assert spread.spec == plain.spec
        for layer, module, kind in itertools.product(
            range(LAYERS), ("fc1", "fc2", "self_attn.out_proj", "final_layer_norm"), ("weight", "bias")
        ):
            found = spread.weight(layer, module, kind)
            assert found.device.type == "cpu" and torch.equal(found, plain.weight(layer, module, kind))
        assert any(p.device.type == "meta" for p in spread.model.parameters()), (
            "looking must not load them for good"
        )

    def test_moments_and_losses_are_those_of_the_whole(self, spread, plain, tokens):
        made = [
            Collector(m, Request({b: (x,) for b, x in LOOKAHEAD.items()}, range(LAYERS))).run(
                tokens, 5, progress=lambda n: None
            )
            for m in (spread, plain)
        ]
        assert made[0].tensors.keys() == made[1].tensors.keys()
        assert all(
            torch.allclose(made[0].tensors[k], v, rtol=1e-9, atol=1e-9) for k, v in made[1].tensors.items()
        )
        run = spread.advance(spread.start(tokens))
        assert torch.allclose(spread.nll_from(run), plain.nll(tokens), atol=1e-6)
        gates = gates_of(plain, tokens, LOOKAHEAD)
        assert Masked(spread, gates).nll(tokens, 5) == pytest.approx(
            Masked(plain, gates).nll(tokens, 5), abs=1e-6
        )

    def test_a_biasless_layer(self, tmp_path):
        model = HfModel(
            str(tiny.make_opt(tmp_path / "m", bias=False)),
            "auto",
            offload=tmp_path / "o",
            max_memory={"cpu": 450_000},
        )
        assert {model.weight(i, "fc1", "bias") for i in range(LAYERS)} == {None}


def test_opening_the_run_directory_leaves_what_the_model_is_using(tmp_path):
    """Bug: a fresh run cleared `offload`, where accelerate had just put weights of a model too large for
    memory.
    """
    place = RunDirectory(tmp_path / "run")
    (place.path / "offload").mkdir(parents=True)
    (place.path / "offload" / "weights.dat").write_bytes(b"used")
    place.open({"a": 1}, restart=True, resume=False)
    assert (place.path / "offload" / "weights.dat").exists()
    place.close()
    assert not (place.path / "offload").exists()


# What gates select


class AtStart(Gate):
    """Selects everything in the first token of every window, and nothing anywhere else."""

    def scores(self, states, value):
        first = torch.zeros(len(value), value.shape[1] if self.block == "mlp" else 2)
        first[:: self.length] = 1.0
        return first - 0.5


def test_unions_leave_first_tokens_out(plain, tokens):
    """They are never decoded, and some models select almost everything in them."""
    gates = gates_of(plain, tokens, {"mlp": "self", "attention": "self"})
    planted = {k: AtStart(k[1], g.spec, g.tensors) for k, g in gates.items()}
    for gate in planted.values():
        gate.length = tokens.shape[1]
    specs, _ = describe(plain, planted, tokens, 5, seed=0)
    for spec in specs.values():
        assert spec.density["mean"] == pytest.approx(1 / tokens.shape[1], abs=1e-6)
        assert all(u == {"mean": 0.0, "upper": 0.0} for u in spec.union_density.values())


def test_union_of_one_row_is_the_density(plain, tokens):
    """Both are means over the same tokens but the first ones: 200 draws of 468 tokens, within four standard
    errors.
    """
    gates = gates_of(plain, tokens, LOOKAHEAD)
    specs, run = describe(plain, gates, tokens, 5, seed=0)
    for key, spec in specs.items():
        units = FFN if key[1] == "mlp" else 2
        later = torch.cat(run.counts[key]).view(tokens.shape)[:, 1:].flatten() / units
        assert spec.union_density["1"]["mean"] == pytest.approx(
            float(later.mean()), abs=4 * float(later.std()) / math.sqrt(200) + 1e-6
        )
        unions = [spec.union_density[str(b)]["mean"] for b in (1, 2, 4, 8, 16, 32, 64)]
        assert unions == sorted(unions) and len(torch.cat(run.rows[key])) == tokens[:, 1:].numel()


def test_rows_for_unions_come_from_all_of_the_text(plain, tokens):
    """No more than asked for, a share of every batch."""
    run = Masked(plain, gates_of(plain, tokens, LOOKAHEAD), measure=True, keep_rows=60)
    run.nll(tokens, 5)
    assert all([len(part) for part in parts] == [25, 25, 10] for parts in run.rows.values())


# The joint choice


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.1])
def test_the_joint_choice_obeys_its_budget_when_measured_afresh(plain, tokens, budget):
    gates, record = calibrator(plain, tokens, budget).run()
    rise = math.expm1(Masked(plain, gates).nll(tokens, 3) - Masked(plain, {}).nll(tokens, 3))
    assert rise <= budget + 1e-6 and record["ppl_increase"] == pytest.approx(rise, abs=1e-5)
    # Without any budget only what costs nothing: some masks lower the loss of a random model.
    assert gates or budget == 0


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """Layer 1 adds nothing to the residual stream: its fc2 and out_proj are zero."""
    directory = tiny.make_opt(tmp_path_factory.mktemp("free"))
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers.1." in name and (".fc2." in name or ".out_proj." in name):
            tensor.zero_()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return HfModel(str(directory))


def test_what_is_left_of_the_budget_is_spent_gate_by_gate():
    """The best bargain first; one that costs more together than alone is refused, and the next one tried."""
    keys = (0, "mlp"), (1, "mlp")
    points = {
        key: [
            Point(None, 1.0, 1.0, 0.0, "dense"),
            Point(None, 0.5, half, 0.01, "half"),
            Point(None, 0.2, 0.2, 0.9, "beyond the budget"),
        ]
        for key, half in zip(keys, (0.4, 0.6), strict=True)
    }
    dense = {key: points[key][0] for key in keys}
    asked = []

    def rise(choice):
        asked.append([p.label for p in choice.values()])
        return 0.5 if choice[keys[0]].label == "half" else 0.01 * sum(p.density < 1 for p in choice.values())

    chosen, nats = _refined(points, dense, 0.0, rise, budget=0.05)
    assert asked == [["half", "dense"], ["dense", "half"]]
    assert [p.label for p in chosen.values()] == ["dense", "half"] and nats == 0.01


def test_the_probe_is_from_all_of_the_text(plain):
    """Windows that follow each other may be of one document."""
    tokens = torch.arange(60)[:, None].expand(60, 512)
    assert Calibrator(plain, [], tokens, CalibrationSettings({}, 0.01, "int8", 4)).probe[:, 0].tolist() == [
        0,
        7,
        15,
        22,
        30,
        37,
        45,
        52,
    ]
    assert len(Calibrator(plain, [], tokens[:3], CalibrationSettings({}, 0.01, "int8", 4)).probe) == 3


@pytest.mark.parametrize("culprit", ["attention", "mlp"])
def test_blocks_that_only_seemed_to_cost_nothing_stay_dense(plain, tokens, culprit, monkeypatch):
    """Each alone cost nothing on the probe text; on all of it the gates of one kind exceed the budget, of
    which no step by step search would get to the others.
    """
    keys = [(layer, block) for layer in range(20) for block in ("mlp", "attention")]
    points = {
        key: [Point(None, 1.0, 1.0, 0.0, "dense"), Point(object(), 0.1, 0.1, 0.0, "sparse")] for key in keys
    }
    search = Calibrator(plain, [], tokens, CalibrationSettings({}, 0.01, "int8", 4))

    def nll(self, choice, tokens):
        return 3.0 + sum(p.density < 1 and block == culprit for (_, block), p in choice.items())

    monkeypatch.setattr(Calibrator, "_nll", nll)
    chosen, record = search._joint(points)
    assert {key for key, p in chosen.items() if p.label == "sparse"} == {k for k in keys if k[1] != culprit}
    assert record["ppl_increase"] == 0


@pytest.mark.parametrize("budget", [0.0, 0.02])
def test_what_costs_nothing_is_sparse_at_the_most_daring_density(free, tokens, budget):
    """Without being told which."""
    search = calibrator(free, tokens, budget)
    gates, record = search.run()
    assert {(1, "mlp"), (1, "attention")} <= gates.keys()
    seen = search.points()
    natural = seen[1, "mlp"][-1].density / DENSITY_MULTIPLES[-1]
    assert 0.05 < natural < 0.6
    for block, label, density in (
        ("mlp", f"{DENSITY_MULTIPLES[-1]:g} x natural", DENSITY_MULTIPLES[-1] * natural),
        ("attention", f"density {HEAD_DENSITIES[-1]:g}", HEAD_DENSITIES[-1]),
    ):
        last = record["points"][f"1.{block}"][-1]
        assert last[0] == label and last[2] == 0
        chosen = next(p for p in seen[1, block] if p.label == label)
        assert chosen.density == pytest.approx(density)
        assert all(torch.equal(gates[1, block].tensors[k], v) for k, v in chosen.gate.tensors.items())
    others = gates.keys() - {(1, "mlp"), (1, "attention")}
    assert len(others) < 4, "with a gate everywhere the test says nothing"


def test_the_curve_goes_from_careful_to_daring(plain, tokens):
    search = calibrator(plain, tokens, 0.1)
    _, record = search.run()
    curve = record["curve"]
    assert 2 < len(curve) <= 8
    for key in ("mlp_density", "attention_density", "bytes"):
        values = [p[key] for p in curve]
        assert values[-1] < values[0]
    assert [p["bytes"] for p in curve] == sorted((p["bytes"] for p in curve), reverse=True)
    assert curve[0]["ppl_increase"] < curve[-1]["ppl_increase"]
    assert all(0 < p[key] <= 1 for p in curve for key in ("mlp_density", "attention_density"))


def test_a_finished_measurement_is_not_made_again(plain, tokens, tmp_path, monkeypatch):
    """The state of another key is."""
    records = []
    first = calibrator(plain, tokens, 0.1, Measurements(tmp_path / "c.json", {"a": 1}, records.append)).run()
    assert len({r["measured"] for r in records}) == len(records) > 10
    calls = []
    nll, nll_from = Masked.nll, Masked.nll_from
    monkeypatch.setattr(Masked, "nll", lambda self, *a: calls.append(1) or nll(self, *a))
    monkeypatch.setattr(Masked, "nll_from", lambda self, *a: calls.append(1) or nll_from(self, *a))
    again = calibrator(plain, tokens, 0.1, Measurements(tmp_path / "c.json", {"a": 1})).run()
    assert not calls and again[1] == first[1] and again[0].keys() == first[0].keys()
    calibrator(plain, tokens, 0.1, Measurements(tmp_path / "c.json", {"a": 2})).run()
    assert len(calls) == len(records)
