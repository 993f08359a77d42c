"""benchmarks/bench_cpu_kernels.py: the crossover it computes, and that it runs; no time is asserted."""

import csv
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")


@pytest.fixture()
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_cpu_kernels

    return bench_cpu_kernels


def rows(dense_ms, *sparse):
    """Rows of one batch; sparse: (density, ms, predict_ms)."""
    points = [
        {"block": "mlp", "side": "sparse", "density": d, "ms": ms, "predict_ms": p} for d, ms, p in sparse
    ]
    return [
        {"block": "mlp", "side": "stock", "density": 1.0, "ms": 9.0},
        {"block": "mlp", "side": "dense", "density": 1.0, "ms": dense_ms},
        *points,
    ]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        pytest.param(rows(2.0, (0.5, 1.0, 0.0), (1.0, 2.0, 0.0)), 1.0, id="free-prediction"),
        pytest.param(rows(2.0, (0.5, 1.0, 0.5), (1.0, 2.0, 0.5)), 0.75, id="prediction-costs"),
        pytest.param(rows(2.0, (0.5, 0.5, 0.1), (1.0, 1.0, 0.1)), 1.0, id="never-slower"),
        pytest.param(rows(1.0, (0.5, 2.0, 0.1), (1.0, 3.0, 0.1)), 0.0, id="always-slower"),
        pytest.param(rows(1.0), None, id="not-measured"),
    ],
)
def test_crossover_is_where_sparse_with_its_prediction_takes_as_long_as_dense(bench, measured, expected):
    assert bench.crossover(measured, "mlp") == (None if expected is None else pytest.approx(expected))
    assert bench.crossover(measured, "qkv+out_proj") is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_runs_and_names_what_was_measured(bench, monkeypatch, tmp_path, dtype):
    """Every side of every batch is there, large batches without sparse ones, with counted densities."""
    argv = [
        "--geometry",
        "tiny",
        "--dtype",
        dtype,
        "--tokens",
        "2",
        "70",
        "--layers",
        "2",
        "--rounds",
        "2",
        "--rank",
        "16",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_cpu_kernels.py", *argv])
    bench.main()
    with (tmp_path / f"kernels-tiny-{dtype}.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    sides = {(r["tokens"], r["block"], r["side"]) for r in table}
    assert {
        ("2", "mlp", "sparse"),
        ("2", "qkv+out_proj", "sparse"),
        ("70", "mlp", "dense"),
        ("70", "mlp", "stock"),
    } <= sides
    assert ("70", "mlp", "sparse") not in sides
    assert all(0 <= float(r["density"]) <= 1 and float(r["ms"]) > 0 for r in table)
    assert {r["synthetic"] for r in table} == {"True"} and all(r["isa"] and r["commit"] for r in table)
