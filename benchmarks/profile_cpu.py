"""Where a step's time goes on a CPU: operators' own time, of a decode step or a lone prompt. A measurement.

    python benchmarks/profile_cpu.py --geometry 1.3b --mlp-density 0.10 --head-density 0.5 --batch 4
        --sides w8a8 dejavu-int8 --output results/
    python benchmarks/profile_cpu.py --geometry 1.3b --mlp-density 0.10 --head-density 0.5 --prompt 128
        --sides w8a8 dejavu-int8 --output results/

A row an operator and side: milliseconds a step by torch.profiler, share of the wall clock while it is on, and
what kind of work it is (KINDS). "(outside)" is what no operator covers: vLLM's scheduler, sampler and Python.
Profiling itself costs some microseconds an operator, which mostly falls on the host's share; `unprofiled_ms`
is the median step before it was switched on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Table, median, print_rows
from engine_drive import build_llm, drive, prefill
from engine_models import prepare
from engine_side import environment
from engine_sides import SIDES

from vllm_dejavu.published import GEOMETRIES

# The first that an operator's name contains names its kind.
KINDS = (
    ("dejavu_cpu::mlp", "host of our operators"),
    ("dejavu_cpu::attention", "host of our operators"),
    ("select_neurons", "predictor"),
    ("score_heads", "predictor"),
    ("sparse_mlp", "MLP"),
    ("dense_mlp", "MLP"),
    ("sparse_qkv", "projections"),
    ("out_proj", "projections"),
    ("dejavu_cpu::linear", "projections"),
    ("reshape_and_cache", "cache write"),
    ("cpu_attention", "attention"),
    ("int8_quant", "rounding of inputs"),
    ("onednn", "linears"),
    ("linear", "linears"),
    ("mm", "linears"),
    ("unified_", "host of vLLM's operators"),
)


def kind_of(name: str) -> str:
    if name.startswith("dejavu::"):  # in Python: what they call has rows of its own
        return "host of our operators"
    return next((kind for part, kind in KINDS if part in name), "other operators")


def own_times(llm: Any, batch: int, prompt: int, spec: dict[str, Any]) -> tuple[dict[str, Any], float, float]:
    """({operator: its event}, wall milliseconds, median milliseconds of a step without the profiler)."""
    from torch.profiler import ProfilerActivity, profile

    profiler, clock = profile(activities=[ProfilerActivity.CPU]), []

    def start() -> None:
        profiler.start()
        clock.append(time.perf_counter())

    def stop() -> None:
        clock.append(time.perf_counter())
        profiler.stop()

    steps = spec["steps"]
    if prompt:
        plain = prefill(llm, prompt, steps, spec)["prefill_ms"]
        start()
        prefill(llm, prompt, steps, spec)
        stop()
    else:
        point = (llm, batch, spec["context"][0], spec["warmup"], steps, spec)
        plain = 1e3 * median(drive(*point)["step_s"])
        drive(*point, before_timed=start, after_timed=stop)
    return {event.key: event for event in profiler.key_averages()}, 1e3 * (clock[1] - clock[0]), plain


def rows_of(events: dict[str, Any], wall: float, plain: float, steps: int) -> list[dict[str, Any]]:
    """By time; what takes less than a thousandth together."""
    times = {name: (event.self_cpu_time_total / 1e3, event.count) for name, event in events.items()}
    small = [name for name, (ms, _) in times.items() if ms < wall / 1000]
    rest = sum(times.pop(name)[0] for name in small)
    times["(others)"] = (rest, 0)
    times["(outside)"] = (wall - sum(ms for ms, _ in times.values()), 0)
    rows = [
        {
            "kind": "outside of operators" if name == "(outside)" else kind_of(name),
            "share": ms / wall,
            "ms": ms / steps,
            "calls": calls / steps,
            "wall_ms": wall / steps,
            "unprofiled_ms": plain,
            "operator": name,
        }
        for name, (ms, calls) in times.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = {row["kind"]: [r for r in rows if r["kind"] == row["kind"]] for row in rows}
    summed = [
        {"side": of[0]["side"], "kind": kind}
        | {k: sum(row[k] for row in of) for k in ("share", "ms", "calls")}
        for kind, of in kinds.items()
    ]
    return sorted(summed, key=lambda row: -row["ms"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Operators' own time in a step, on a CPU.")
    parser.add_argument("--geometry", choices=[*GEOMETRIES, "tiny"], default="1.3b")
    sides = [name for name, side in SIDES.items() if side.impl != "hf"]
    parser.add_argument("--sides", nargs="+", choices=sides, default=["dense", "dejavu"])
    parser.add_argument("--mlp-density", type=float)
    parser.add_argument("--head-density", type=float)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument(
        "--prompt", type=int, default=0, help="instead of decode steps: lone prompts of so many"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dejavu-bench")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a side's spec
    return parser.parse_args()


def child(spec: dict[str, Any], batch: int, prompt: int) -> None:
    llm = build_llm(spec)
    events, wall, plain = own_times(llm, batch, prompt, spec)
    rows = rows_of(events, wall, plain, spec["steps"])
    Path(spec["rows"]).write_text(json.dumps(rows), encoding="utf-8")
    os._exit(0)


def main() -> None:
    args = parse_args()
    os.environ.update(environment(False))
    if args.child:
        return child(json.loads(args.child), args.batch, args.prompt)
    asked = {
        **vars(args),
        "device": "cpu",
        "batch": [args.batch],
        "warmup": 4,
        "model": None,
        "dry_run": False,
    }
    asked["context"] = [args.prompt or args.context]
    spec = prepare(argparse.Namespace(**asked), args.geometry)
    what = f"prompt{args.prompt}" if args.prompt else f"batch{args.batch}"
    table = Table(args.output / f"profile-cpu-{args.geometry}-{what}.csv")
    for side in args.sides:
        with tempfile.TemporaryDirectory() as directory:
            spec |= {"side": side, "rows": f"{directory}/rows.json"}
            command = [sys.executable, __file__, "--child", json.dumps(spec)]
            command += ["--batch", str(args.batch), "--prompt", str(args.prompt)]
            log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if log.returncode:
                raise SystemExit(f"{side}: {log.stdout[-3000:]}")
            rows = json.loads(Path(spec["rows"]).read_text(encoding="utf-8"))
        for row in rows:
            point = {"geometry": args.geometry, "batch": args.batch, "prompt": args.prompt, "side": side}
            table.add(benchmark="profile", synthetic=True, **point, **row)
        own = table.rows[-len(rows) :]
        print_rows(own[:25], ("side", "share", "ms", "calls", "wall_ms", "unprofiled_ms", "operator"))
        print_rows(by_kind(own), ("side", "share", "ms", "calls", "kind"))


if __name__ == "__main__":
    main()
