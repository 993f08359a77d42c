"""Our sides over stock vLLM's in bench_engine: which is the fastest, which rows are refused, what its
quantized checkpoints hold.
"""

import json
import subprocess

import bench_engine
import pytest
import torch
from engine_sides import SIDES, STOCK
from engine_speedups import speedups
from quantized import KERNELS, quantization_config, write
from safetensors.torch import load_file
from tolerances import relative_rms


def row(side, repeat, ms, **more):
    return {
        "status": "ok",
        "geometry": "1.3b",
        "label": "",
        "synthetic": "True",
        "dtype": "bfloat16",
        "mlp_asked": "0.1",
        "head_asked": "0.5",
        "batch": "1",
        "context": "128",
        "side": side,
        "repeat": str(repeat),
        "tpot_p50_ms": str(ms),
        **{k: str(v) for k, v in more.items()},
    }


def test_the_baseline_is_the_fastest_of_stock_vllm():
    """By its median; ratios within a repeat; prompts over whatever is fastest in them."""
    rows = [
        row("dense", 0, 100, prefill_ms=50),
        row("dense", 1, 100, prefill_ms=60),
        row("w8a8", 0, 40, prefill_ms=80),
        row("w8a8", 1, 60, prefill_ms=80),
        row("w4a16", 0, 90),
        row("dejavu", 0, 80, prefill_ms=50),
        row("dejavu", 1, 50, prefill_ms=40),
        row("dejavu-int8", 0, 20, weight_mb=500, read_gbps=50),
        row("dejavu-int8", 1, 20, weight_mb=500, read_gbps=50),
        row("dejavu-int8", 2, 1, status="failed"),
    ]
    sixteen, eight = speedups(rows)
    assert (sixteen["side"], sixteen["stock"], sixteen["stock_kernel"]) == ("dejavu", "w8a8", KERNELS["w8a8"])
    assert sixteen["stock_ms"] == 50 and sixteen["speedup"] == pytest.approx((0.5 + 1.2) / 2)
    assert (sixteen["speedup_min"], sixteen["speedup_max"], sixteen["repeats"]) == (0.5, 1.2, 2)
    assert (sixteen["same_bits"], sixteen["same_bits_speedup"]) == ("dense", pytest.approx((1.25 + 2) / 2))
    assert sixteen["prefill_ratio"] == pytest.approx((1 + 1.5) / 2)
    assert (eight["same_bits"], eight["same_bits_speedup"], eight["speedup"]) == ("w8a8", 2.5, 2.5)
    assert eight["dense_speedup"] == 5 and eight["repeats"] == 2
    assert (eight["byte_limit_ms"], eight["byte_limit_share"]) == (10, 0.5)


def test_densities_are_different_points_and_dense_alone_is_no_comparison():
    rows = [row(side, 0, 10) for side in ("dense", "dejavu")]
    assert speedups(rows) == []
    more = [row(side, 0, 20, mlp_asked=0.25) for side in ("dense", "w8a8", "dejavu")]
    (only,) = speedups(rows + more)
    assert [r["stock"] for r in speedups([row("w8a8", 0, 20), row("dejavu-int8", 0, 10)])] == ["w8a8"]
    assert only["mlp_asked"] == "0.25" and only["side_ms"] == 20


@pytest.mark.parametrize("side", ["w8a8", "w4a16"])
@pytest.mark.parametrize("named", [True, False])
def test_a_row_whose_log_does_not_name_the_kernel_is_refused(side, named, tmp_path, monkeypatch):
    def run(command, stdout, **options):
        spec = json.loads(command[-1])
        stdout.write(f"Using {KERNELS[side] if named else 'another'} for it")
        with open(spec["rows"], "w") as file:
            file.write(json.dumps({"status": "ok"}) + "\n")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench_engine.subprocess, "run", run)
    rows, error = bench_engine.run_child({"side": side}, tmp_path / "log", None)
    assert (len(rows), error == "") == ((1, True) if named else (0, False))
    if not named:
        assert KERNELS[side] in error


def test_sides():
    assert STOCK == ["dense", "w8a8", "w8a8-fp8", "w4a16"]
    assert all(SIDES[s].scheme in KERNELS for s in STOCK[1:])
    in_8 = {f"dejavu-int8{more}" for more in ("", "-head16", "-fp8")}
    in_4 = {f"dejavu-int4{more}" for more in ("", "-head16")}
    assert {s for s, side in SIDES.items() if side.sparse} == {"dejavu", *in_8, *in_4}


@pytest.mark.parametrize(("scheme", "error"), [("w8a8", 1e-2), ("w4a16", 0.15)])
def test_checkpoints_hold_what_compressed_tensors_reads(scheme, error, opt, tmp_path):
    """Undone by that library, tensor by tensor, and everything that is no linear of a layer as it was."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    model = opt(hidden=128, layers=2)
    before, out = load_file(model / "model.safetensors"), write(model, tmp_path / "out", scheme)
    after = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == quantization_config(scheme) and config["hidden_size"] == 128
    rounded = 0
    for name, tensor in before.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.weight_scale" not in after:
            assert torch.equal(after[name], tensor), name
            continue
        rounded += 1
        scale = after[f"{stem}.weight_scale"].float()
        if scheme == "w8a8":
            integers = after[name]
            assert integers.dtype == torch.int8
        else:
            shape = torch.Size(after[f"{stem}.weight_shape"].tolist())
            integers = unpack_from_int32(after[f"{stem}.weight_packed"], 4, shape)
            scale = scale.repeat_interleave(128, 1)
        assert relative_rms(integers.float() * scale, tensor.float()) < error, name
    assert rounded == 2 * 6
