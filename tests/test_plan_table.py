"""`vllm-dejavu plan --table`: rows against the model they are of, CSV, Markdown, refusals."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dejavu import cli, plan_table
from vllm_dejavu.published import DEVICES, GEOMETRIES, preset_densities
from vllm_dejavu.roofline import Workload, account

H200 = DEVICES["h200"]


def table(*arguments: str) -> int:
    return cli.main(["plan", "--table", *arguments])


def test_everything_with_the_standard_library_only():
    """-I -S: no site-packages, so neither torch nor vLLM can be imported."""
    code = "import sys; sys.path.append(sys.argv.pop(1)); from vllm_dejavu import cli; cli.main()"
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, root, "plan", "--table"],
        capture_output=True,
        text=True,
        check=True,
    )
    first, *rest = done.stdout.splitlines()
    assert first.startswith("MODEL, not a measurement")
    assert sum(line.startswith("OPT-") for line in rest) == 8 * 4 * 2
    assert "DOES NOT FIT" in done.stdout and "stands in" in done.stdout


def test_quantization_table(tmp_path, capsys):
    """A row a point, on as many devices as hold 16 bits, with the assumptions and the command beside it."""
    path, rows_path = tmp_path / "out" / "t.md", tmp_path / "t.csv"
    options = ["--quantized", str(path), "--csv", str(rows_path)]
    assert table("6.7b,175b", "--batch", "1,8", "--context", "256", *options) == 0
    text = path.read_text(encoding="utf-8")
    assert (
        "MODEL, not a measurement" in text
        and f"--quantized {path}" in text
        and "Dequantization is free" in text
    )
    head, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["model"], row["GPUs"], row["batch"]) for row in rows] == [
        ("OPT-6.7B", "1", "1"),
        ("OPT-6.7B", "1", "8"),
        ("OPT-175B", "4", "1"),
        ("OPT-175B", "4", "8"),
    ]
    for row, name, tp in zip(rows, ("6.7b", "6.7b", "175b", "175b"), (1, 1, 4, 4), strict=True):
        mlp, heads, _ = preset_densities(name, int(row["batch"]))
        work = Workload(batch=int(row["batch"]), mlp_density=mlp, head_density=heads, tp=tp)
        dense4 = account(GEOMETRIES[name], H200, replace(work, dense_weight_bits=4)).dense_step_us / 1e3
        sparse = account(GEOMETRIES[name], H200, work).sparse_step_us / 1e3
        assert float(row["dense INT4 ms"]) == pytest.approx(dense4, abs=0.006) and float(
            row["sparse 16 ms"]
        ) == pytest.approx(sparse, abs=0.006)
        assert float(row["sparse 16 over dense INT4"].rstrip("x")) == pytest.approx(
            dense4 / sparse, abs=0.006
        )
    with rows_path.open(encoding="utf-8") as file:
        assert [row["sparse_weight_bits"] for row in csv.DictReader(file)] == ["16", "4"] * 4
    table("6.7b", "--batch", "1", "--gpu", "h100", "--memory-gb", "0.1", "--quantized", str(path))
    assert "| 32, TOO FEW |" in path.read_text(encoding="utf-8")


def test_csv(tmp_path, capsys):
    path = tmp_path / "model.csv"
    table("30b,13b", "--batch", "1,8", "--context", "256", "--launches", "13", "--csv", str(path))
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(row["kind"] == "model" and row["sparse_launches"] == "13" for row in rows)
    assert [row["batch"] for row in rows] == ["1", "8", "1", "8"] and "stands in" in rows[-1][
        "densities_from"
    ]
    expected = account(
        GEOMETRIES["30b"], H200, Workload(mlp_density=0.08, head_density=0.4, sparse_launches=13)
    )
    assert float(rows[0]["layer_speedup"]) == pytest.approx(expected.speedup, abs=1e-4)
    for side in ("dense", "sparse"):
        stems = [column for column in rows[0] if column.endswith(f"_layer_{side}_bytes")]
        total = sum(int(rows[0][column]) for column in stems)
        assert len(stems) == 7 and total == pytest.approx(int(rows[0][f"layer_{side}_bytes"]), abs=7)


def test_one_point_shows_its_parts_and_what_was_overridden(capsys):
    overrides = ["--bandwidth-gbs", "2400", "--launch-us", "0", "--launches", "12"]
    table("6.7b", "--batch", "1", "--context", "256", *overrides)
    out = capsys.readouterr().out
    assert "KV read" in out and "+2 not named" in out and "bandwidth_gbs 2400, launch_us 0" in out
    assert "169.5 ->" in out  # 84.8 us at half the bandwidth, no launches


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["6.7b", "--tp", "3"], "tp=3 does not divide"),
        (["6.7b,7b"], "MODEL '7b' is unknown: expected some of 125m"),
        (["--gpu", "h200,v100"], "--gpu 'v100' is unknown"),
        (["6.7b", "--batch", "0"], "batch"),
        (["6.7b", "--json"], "not with --table"),
        (["6.7b", "--predictor", "dir"], "not with --table"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else None,
)
def test_refuses(arguments, said, capsys):
    assert table(*arguments) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--launches", "13"], ["--csv", "x.csv"], ["--bandwidth-gbs", "100"]])
def test_options_of_a_table_are_refused_without_one(option, capsys):
    assert cli.main(["plan", "6.7b", "--gpu", "h200", *option]) == 1
    assert f"{option[0]}: only with --table" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["6.7b"], ["--gpu", "h200"], ["6.7b", "--gpu", "h200", "--batch", "1,8"]], ids=str
)
def test_without_a_table_one_point_is_named(arguments, capsys):
    assert cli.main(["plan", *arguments]) == 1
    assert "or --table for many" in capsys.readouterr().err


def test_every_gpu_and_size_is_one_that_is_published(capsys):
    assert table("6.7B, 30b", "--gpu", ",".join(DEVICES), "--batch", "1", "--context", "1") == 0
    out = capsys.readouterr().out
    assert all(device.name in out for device in DEVICES.values()) and out.count("OPT-30B") == len(DEVICES)
    assert plan_table.GPUS[0] in DEVICES
