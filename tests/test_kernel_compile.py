"""Shipped kernels compile ahead of time without a GPU and spill no more registers than the committed record.

In a child process: conftest.py defines the kernels for the interpreter here. A subset, for time, with more of
it on demand; `benchmarks/compile_kernels.py` compiles the rest as well.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_S

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"
BASELINE = ROOT / "benchmarks" / "results" / "compile" / "baseline.csv"
sys.path.append(str(SCRIPT.parent))

from compile_kernels import ARCHS, MODULES, configs, problems  # noqa: E402


def _check(*args: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--check", str(BASELINE), *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "nothing is worse" in done.stdout


SUBSETS = [
    pytest.param(["sm_90"], "opt-6.7b|head=64", "fp16", "1|64", id="sm_90"),
    pytest.param(["sm_80", "sm_100"], "opt-6.7b|head=128", "fp16", "16", id="sm_80 and sm_100"),
    pytest.param(
        ["sm_80", "sm_90", "sm_100"],
        "opt-6.7b|opt-6.7b int8 predictor|head=(?:64|80|128)",
        "(?:fp16|bf16)",
        "1|16|32|64",
        id="every size and type",
        marks=pytest.mark.on_demand,
    ),
]


@pytest.mark.parametrize(("archs", "shapes", "dtype", "tokens"), SUBSETS)
def test_kernels_compile_without_new_spills(archs, shapes, dtype, tokens):
    _check("--arch", *archs, "--config", rf"^(?:{shapes}) {dtype} tokens=(?:{tokens})$")


def test_baseline_holds_every_configuration():
    with open(BASELINE, newline="", encoding="utf-8") as file:
        recorded = {(r["kernel"], r["config"], r["arch"]) for r in csv.DictReader(file)}
    expected = {
        (kernel, c.name, arch)
        for c in configs()
        for kernel in c.kernels
        for arch in ARCHS
        if "fp32" not in c.name or arch == "sm_90"
    }
    assert recorded == expected
    assert {kernel for kernel, _, _ in recorded} == set(MODULES)


def _row(status: str = "ok", spill_bytes: int | str = 0, config: str = "c") -> dict:
    return {"kernel": "k", "config": config, "arch": "sm_90", "status": status, "spill_bytes": spill_bytes}


@pytest.mark.parametrize(
    ("new", "old", "found"),
    [
        pytest.param(_row(spill_bytes=8), [_row(spill_bytes="8")], "", id="as before"),
        pytest.param(_row(spill_bytes=12), [_row(spill_bytes="8")], "spills 12 bytes", id="more spills"),
        pytest.param(_row(spill_bytes=4), [_row(config="other")], "spills 4 bytes", id="a new one spills"),
        pytest.param(_row("failed: E", ""), [_row()], "failed: E", id="fails now"),
        pytest.param(_row("failed: E", ""), [], "failed: E", id="a new one fails"),
        pytest.param(_row("failed: E", ""), [_row("failed: E", "")], "", id="known to fail"),
        pytest.param(_row(), [_row("failed: E", "")], "", id="repaired"),
    ],
)
def test_problems(new, old, found):
    assert found in "\n".join(problems([new], old)) and bool(problems([new], old)) == bool(found)
