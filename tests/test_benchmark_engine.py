"""bench_engine.py: bytes a step reads, sizes of a CPU's engine, one row a point, a dry run of it all."""

import csv
import json
import lzma
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import bench_engine
import engine_columns
import engine_drive
import engine_models
import engine_options
import engine_ratios
import engine_side
import pytest
from conftest import HANG_S

from vllm_dejavu.published import DEVICES, GEOMETRIES, opt_geometry
from vllm_dejavu.roofline import Workload, account

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

SMALL = opt_geometry(256, num_heads=8, num_layers=2, vocab_size=64, max_positions=64)


# What a step reads.


def _layers(g, mlp=None, heads=None):
    return [{"mlp": mlp or {"read_density": 1.0}, "attention": heads or {"read_density": 1.0}}] * g.num_layers


@pytest.mark.parametrize("name", ["125m", "1.3b", "2.7b"])
def test_bytes_are_those_of_the_roofline_model(name):
    """Dense and sparse, for densities that are alike in all layers."""
    g = GEOMETRIES[name]
    work = Workload(
        batch=4,
        mlp_density=0.2,
        head_density=0.5,
        head_union_density=0.9,
        survivors=0.8,
        predictor_dtype_bytes=1,
    )
    result = account(g, DEVICES["h200"], work)
    weights = ("qkv", "out_proj", "fc1", "fc2")
    lm_head = 2 * g.vocab_size * g.hidden_size
    dense = g.num_layers * sum(result.parts[p].dense_bytes for p in weights) + lm_head
    sparse = g.num_layers * sum(result.parts[p].sparse_bytes for p in (*weights, "predictor")) + lm_head
    counts = _layers(g, {"read_density": 0.2, "survived_density": 0.16}, {"read_density": 0.9})
    assert engine_columns.weight_bytes(g, 2) == pytest.approx(dense)
    predictors = g.num_layers * int(result.parts["predictor"].sparse_bytes)
    assert engine_columns.weight_bytes(g, 2, counts, predictors) == pytest.approx(sparse, rel=1e-6)


def test_blocks_without_counts_are_read_whole():
    dense = engine_columns.weight_bytes(SMALL, 4)
    assert engine_columns.weight_bytes(SMALL, 4, _layers(SMALL)) == dense
    assert (
        engine_columns.weight_bytes(
            SMALL, 4, _layers(SMALL, {"read_density": None, "survived_density": None}, {"read_density": None})
        )
        == dense
    )
    assert engine_columns.rate(3e6, {"tpot_p50_ms": 2.0}) == {"weight_mb": 3.0, "weight_gbps": 1.5}


# Sizes, options.


def test_a_cpu_engine_is_as_large_as_its_points_need():
    """1.3B, 16 x 1024: 17 steps of 1,024 tokens read the prompts, so the first sequence comes to 1024 + 8 +
    64 + 17 + 2.
    """
    spec = {
        "batch": [1, 16],
        "context": [128, 1024],
        "warmup": 8,
        "steps": 64,
        "prefill_tokens": 1024,
        "dtype": "bfloat16",
        "max_model_len": 2048,
    }
    assert engine_side.steps_needed(16, 1024, spec) == 1115
    sizes = engine_models.cpu_sizes(GEOMETRIES["1.3b"], spec)
    assert sizes == {
        "max_model_len": 1115,
        "slots": 16,
        "kv_cache_bytes": (16 * 9 + 2) * 128 * 24 * 2 * 2048 * 2,
    }
    assert (
        engine_models.cpu_sizes(GEOMETRIES["1.3b"], spec | {"batch": [1], "context": [16], "steps": 2})[
            "slots"
        ]
        == engine_drive.CALIBRATION_ROWS
    )
    # what no position is left for does not enlarge it
    short = replace(GEOMETRIES["125m"], max_positions=512)
    assert engine_models.cpu_sizes(short, spec | {"max_model_len": 512})["max_model_len"] < 512


def test_options_follow_the_device():
    gpu, cpu = (engine_options.parse_args(["--device", device]) for device in ("cuda", "cpu"))
    assert (gpu.dtype, gpu.predictor_dtype, gpu.prefill) == ("float16", "float16", 0)
    assert (cpu.dtype, cpu.predictor_dtype, cpu.prefill) == ("bfloat16", "int8", 3)
    assert engine_options.parse_args(["--dry-run"]).device == "cuda"
    assert bench_engine.label_of(gpu, "6.7b") == "6.7b"
    assert (
        bench_engine.label_of(
            engine_options.parse_args(["--mlp-density", "0.1", "--head-density", "1", "--label", "x"]), "1.3b"
        )
        == "1.3b-mlp0.1-heads1-x"
    )
    for wrong in (
        ["--mlp-density", "0"],
        ["--head-density", "1.2"],
        ["--model", "m"],
        ["--model", "m", "--text", "t", "--dry-run"],
    ):
        with pytest.raises(SystemExit):
            engine_options.parse_args(wrong)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [([], None), (["--async-scheduling", "on"], True), (["--async-scheduling", "off"], False)],
)
def test_async_scheduling_is_vllms_unless_named(monkeypatch, argument, expected):
    """Bug: both sides ran without it, which vLLM has on by default: the host's time hid what a step saves."""

    class Made(Exception):
        pass

    def llm(**options):
        raise Made(options.get("async_scheduling"))

    monkeypatch.setattr("vllm.LLM", llm)
    args = engine_options.parse_args(["--dry-run", "--side", "dense", *argument])
    spec = {k: getattr(args, k) for k in engine_models.PASSED_ON}
    spec |= {"side": "dense", "synthetic": False, "model": "m"}
    with pytest.raises(Made) as made:
        engine_drive.build_llm(spec | {"slots": 1, "prefill_tokens": 64, "max_model_len": 64})
    assert made.value.args == (expected,)


# Smoke.


def smoke_row(tokens, **more):
    tokens = [tokens] * len(engine_side.SMOKE_PROMPTS)
    return {"backend": "B", "cudagraph_mode": "G", "text": "t", "tokens": tokens, **more}


SPARSE = {"steps": {}, "sparse_step_share": 0.98, "mlp_density": 0.1, "head_density": 0.5}
ANSWERS = {
    "dense": smoke_row([1, 2, 3, 4]),
    "dejavu": smoke_row([1, 2, 3, 5], **SPARSE),
    "dejavu-eager": smoke_row([1, 2, 3, 5], **SPARSE),
}


def smoke(monkeypatch, answers):
    """Run bench_engine.smoke with answers {variant: row or what went wrong}."""
    together = Barrier(3, timeout=300)

    def run_child(spec, log, timeout_s):
        together.wait()
        found = answers[spec["side"]]
        return ([], found) if isinstance(found, str) else ([found], "")

    monkeypatch.setattr(bench_engine, "run_child", run_child)
    bench_engine.smoke(engine_options.parse_args(["--smoke", "m", "--dry-run"]))


def test_smoke_variants_run_beside_each_other_and_agree(monkeypatch, capsys):
    smoke(monkeypatch, ANSWERS)
    assert "graphs and eager 100%, dense and sparse 75%" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["dense", "dejavu", "dejavu-eager"])
def test_smoke_says_of_every_variant_whether_it_answered(monkeypatch, capsys, broken):
    """Bug: it ended at the first variant that failed, so that a fault of graphs hid whether eager works."""
    with pytest.raises(SystemExit, match=f"{broken}: failed with status 1") as ended:
        smoke(monkeypatch, {**ANSWERS, broken: "failed with status 1"})
    others = [variant for variant in ANSWERS if variant != broken]
    assert f"answered: {', '.join(others)}" in str(ended.value)
    assert all(f"{variant}: backend B" in capsys.readouterr().out for variant in others[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sparse_step_share": 0.5}, "ran sparse"), (smoke_row([9] * 4), "part in the first half")],
    ids=["dense-steps", "graphs-say-something-else"],
)
def test_smoke_judges(monkeypatch, change, message):
    with pytest.raises(SystemExit, match=message):
        smoke(monkeypatch, {**ANSWERS, "dejavu": ANSWERS["dejavu"] | change})


def test_earlier_points_are_kept():
    args = engine_options.parse_args(["--device", "cpu", "--batch", "1", "--context", "128"])
    row = {"batch": "1", "context": "128", "side": "dense"}
    assert not bench_engine.kept(args, row) and bench_engine.kept(args, row | {"context": "1024"})
    assert bench_engine.kept(args, row | {"side": "hf"})
    args.sides = ["dense", "hf"]
    assert not bench_engine.kept(args, row | {"side": "hf"})


def test_prompts_come_from_all_over_the_text(tmp_path):
    """Windows with BOS in front, out of a compressed text; the same for the same seed."""
    model = Path(__file__).parent.parent / "examples" / "opt-books-7m"
    text = tmp_path / "text.txt.xz"
    with lzma.open(text, "wt", encoding="utf-8") as file:
        file.write(
            "\n\n".join(
                f"Chapter {i}. The ship had been {i} weeks at sea, and the captain counted {i} gulls."
                for i in range(200)
            )
        )
    rows = engine_models.text_prompts(model, text, 24, 8, seed=0)
    assert len(rows) == 8 and {len(row) for row in rows} == {24} and {row[0] for row in rows} == {2}
    assert len({tuple(row) for row in rows}) == 8 and rows == engine_models.text_prompts(
        model, text, 24, 8, seed=0
    )
    (tmp_path / "prompts.json").write_text(json.dumps({24: rows}), encoding="utf-8")
    spec = {"prompts": str(tmp_path / "prompts.json")}
    assert engine_drive.prompts_of(spec, 3, 24) == rows[:3] and engine_drive.prompts_of(spec, 9, 10) == [
        row[:10] for row in [*rows, rows[0]]
    ]


def test_hf_points():
    spec = {"batch": [1, 4], "context": [128, 512]}
    assert engine_side.hf_points(spec) == [(128, 1)]
    assert engine_side.hf_points(spec | {"hf_points": "all"}) == [(128, 1), (128, 4), (512, 1), (512, 4)]


# One row a point.


def _row(side, repeat, ms, **more):
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
        "device": "CPU",
        "commit": "abc",
        **more,
    }


def test_pivot_puts_sides_beside_each_other():
    """Ratios are taken within a repeat; Transformers, which runs once, against its own."""
    rows = [
        _row("dense", 0, 100, prefill_ms="10", weight_gbps="20", ttft_p50_ms="5"),
        _row("dense", 1, 120, prefill_ms="10", weight_gbps="22"),
        _row("dense", 2, 110),
        _row("dejavu", 0, 50, mlp_density="0.11", prefill_ms="10", weight_gbps="10", ttft_p50_ms="4"),
        _row("dejavu", 1, 80, mlp_density="0.13", prefill_ms="8"),
        _row("dejavu", 2, 50, status="not run: out of time"),
        _row("dejavu-dense", 0, 101),
        _row("hf", 0, 200),
        _row("dense", 0, 30, batch="4"),
        _row("dejavu", 0, 20, geometry="2.7b"),
    ]
    first, second = engine_ratios.pivot(rows)
    assert (
        first["geometry"],
        first["batch"],
        first["context"],
        first["mlp_density"],
        first["head_density"],
    ) == ("1.3b", 1, 128, 0.1, 0.5)
    assert (first["dense_ms"], first["dejavu_ms"], first["hf_ms"], first["dejavu_dense_ms"]) == (
        110,
        65,
        200,
        101,
    )
    assert (first["speedup"], first["speedup_min"], first["speedup_max"], first["repeats"]) == (
        1.75,
        1.5,
        2.0,
        2,
    )
    assert first["hf_ratio"] == 4 and first["dense_state_ratio"] == pytest.approx(100 / 101)
    assert (
        first["ttft_ratio"] == 1.25
        and first["prefill_ratio"] == 1.125
        and first["gbps_ratio"] == 0.5
        and first["mlp_counted"] == pytest.approx(0.12)
    )
    assert (first["device"], first["commit"]) == ("CPU", "abc")
    assert (
        second["batch"],
        second["dense_ms"],
        second["dejavu_ms"],
        second["speedup"],
        second["repeats"],
    ) == (4, 30, None, None, 0)


def test_pivot_of_a_real_model_shows_what_was_counted():
    rows = [
        _row(
            side,
            0,
            10,
            mlp_asked="",
            head_asked="",
            synthetic="False",
            mlp_density="0.07",
            head_density="0.8",
        )
        for side in ("dense", "dejavu")
    ]
    (row,) = engine_ratios.pivot(rows)
    assert (row["mlp_density"], row["head_density"], row["synthetic"]) == (0.07, 0.8, "False")


# All of it.


@pytest.mark.on_demand
def test_dry_run_on_a_cpu(tmp_path):
    """Every side in an engine of its own, heads dense: one row a point, and a picture of it."""
    command = [
        "--dry-run",
        "--device",
        "cpu",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--sides",
        "dense",
        "dejavu",
        "hf",
        "--mlp-density",
        "0.2",
        "--head-density",
        "1",
    ]
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "bench_engine.py"),
            *command,
            "--output",
            str(out),
            "--work",
            str(tmp_path / "work"),
        ],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (out / "speed.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["geometry"], row["batch"], row["context"], row["mlp_density"], row["head_density"]) == (
        "tiny",
        "2",
        "64",
        "0.2",
        "1",
    )
    assert all(
        float(row[name]) > 0
        for name in ("dense_ms", "dejavu_ms", "hf_ms", "speedup", "prefill_ratio", "dense_gbps", "gbps_ratio")
    )
    assert (
        float(row["mlp_counted"]) == pytest.approx(0.2, rel=0.5)
        and float(row["head_counted"]) == 1
        and float(row["sparse_step_share"]) == 1
    )
    assert (row["compilation"], row["predictor_dtype"], row["synthetic"], row["dry_run"]) == (
        "eager",
        "int8",
        "True",
        "True",
    )
    assert float(row["dejavu_weight_mb"]) < float(row["dense_weight_mb"])
    if shutil.which("git"):
        assert row["commit"] and row["device"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "plots.py"), str(out)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0 and ((out / "speed.png").exists() or "not installed" in done.stdout), (
        done.stdout + done.stderr
    )
