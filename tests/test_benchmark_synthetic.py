"""The benchmarks: synthetic predictors select what they are asked to; launches a layer and percentiles are
counted right.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import synthetic
import synthetic_rates
import synthetic_weights
import torch
from common import percentile
from kernel_flat import flat_reference as reference
from profile_step import kernels_of, launches_per_layer, summarize
from transformers import NemotronConfig, NemotronForCausalLM, OPTConfig, OPTForCausalLM

from vllm_dejavu import artifact
from vllm_dejavu.manifest import ModelSpec, check_model
from vllm_dejavu.predictor_training.pipeline import TrainConfig
from vllm_dejavu.published import GEOMETRIES, opt_geometry

SMALL = opt_geometry(256, num_heads=8, num_layers=2, vocab_size=64, max_positions=64)
PRESET = synthetic_rates.profile_of("1.3b")[0]
PROFILES = {"6.7b": {1: 0.10, 8: 0.29, 64: 0.62}, "30b": {1: 0.08, 8: 0.21, 64: 0.53}}


@pytest.mark.parametrize("name", PROFILES)
def test_fitted_rates_follow_the_profile(name):
    """Expected unions meet all three points; rates that are drawn have them too."""
    rates = synthetic_rates.fit_rates(PROFILES[name])
    p = rates.draw(50_000, synthetic_rates.numpy.random.default_rng(0))
    for batch, target in PROFILES[name].items():
        assert rates.union(batch) == pytest.approx(target, rel=0.01)
        assert (1 - (1 - p) ** batch).mean() == pytest.approx(target, rel=0.03)


def test_profiles_are_those_of_the_roofline_model():
    assert synthetic_rates.profile_of("6.7b")[:2] == (PROFILES["6.7b"], 0.5)
    assert synthetic_rates.profile_of("30b")[:2] == (PROFILES["30b"], 0.4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = synthetic.write_model(tmp_path_factory.mktemp("synthetic"), SMALL)
    return directory, synthetic.write_artifact(
        directory / "dejavu", SMALL, PROFILES["30b"], 0.4, synthetic.Recipe(rank=32)
    )


def test_artifact_loads_and_fits_its_model(written):
    directory, path = written
    loaded = artifact.load(path)
    check_model(loaded.manifest, ModelSpec.from_hf_config(OPTConfig.from_pretrained(directory), "small"))
    assert loaded.manifest.calibration["synthetic"] is True
    assert [layer["attention"].lookahead for layer in loaded.manifest.layers] == ["self", "previous"]


def test_the_predictor_selects_at_the_densities(written):
    """Over normalised inputs, one token and unions of 8; heads over the residual stream."""
    tokens = 1024
    x = torch.nn.functional.layer_norm(
        torch.randn(tokens, SMALL.hidden_size, generator=torch.Generator().manual_seed(1)),
        (SMALL.hidden_size,),
    )
    rows = torch.ones(tokens, dtype=torch.int32)
    loaded = artifact.load(written[1])
    for layer in range(SMALL.num_layers):
        _, t = loaded.gate(layer, "mlp")
        mask = reference.select(reference.low_rank_scores(x, t["down"], t["up"], t["bias"]), rows)
        assert mask.float().mean() == pytest.approx(0.08, rel=0.1)
        assert mask.view(-1, 8, SMALL.ffn_dim).any(dim=1).float().mean() == pytest.approx(0.21, rel=0.1)
        spec, t = loaded.gate(layer, "attention")
        inputs = x if spec.lookahead == "self" else x * synthetic_weights.RESIDUAL_STD
        assert (reference.linear_scores(inputs, t["weight"], t["bias"]) > 0).float().mean() == pytest.approx(
            0.4, rel=0.1
        )


def test_spread_varies_layers_around_the_profile(tmp_path):
    path = synthetic.write_artifact(
        tmp_path / "dejavu", SMALL, PROFILES["6.7b"], 0.5, synthetic.Recipe(rank=16, spread=0.5)
    )
    means = sorted(layer["mlp"].density["mean"] for layer in artifact.load(path).manifest.layers)
    assert means == pytest.approx([0.05, 0.15], rel=0.02)


class _Model(torch.nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.gates = [gate]


@pytest.mark.parametrize("scale", [0.7, 1.5])
def test_calibration_meets_the_density(written, scale):
    """Inputs of another scale than assumed: shifting the bias by what was counted brings the density back."""
    from types import SimpleNamespace

    spec, t = artifact.load(written[1]).gate(1, "mlp")
    x = scale * torch.randn(2048, SMALL.hidden_size, generator=torch.Generator().manual_seed(2))
    predictor = SimpleNamespace(bias=t["bias"].clone())
    model = _Model(SimpleNamespace(layer=0, block="mlp", spec=spec, units=SMALL.ffn_dim, predictor=predictor))

    def count():
        density = (reference.low_rank_scores(x, t["down"], t["up"], predictor.bias) > 0).float().mean()
        return [{"mlp": {"density": float(density), "rows": x.shape[0]}}]

    for _ in range(4):
        synthetic.calibrate(model, count(), tolerance=0.02)
    assert count()[0]["mlp"]["density"] == pytest.approx(spec.density["mean"], rel=0.1)


def test_percentile_interpolates():
    assert [percentile([4, 1, 2, 3], share) for share in (0, 0.5, 1)] == [1, 2.5, 4]


def test_launches_a_layer_are_counted_between_anchors():
    """Two steps of three layers of four kernels, with kernels around the layers that must not count."""
    layer = ["norm", "qkv", "_fc1_kernel", "_fc2_kernel"]
    names = (["embed", "norm"] + layer * 3 + ["norm", "lm_head"]) * 2
    assert launches_per_layer(names, 3, 2) == ("_fc1_kernel", 4)
    events = [{"ph": "X", "cat": "kernel", "name": n, "ts": 10 * i, "dur": 2} for i, n in enumerate(names)]
    host = {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 5}
    kernels = kernels_of({"traceEvents": [*reversed(events), host, {"ph": "M", "name": "meta"}]})
    assert [name for name, _, _ in kernels] == names
    rows = summarize(kernels, 3, 2)
    assert rows[-1]["launches_per_layer"] == 4 and rows[-1]["us_per_step"] == 2 * len(names) / 2


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
def test_scaled_profiles_are_profiles(density):
    """The first value is what was asked; unions grow with the batch, stay below 1, and rates can be fitted to
    them.
    """
    profile = synthetic_rates.scale_profile(PRESET, density)
    unions = list(profile.values())
    assert unions[0] == density and unions == sorted(unions) and unions[-1] < 1
    rates = synthetic_rates.fit_rates(profile)
    assert [rates.union(b) for b in profile] == pytest.approx(unions, rel=0.02)


def test_a_profile_scaled_to_itself():
    assert synthetic_rates.scale_profile(PRESET, PRESET[1]) == pytest.approx(PRESET)
    assert set(synthetic_rates.scale_profile(PRESET, 1.0).values()) == {1.0}


def test_what_was_asked_is_labelled():
    assert synthetic_rates.target("1.3b", None, None) == synthetic_rates.profile_of("1.3b")
    profile, heads, source = synthetic_rates.target("1.3b", 0.2, 1.0)
    assert (profile[1], heads) == (0.2, 1.0)
    assert "stands in" in source and "scaled to 0.2" in source and "heads 1 asked" in source


@pytest.mark.parametrize(("name", "rank"), [("1.3b", 192), ("2.7b", 240), ("125m", 192)])
def test_rank_is_that_of_training(name, rank):
    assert synthetic.rank_of(GEOMETRIES[name], TrainConfig("m", ("d",), "o").dtype) == rank


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return artifact.load(
        synthetic.write_artifact(
            tmp_path_factory.mktemp("int8") / "dejavu",
            SMALL,
            PRESET,
            0.5,
            synthetic.Recipe(rank=32, dtype="int8"),
        )
    )


def test_int8_predictors_select_at_the_densities(int8):
    x = torch.nn.functional.layer_norm(
        torch.randn(1024, SMALL.hidden_size, generator=torch.Generator().manual_seed(1)), (SMALL.hidden_size,)
    )
    for layer in range(SMALL.num_layers):
        spec, t = int8.gate(layer, "mlp")
        assert spec.dtype == "int8" and t["up"].dtype == torch.int8
        assert (
            reference.low_rank_scores(x, t["down"], t["up"], t["bias"]) > 0
        ).float().mean() == pytest.approx(0.1, rel=0.1)
        spec, t = int8.gate(layer, "attention")
        inputs = x * synthetic.INPUT_STD[spec.lookahead]
        assert (reference.linear_scores(inputs, t["weight"], t["bias"]) > 0).float().mean() == pytest.approx(
            0.5, rel=0.1
        )


@pytest.mark.parametrize("block", ["mlp", "attention"])
def test_calibration_of_int8_meets_the_density(int8, block):
    """Integers bring a step of their own for every unit: a shift of biases counts in these. Heads at 0.5 have
    a bias of 0.
    """
    spec, t = int8.gate(1, block)
    # inputs of another mean or scale than assumed, so that densities are off
    x = synthetic.INPUT_STD[spec.lookahead] * (
        1.5 * torch.randn(2048, SMALL.hidden_size, generator=torch.Generator().manual_seed(2))
    )
    predictor = SimpleNamespace(**{name: tensor.clone() for name, tensor in t.items()})
    if block == "attention":
        predictor.bias -= 40 * x.std() * predictor.weight.float().abs().mean()
    units = SMALL.ffn_dim if block == "mlp" else SMALL.num_heads
    model = SimpleNamespace(
        gates=[SimpleNamespace(layer=0, block=block, spec=spec, units=units, predictor=predictor)]
    )

    def count():
        if block == "mlp":
            scores = reference.low_rank_scores(x, predictor.down, predictor.up, predictor.bias)
        else:
            scores = reference.linear_scores(x, predictor.weight, predictor.bias)
        return [{block: {"density": float((scores > 0).float().mean()), "rows": x.shape[0]}}]

    assert abs(count()[0][block]["density"] / spec.density["mean"] - 1) > 0.2
    for _ in range(5):
        synthetic.calibrate(model, count(), tolerance=0.02)
    assert count()[0][block]["density"] == pytest.approx(spec.density["mean"], rel=0.1)


def test_density_one_predicts_nothing(tmp_path):
    """Gates are dense then, and the artifact holds no tensor for them."""
    mlp_only = artifact.load(
        synthetic.write_artifact(
            tmp_path / "mlp", SMALL, PRESET, 1.0, synthetic.Recipe(rank=16, dtype="int8")
        )
    )
    assert {layer["attention"].state for layer in mlp_only.manifest.layers} == {"dense"}
    assert not any("attention" in name for name in mlp_only.tensors)
    heads_only = artifact.load(
        synthetic.write_artifact(
            tmp_path / "heads",
            SMALL,
            synthetic_rates.scale_profile(PRESET, 1.0),
            0.5,
            synthetic.Recipe(rank=16),
        )
    )
    assert {(layer["mlp"].state, layer["attention"].state) for layer in heads_only.manifest.layers} == {
        ("dense", "sparse")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiled_weights_are_random_enough(dtype):
    """Mean, spread, and no two rows alike, within a matrix longer than the tile and between two of them."""
    normals = synthetic_weights._Normals(0)
    # the first decides on the small tile
    first, second = (
        torch.empty(160, 320, dtype=dtype),
        torch.empty(1000, 320, dtype=dtype),
    )
    for p in (first, second):
        normals.fill(p, 0.02)
    assert second.numel() > 4 * synthetic_weights.TILES[0]
    assert float(second.float().mean()) == pytest.approx(0, abs=1e-3) and float(
        second.float().std()
    ) == pytest.approx(0.02, rel=0.02)
    rows = torch.nn.functional.normalize(torch.cat([first, second]).float(), dim=1)
    assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 0.4


def test_true_rates(tmp_path):
    """fc1's biases bring each neuron out as often as its gate selects it; one that always fires has a finite
    one.
    """
    recipe = synthetic.Recipe("small", rank=16)
    rates = synthetic_weights.rates_of(synthetic.write_artifact(tmp_path, SMALL, PRESET, 0.5, recipe))
    assert len(rates) == SMALL.num_layers and any(bool((rate == 1).any()) for rate in rates)
    model = OPTForCausalLM(OPTConfig(**synthetic.hf_config(SMALL)))
    synthetic_weights.init_weights(model, rates=rates)
    generator = torch.Generator().manual_seed(0)
    for rate, layer in zip(rates, model.model.decoder.layers, strict=True):
        bias = layer.fc1.bias
        assert bias.isfinite().all()
        out = torch.randn(4000, 1, generator=generator) + bias  # what fc1 gives, of standard deviation 1
        assert torch.allclose((out > 0).float().mean(0), rate, atol=0.04)


RELU2 = replace(SMALL, num_heads=4, num_kv_heads=2, head_size=64, activation="relu2")


def test_a_nemotron(tmp_path):
    """Its artifact fits it, and without biases what a token selects comes out positive."""
    directory = synthetic.write_model(tmp_path, RELU2)
    path = synthetic.write_artifact(
        directory / "dejavu", RELU2, PRESET, 1.0, synthetic.Recipe(rank=32, dtype="int8")
    )
    config = NemotronConfig.from_pretrained(directory)
    loaded = artifact.load(path)
    check_model(loaded.manifest, ModelSpec.from_hf_config(config, "small"))
    fc1 = synthetic_weights.fc1_of(path)
    model = NemotronForCausalLM(config)
    synthetic_weights.init_weights(model, fc1=fc1)
    assert all(bool((p == 0).all()) for name, p in model.named_parameters() if "norm" in name)
    x = torch.nn.functional.layer_norm(
        torch.randn(512, RELU2.hidden_size, generator=torch.Generator().manual_seed(1)), (RELU2.hidden_size,)
    )
    for i, layer in enumerate(model.model.layers):
        _, t = loaded.gate(i, "mlp")
        selected = reference.low_rank_scores(x, t["down"], t["up"], t["bias"]) > 0
        out = x @ layer.mlp.up_proj.weight.T
        assert 0.05 < selected.float().mean() < 0.2 and (out > 0).float().mean() == pytest.approx(
            0.5, abs=0.05
        )
        # but for the half of the times of neurons that every token selects
        often = selected.float().mean(0) > 0.5
        assert (out[:, ~often][selected[:, ~often]] > 0).all()
        weight, scale = (
            torch.empty(RELU2.ffn_dim, RELU2.hidden_size, dtype=torch.int8),
            torch.empty(RELU2.ffn_dim, 1),
        )
        synthetic_weights._fill_fc1(weight, scale, fc1[i])
        assert torch.allclose(weight.float() * scale, layer.mlp.up_proj.weight, atol=float(scale.max()) / 2)
