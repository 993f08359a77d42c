"""The benchmarks: synthetic predictors select what they are asked to; launches a layer and percentiles are
counted right.
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig

from vllm_dejavu import artifact
from vllm_dejavu.kernels import reference

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import synthetic  # noqa: E402
from common import percentile  # noqa: E402
from profile_step import kernels_of, launches_per_layer, summarize  # noqa: E402

from vllm_dejavu.manifest import ModelSpec, check_model  # noqa: E402
from vllm_dejavu.roofline import Geometry  # noqa: E402

SMALL = Geometry("small", hidden=256, num_heads=8, num_layers=2, vocab=64, positions=66)
PROFILES = {"6.7b": {1: 0.10, 8: 0.29, 64: 0.62}, "30b": {1: 0.08, 8: 0.21, 64: 0.53}}


@pytest.mark.parametrize("name", PROFILES)
def test_fitted_rates_follow_the_profile(name):
    """Expected unions meet all three points; rates that are drawn have them too."""
    rates = synthetic.fit_rates(PROFILES[name])
    p = rates.draw(50_000, synthetic.numpy.random.default_rng(0))
    for batch, target in PROFILES[name].items():
        assert rates.union(batch) == pytest.approx(target, rel=0.01)
        assert (1 - (1 - p) ** batch).mean() == pytest.approx(target, rel=0.03)


def test_profiles_are_those_of_the_roofline_model():
    assert synthetic.profile_of("6.7b")[:2] == (PROFILES["6.7b"], 0.5)
    assert synthetic.profile_of("30b")[:2] == (PROFILES["30b"], 0.4)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = synthetic.write_model(tmp_path_factory.mktemp("synthetic"), SMALL)
    return directory, synthetic.write_artifact(directory / "dejavu", SMALL, PROFILES["30b"], 0.4, rank=32)


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
        torch.randn(tokens, SMALL.hidden, generator=torch.Generator().manual_seed(1)), (SMALL.hidden,)
    )
    rows = torch.ones(tokens, dtype=torch.int32)
    loaded = artifact.load(written[1])
    for layer in range(SMALL.num_layers):
        _, t = loaded.gate(layer, "mlp")
        mask = reference.select(reference.low_rank_scores(x, t["down"], t["up"], t["bias"]), rows)
        assert mask.float().mean() == pytest.approx(0.08, rel=0.1)
        assert mask.view(-1, 8, SMALL.ffn).any(dim=1).float().mean() == pytest.approx(0.21, rel=0.1)
        spec, t = loaded.gate(layer, "attention")
        inputs = x if spec.lookahead == "self" else x * synthetic.RESIDUAL_STD
        assert (reference.linear_scores(inputs, t["weight"], t["bias"]) > 0).float().mean() == pytest.approx(
            0.4, rel=0.1
        )


def test_spread_varies_layers_around_the_profile(tmp_path):
    path = synthetic.write_artifact(tmp_path / "dejavu", SMALL, PROFILES["6.7b"], 0.5, rank=16, spread=0.5)
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
    x = scale * torch.randn(2048, SMALL.hidden, generator=torch.Generator().manual_seed(2))
    predictor = SimpleNamespace(bias=t["bias"].clone())
    model = _Model(SimpleNamespace(layer=0, block="mlp", spec=spec, units=SMALL.ffn, predictor=predictor))

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
