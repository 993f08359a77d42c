"""Kernel launches of a decode step, counted from a profile of the engine as served: CUDA graphs on. A
measurement.

    python benchmarks/profile_step.py --geometry 6.7b --output results/
    python benchmarks/profile_step.py --dry-run --output /tmp/out        # operators on a CPU instead of
    kernels

Writes a table of kernels (launches a step and a layer, time) and a trace for chrome://tracing. The goal is at
most 10 launches a sparse layer. Launches a layer are counted between one layer's anchor and the next one's:
the anchor is a kernel that runs exactly once a layer. Profiling slows a step down: its times show shares, not
speed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from common import ENGINE_GEOMETRIES, Table, geometry, median, print_rows
from engine_drive import build_llm, drive
from engine_models import prepare
from engine_side import environment

KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace that run on the GPU


def kernels_of(
    trace: dict[str, Any], categories: tuple[str, ...] = KERNELS
) -> list[tuple[str, float, float]]:
    """(name, start, duration) in microseconds, by start."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in categories]
    return sorted(((e["name"], float(e["ts"]), float(e["dur"])) for e in events), key=lambda e: e[1])


def launches_per_layer(names: list[str], num_layers: int, steps: int) -> tuple[str, float]:
    """(anchor, launches from one anchor to the next, median); ("", nan) where no kernel runs once a layer."""
    counts = Counter(names)
    anchors = [n for n, c in counts.items() if c == num_layers * steps]
    if not anchors:
        return "", float("nan")
    anchor = next(
        (n for n in anchors if "fc1" in n or "attention" in n.lower() or "flash" in n.lower()), anchors[0]
    )
    places = [i for i, n in enumerate(names) if n == anchor]
    return anchor, median(b - a for a, b in zip(places, places[1:], strict=False))


def summarize(kernels: list[tuple[str, float, float]], num_layers: int, steps: int) -> list[dict[str, Any]]:
    """One row a kernel, by time, and a last one for all."""
    durations: dict[str, list[float]] = defaultdict(list)
    for name, _, duration in kernels:
        durations[name].append(duration)
    rows = [
        {
            "kernel": re.sub(r"\s+", " ", name)[:70],
            "launches_per_step": len(d) / steps,
            "launches_per_layer": len(d) / steps / num_layers,
            "us_p50": median(d),
            "us_per_step": sum(d) / steps,
        }
        for name, d in durations.items()
    ]
    rows.sort(key=lambda row: -row["us_per_step"])
    anchor, per_layer = launches_per_layer([name for name, _, _ in kernels], num_layers, steps)
    rows.append(
        {
            "kernel": f"ALL (between two {anchor[:40]})" if anchor else "ALL (no kernel runs once a layer)",
            "launches_per_step": len(kernels) / steps,
            "launches_per_layer": per_layer,
            "us_p50": median(d for _, _, d in kernels),
            "us_per_step": sum(d for _, _, d in kernels) / steps,
        }
    )
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Launches per layer of a decode step, from a profile.")
    parser.add_argument("--geometry", choices=ENGINE_GEOMETRIES, default="6.7b")
    parser.add_argument("--side", choices=["dense", "dejavu"], default="dejavu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--mlp-lookahead", choices=["self", "attn_input"], default="self")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dejavu-bench")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        args.geometry, args.context = "tiny", 32
    return args


def main() -> None:
    args = parse_args()
    os.environ.update(environment(args.dry_run))
    import torch
    from torch.profiler import ProfilerActivity, profile

    shared = argparse.Namespace(
        **vars(args),
        rank=None,
        spread=0.0,
        seed=0,
        blocks=["mlp", "attention"],
        survive=1.0,
        warmup=4,
        memory=0.9,
        dense_projections=False,
        async_scheduling="off",  # launches are counted by the step: none may begin before the last has ended
    )
    shared.batch, shared.context = [args.batch], [args.context]
    spec = {**prepare(shared, args.geometry), "side": args.side, "budget_s": None}
    llm = build_llm(spec)
    drive(llm, args.batch, args.context, warmup=4, steps=2, spec=spec)
    activity = ProfilerActivity.CPU if args.dry_run else ProfilerActivity.CUDA
    profiler = profile(activities=[activity] if args.dry_run else [ProfilerActivity.CPU, activity])
    # drive() is still inside the last step when it calls this: what precedes is finished on the device

    def start() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.start()

    drive(llm, args.batch, args.context, warmup=4, steps=args.steps, spec=spec, before_timed=start)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    profiler.stop()

    name = f"profile-{args.geometry}-{args.side}{'-overlap' if args.overlap else ''}-batch{args.batch}"
    args.output.mkdir(parents=True, exist_ok=True)
    trace = args.output / f"{name}.json"
    profiler.export_chrome_trace(str(trace))
    text = trace.read_text(encoding="utf-8")
    trace.unlink()
    with gzip.open(trace.with_suffix(".json.gz"), "wt", encoding="utf-8") as file:
        file.write(text)
    kernels = kernels_of(json.loads(text), ("cpu_op",) if args.dry_run else KERNELS)
    if not kernels:
        raise SystemExit("the profile holds no kernels: is the profiler allowed to trace this GPU?")
    rows = summarize(kernels, geometry(args.geometry).num_layers, args.steps)
    table = Table(args.output / f"{name}.csv")
    for row in rows:
        table.add(
            benchmark="profile",
            synthetic=True,
            dry_run=args.dry_run,
            geometry=args.geometry,
            side=args.side,
            overlap=args.overlap,
            batch=args.batch,
            context=args.context,
            steps=args.steps,
            **row,
        )
    shown = rows if len(rows) <= 30 else [*rows[:29], rows[-1]]
    print_rows(shown, ("launches_per_step", "launches_per_layer", "us_p50", "us_per_step", "kernel"))
    what = "operators on a CPU, DRY RUN" if args.dry_run else "kernels"
    print(
        f"{name}: {what}; {rows[-1]['launches_per_layer']:g} a layer; trace: {trace.with_suffix('.json.gz')}",
        flush=True,
    )
    os._exit(0)


if __name__ == "__main__":
    main()
