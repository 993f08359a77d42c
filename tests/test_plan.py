"""`vllm-dejavu plan`: bytes by hand, an artifact's densities, the break-even, refusals, the command line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dejavu import artifact, cli, plan
from vllm_dejavu.manifest import MANIFEST_FILE, GateSpec, ModelSpec
from vllm_dejavu.predictor_training import pipeline
from vllm_dejavu.published import DEVICES, GEOMETRIES, opt_geometry
from vllm_dejavu.roofline import DENSE_LAUNCHES, Device, Workload, account

BOOKS = str(Path(__file__).parent.parent / "examples" / "opt-books-7m")
TINY = opt_geometry(8, num_heads=2, num_layers=2, vocab_size=10, max_positions=4)
TINY_SPEC = ModelSpec("tiny", "OPTForCausalLM", 2, 8, 32, 2, 2, 4, "relu", False, "pre", "")
SLOW = Device("slow", bandwidth_gbs=1, memory_gb=1, link_gbs=1, launch_us=2, all_reduce_us=5)
DENSE = GateSpec(state="dense")


def mlp(
    density: float, rank: int = 1, lookahead: str = "self", dtype: str = "float16", **union: float
) -> GateSpec:
    sizes = {size.removeprefix("at"): {"mean": share, "upper": 1.0} for size, share in union.items()}
    return GateSpec("sparse", "low_rank", lookahead, rank, dtype, {"mean": density, "upper": 1.0}, sizes)


def heads(density: float, lookahead: str = "self", **union: float) -> GateSpec:
    return replace(mlp(density, 0, lookahead, **union), form="linear")


def predicted(model: str, gpu: str = "h200", **point) -> dict:
    return plan.plan(model, gpu, **point)


# Model, densities.


@pytest.mark.parametrize("name", ["6.7b", "opt-6.7b", "OPT-6.7B", *GEOMETRIES])
def test_sizes_need_no_hub(name):
    geometry, spec = plan.find_model(name)
    assert geometry == GEOMETRIES[name.lower().removeprefix("opt-")]
    assert (spec.hidden_size, spec.num_layers, spec.activation) == (
        geometry.hidden_size,
        geometry.num_layers,
        "relu",
    )


@pytest.mark.parametrize(
    ("name", "batch", "density", "head_density"),
    [
        ("6.7b", 1, 0.10, 0.5),
        ("6.7b", 8, 0.29, 0.5),
        ("6.7b", 64, 0.62, 0.5),
        ("30b", 1, 0.08, 0.4),
        ("30b", 8, 0.21, 0.4),
        ("30b", 64, 0.53, 0.4),
    ],
)
def test_assumed_densities_are_the_goals(name, batch, density, head_density):
    densities = predicted(name, batch=batch)["densities"]
    assert "no artifact" in densities["from"] and "assumed" in densities["from"]
    assert (densities["mlp_mean"], densities["head_mean"]) == pytest.approx((density, head_density))
    assert densities["head_union_mean"] == pytest.approx(1 - (1 - head_density) ** batch)


def test_assumed_densities_are_those_of_the_nearest_size():
    for hidden, name in ((4352, "6.7b"), (7680, "30b")):
        layers, source = plan.assumed_layers(opt_geometry(hidden, 64, 2), 4)
        assert f"nearest size {name}" in source and "interpolated" in source and len(layers) == 2
        assert (
            layers[0]["mlp"].union_density
            == plan.assumed_layers(GEOMETRIES[name], 4)[0][0]["mlp"].union_density
        )


def test_a_small_model_without_an_artifact_is_said_to_be_unsupported(opt):
    assert (
        "unsupported by any measurement of a model this small"
        in predicted(str(opt()), context=64)["densities"]["from"]
    )
    assert "unsupported" not in predicted("1.3b")["densities"]["from"]


@pytest.mark.parametrize(
    ("gate", "batch", "expected"),
    [
        (mlp(0.1, at1=0.3, at4=0.4), 1, 0.1),
        (mlp(0.1, at4=0.4, at16=0.6), 4, 0.4),
        (mlp(0.1, at4=0.4, at16=0.6), 2, 0.25),
        (mlp(0.1, at4=0.4, at16=0.6), 8, 0.5),
        (mlp(0.1, at4=0.4, at16=0.6), 32, 1 - 0.4**2),
        (mlp(0.1), 3, 1 - 0.9**3),
        (DENSE, 8, 1.0),
    ],
    ids=[
        "one-row-is-the-density",
        "calibrated",
        "below-the-first",
        "between",
        "beyond",
        "none-calibrated",
        "dense",
    ],
)
def test_density_at_a_batch(gate, batch, expected):
    assert gate.density_at(batch) == pytest.approx(expected)


def test_an_artifacts_densities_are_taken_layer_by_layer():
    manifest, _ = artifact.load_manifest(Path(BOOKS) / "dejavu")
    result = predicted(BOOKS, batch=8)
    expected = [
        layer["mlp"].union_density["8"]["mean"] if layer["mlp"].sparse else 1.0 for layer in manifest.layers
    ]
    workloads = plan.layer_workloads(manifest.layers, 8, 256, 1)
    assert [w.mlp_density for w in workloads] == pytest.approx(expected)
    assert result["densities"]["mlp_mean"] == pytest.approx(sum(expected) / len(expected))
    assert result["densities"]["from"].endswith("dejavu, calibrated")
    for w, layer in zip(workloads, manifest.layers, strict=True):
        assert w.predictor_rank == layer["mlp"].rank
        assert (w.head_density < 1) == layer["attention"].sparse
    geometry, _ = plan.find_model(BOOKS)
    accounts = [account(geometry, DEVICES["h200"], w) for w in workloads]
    step_us = sum(a.sparse_us for a in accounts) + accounts[0].outer_us
    assert result["step"]["sparse_ms"] * 1e3 == pytest.approx(step_us)


def test_a_batch_beyond_the_calibrated_is_noted():
    assert not predicted(BOOKS, batch=64)["notes"]
    assert any("beyond the largest calibrated (64)" in note for note in predicted(BOOKS, batch=128)["notes"])


# Gain.


def test_a_step_by_hand():
    """A dense layer, then a gated one, 2 sequences of 3 tokens: the bytes of test_roofline, fc2
    read for all selected.
    """
    layers = [
        {"mlp": DENSE, "attention": DENSE},
        {"mlp": mlp(0.1, at2=0.25), "attention": heads(0.5, at2=0.75)},
    ]
    step = plan.decode_step(TINY, SLOW, plan.layer_workloads(layers, 2, 3, 1))
    dense_us, outer_us = 1.792 + 10 * 2, 0.224 + 5 * 2
    sparse_us = (352 + 64 + 96 + 96 + 128 + 128 + 112) / 1e3 + 11 * 2
    assert step.dense_us == pytest.approx(2 * dense_us + outer_us)
    assert step.sparse_us == pytest.approx(dense_us + sparse_us + outer_us)
    assert step.sparse_terms_us["launches"] == 20 + 22


@pytest.mark.parametrize(
    ("before", "here", "launches"),
    [
        ((DENSE, DENSE), (DENSE, DENSE), 10),
        ((DENSE, DENSE), (mlp(0.1), DENSE), 11),
        ((DENSE, DENSE), (DENSE, heads(0.5)), 10),
        ((mlp(0.1), DENSE), (mlp(0.1), heads(0.5)), 11),
        ((mlp(0.1), DENSE), (mlp(0.1), heads(0.5, "previous")), 10),
        ((DENSE, DENSE), (mlp(0.1), heads(0.5, "previous")), 11),
        ((mlp(0.1, lookahead="attn_input"), DENSE), (mlp(0.1), heads(0.5, "previous")), 11),
    ],
    ids=[
        "dense",
        "mlp",
        "heads",
        "scores-alone",
        "scores-ride",
        "nothing-to-ride-on",
        "rides-with-self-only",
    ],
)
def test_launches_follow_the_gates(before, here, launches):
    layers = [{"mlp": m, "attention": a} for m, a in (before, here)]
    assert plan.layer_workloads(layers, 1, 1, 1)[1].sparse_launches == launches
    assert plan.layer_workloads([{"mlp": DENSE, "attention": DENSE}], 1, 1, 1)[0].sparse_launches == len(
        DENSE_LAUNCHES
    )


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize("name", ["6.7b", "30b"])
def test_no_gain_at_the_break_even_density(name, batch, tp):
    """Heads dense, so that it lies inside (0, 1); the account of that very density has speed-up 1."""
    geometry, device = GEOMETRIES[name], DEVICES["a100"]
    layers = [{"mlp": mlp(0.2, rank=192), "attention": DENSE}] * geometry.num_layers
    workloads = plan.layer_workloads(layers, batch, 256, tp)
    density = plan.break_even(geometry, device, layers, workloads)
    assert 0.5 < density < 1
    at = replace(workloads[0], mlp_density=density)
    assert account(geometry, device, at).speedup == pytest.approx(1, abs=0.01)
    assert (
        account(geometry, device, replace(at, mlp_density=density - 0.1)).speedup
        > 1
        > account(geometry, device, replace(at, mlp_density=1)).speedup
    )


def test_gates_as_training_makes_them_by_default():
    """Head scores ride along (10 launches) but in layer 0, which has no layer before it; int8, at the rank
    the same bytes allow.
    """
    layers, _ = plan.assumed_layers(GEOMETRIES["6.7b"], 1)
    assert [w.sparse_launches for w in plan.layer_workloads(layers, 1, 256, 1)] == [11] + [10] * 31
    assert {(gate.dtype, gate.rank) for layer in layers for gate in layer.values()} == {
        ("int8", 384),
        ("int8", 0),
    }
    assert [layer["attention"].lookahead for layer in layers] == ["self"] + ["previous"] * 31
    assert predicted("6.7b")["step"]["sparse_launches_per_layer"] == pytest.approx((11 + 31 * 10) / 32)


def test_break_even_where_there_is_none():
    dense = [{"mlp": DENSE, "attention": DENSE}] * 2
    assert plan.break_even(TINY, SLOW, dense, plan.layer_workloads(dense, 1, 1, 1)) is None
    # One more launch of 2 us, and the whole layer reads in less.
    launches = [{"mlp": mlp(0.1), "attention": DENSE}] * 2
    assert plan.break_even(TINY, SLOW, launches, plan.layer_workloads(launches, 1, 1, 1)) < 0


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_beside_it(bits):
    """Every layer of the step in fewer bits, dense and sparse, at the same densities."""
    result = predicted("30b", batch=8)
    layers, _ = plan.assumed_layers(GEOMETRIES["30b"], 8)
    small = [
        replace(w, dense_weight_bits=bits, sparse_weight_bits=bits)
        for w in plan.layer_workloads(layers, 8, 256, 1)
    ]
    accounts = [account(GEOMETRIES["30b"], DEVICES["h200"], w) for w in small]
    beside = result["step"][f"int{bits}"]
    for side in ("dense", "sparse"):
        step_us = sum(getattr(a, f"{side}_us") for a in accounts) + accounts[0].outer_us
        assert beside[f"{side}_ms"] * 1e3 == pytest.approx(step_us)
    assert beside["sparse_ms"] < result["step"]["sparse_ms"]
    beside["dense_ms"] = result["step"]["sparse_ms"] / 1.25
    assert f"dense INT{bits} {beside['dense_ms']:.2f} ms, 1.25x as fast as sparse 16-bit" in plan.report(
        result
    )
    beside["dense_ms"] = 2 * result["step"]["sparse_ms"]
    assert "2.00x the time of sparse 16-bit" in plan.report(result)


def test_gain_grows_with_the_byte_share_of_what_is_skipped():
    assert (
        predicted("30b")["step"]["speedup"]
        > predicted("6.7b")["step"]["speedup"]
        > predicted("6.7b", batch=64)["step"]["speedup"]
        > 1
    )
    assert predicted("6.7b")["step"]["dominant"] == "launches"
    assert predicted("30b", batch=64, context=1920)["step"]["dominant"] == "KV read"


# Memory.


def test_predictor_bytes_by_hand():
    """MLP: down 8 + up 32 of 2 bytes, bias and rate of 4; heads: 2 x 8 of 2 bytes, bias and rate. Each rank
    has all of down.
    """
    layers = [{"mlp": mlp(0.1), "attention": heads(0.5)}, {"mlp": DENSE, "attention": DENSE}]
    assert plan.predictor_bytes(layers, TINY_SPEC) == (16 + 64 + 256) + (32 + 16)
    assert plan.predictor_bytes(layers, TINY_SPEC, tp=2) == 16 + (64 + 256 + 32 + 16) // 2
    wide = [{"mlp": mlp(0.1, rank=3, dtype="float32"), "attention": DENSE}]
    assert plan.predictor_bytes(wide, TINY_SPEC) == 4 * 3 * (8 + 32) + 256


def test_memory_cost_by_hand():
    memory = predicted("6.7b")["memory"]
    mlp_bytes, head_bytes = 384 * (4096 + 16384) + 2 * 4 * 16384, 32 * 4096 + 2 * 4 * 32  # integers of a byte
    assert memory["predictor_bytes"] == 32 * (mlp_bytes + head_bytes)
    assert memory["kv_bytes_per_token"] == 2 * 2 * 4096 * 32
    assert memory["kv_tokens_displaced"] == math.ceil(
        memory["predictor_bytes"] / memory["kv_bytes_per_token"]
    )
    assert memory["share_of_weights"] == pytest.approx(memory["predictor_bytes"] / 13.3e9, rel=0.01)


def test_an_artifacts_bytes_are_those_of_its_tensors():
    loaded = artifact.load(Path(BOOKS) / "dejavu")
    assert predicted(BOOKS)["memory"]["predictor_bytes"] == sum(
        t.numel() * t.element_size() for t in loaded.tensors.values()
    )


def test_what_does_not_fit_is_noted():
    notes = " ".join(predicted("30b", batch=64, context=1920)["notes"])
    assert "DOES NOT FIT: 230 of 141 GB" in notes
    assert predicted("30b", tp=2)["memory"]["fits"]


# Against training, from which plan may not import, so it repeats what is default there.


def test_defaults_are_those_of_training():
    default = pipeline.TrainConfig("m", ("d",), "o")
    assert (plan.PREDICTOR_DTYPE, plan.HEAD_LOOKAHEAD) == (default.dtype, default.head_lookahead)
    assert default.mlp_lookahead == "self"


# Refusals and the command.


def refused(argv: list[str], capsys) -> str:
    assert cli.main(["plan", *argv]) == 1
    return capsys.readouterr().err


def edited(directory: Path, **fields) -> str:
    config = json.loads((Path(BOOKS) / "config.json").read_text(encoding="utf-8")) | fields
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(directory)


def test_an_unknown_gpu_names_the_allowed():
    with pytest.raises(ValueError, match="'v100' is unknown") as error:
        plan.plan("6.7b", "v100")
    assert all(name in str(error.value) for name in DEVICES)
    assert predicted("6.7b", "MI300X")["gpu"] == "MI300X"


@pytest.mark.parametrize("model", ["nonsense", "./nowhere/at-all", "a/b/c"])
def test_an_unknown_model_names_the_known_sizes(model, capsys):
    said = refused([model, "--gpu", "h100"], capsys)
    assert "no such directory, not a hub id (ORG/NAME)" in said and "6.7b" in said


def test_a_model_the_hub_does_not_give(capsys):
    assert "the hub gave no config" in refused(["org/not-there", "--gpu", "h100"], capsys)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"activation_function": "gelu"}, "needs an activation that is exactly 0"),
        ({"architectures": ["LlamaForCausalLM"]}, "supports the architectures"),
    ],
    ids=["gelu", "architecture"],
)
def test_models_that_would_not_be_served(fields, said, tmp_path, capsys):
    assert said in refused([edited(tmp_path, **fields), "--gpu", "h100"], capsys)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["6.7b", "--context", "4096"], "beyond the 2048 positions"),
        (["6.7b", "--batch", "0"], "at least 1"),
        (["6.7b", "--tp", "3"], "tp=3 does not divide"),
        (["6.7b", "--predictor", f"{BOOKS}/dejavu"], "num_layers=6"),
        (["6.7b", "--predictor", "./nowhere"], "No predictor artifact at ./nowhere"),
    ],
    ids=["context", "batch", "tp", "other-model", "no-artifact"],
)
def test_points_that_are_refused(argv, said, capsys):
    assert said in refused([*argv, "--gpu", "h100"], capsys)


def test_an_mlp_of_another_width_is_planned_with_it(tmp_path):
    """ffn was once taken as 4 x hidden."""
    narrow = predicted(edited(tmp_path, ffn_dim=512), predictor=None)
    usual = predicted(edited(tmp_path), predictor=None)
    assert narrow["memory"]["weight_bytes"] == usual["memory"]["weight_bytes"] - 2 * 6 * 2 * 256 * 512
    assert narrow["step"]["dense_ms"] < usual["step"]["dense_ms"]


def test_a_directory_without_a_model(tmp_path, capsys):
    assert "has no config.json" in refused([str(tmp_path), "--gpu", "h100"], capsys)


def test_a_damaged_artifact_is_not_passed_over(tmp_path, capsys):
    model = edited(tmp_path)
    assert "no artifact at" in predicted(model)["densities"]["from"]
    (tmp_path / "dejavu").mkdir()
    (tmp_path / "dejavu" / MANIFEST_FILE).write_text("{", encoding="utf-8")
    assert "cannot be read as JSON" in refused([model, "--gpu", "h100"], capsys)


def test_the_command_end_to_end(capsys):
    assert cli.main(["plan", BOOKS, "--gpu", "H100", "--batch", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("MODEL, not a measurement") and "on H100 SXM, batch 8" in out
    for part in (
        "predicted gain",
        "modelled, not measured",
        "break-even",
        "memory cost",
        "calibrated",
    ):
        assert part in out, part
    assert cli.main(["plan", "6.7b", "--gpu", "h100", "--predictor", f"{BOOKS}/none"]) == 1


def test_json_says_the_same(capsys):
    assert cli.main(["plan", BOOKS, "--gpu", "h100", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == predicted(BOOKS, "h100") and result["banner"].startswith("MODEL")


@pytest.mark.parametrize(
    ("density", "said"),
    [
        (None, "no MLP is gated"),
        (1.2, "faster at any"),
        (-0.1, "small enough"),
        (0.5, "above MLP density 0.50"),
    ],
)
def test_break_even_in_words(density, said):
    result = predicted("6.7b")
    result["step"]["break_even_mlp_density"] = density
    assert said in plan.report(result)


def test_a_slower_model_is_called_slower():
    result = predicted("6.7b")
    result["step"]["speedup"] = 0.9
    assert "0.90x: slower than dense" in plan.report(result)


def test_workload_defaults_stay_out_of_the_way():
    """plan says every density itself; the workload's defaults are examples."""
    (work,) = plan.layer_workloads([{"mlp": DENSE, "attention": DENSE}], 2, 9, 1)
    assert work == Workload(
        batch=2, context=9, mlp_density=1, head_density=1, head_union_density=1, predictor_rank=0
    )
