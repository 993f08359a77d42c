"""Whole engines, dense vLLM against dejavu: time per token, time to first token, throughput, memory. A
measurement.

    python benchmarks/bench_engine.py --geometry 6.7b --output results/
    python benchmarks/bench_engine.py --device cpu --geometry 1.3b --mlp-density 0.10 --head-density 0.5
        --output results/
    python benchmarks/bench_engine.py --device cpu --geometry 1.3b --mlp-density 0.10 --head-density 0.5
        --batch 1 4 16 --context 128 --sides dense w8a8 dejavu dejavu-int8 --output results/
    python benchmarks/bench_engine.py --device cpu --model DIR --text FILE.txt --output results/
    python benchmarks/bench_engine.py --dry-run --output /tmp/out        # tiny, on a CPU; times mean nothing
    python benchmarks/bench_engine.py --smoke examples/opt-books-7m      # dense; sparse; sparse and eager

Each side runs in a process of its own with the same settings (engine_side.py); sides alternate, and their
order changes from repeat to repeat. In a process every (batch, context) is driven step by step. With
--geometry weights and predictors are synthetic (synthetic.py): speed only; with --model they are a
checkpoint's, prompts are its own kind of text, and rows say `synthetic` False. Densities counted in the timed
steps stand in every row. The ratio of each repeat is taken, then their median; on a GPU it is printed beside
the roofline MODEL at the counted densities.

Sides (engine_sides.py): `dense` is vLLM's own OPT; `w8a8` and `w4a16` likewise, of a quantized copy of the
checkpoint, refused where the log does not name the kernel that vLLM has for it; `dejavu` the sparse one;
`dejavu-int8` with INT8 weights and LM head, `-head16` with the head in 16 bits; `-fp8` with an fp8 KV cache;
`dejavu-dense` ours with mode "dense"; `hf` is Hugging Face Transformers, eager, one point unless --hf-points
all. Time per token is the host's clock between two steps that gave tokens, with async scheduling as vLLM has
it by default (rows say whether it was on): what the host adds to a step beyond what that hides is in it, on
both sides.

On a CPU vLLM's defaults hold (compiled, its own attention), engines use all cores this process may use, the
KV cache is as large as the largest point needs, and no point's prompts are read twice: short prompts warm an
engine up. Made from all engine-*.csv of the folder: `speed.csv`, a row a point with dense sides beside each
other, and `speedups.csv`, a row a point and side of ours, over the fastest side of stock vLLM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_side
from common import Budget, Table, print_rows, read_rows, write_rows
from engine_columns import BUSY_CORES
from engine_models import prepare
from engine_options import parse_args
from engine_ratios import pivot, ratios
from engine_side import SMOKE_PROMPTS, environment, hf_points
from engine_sides import SIDES
from engine_speedups import COLUMNS as SPEEDUP_COLUMNS
from engine_speedups import speedups
from quantized import KERNELS

ESTIMATED_START_S = 60.0
RAISED = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Exit)\b")  # the last line of a traceback


def run_child(spec: dict[str, Any], log: Path, timeout_s: float | None) -> tuple[list[dict[str, Any]], str]:
    """Rows a side has emitted, and "" or why it ended early."""
    log.parent.mkdir(parents=True, exist_ok=True)
    rows = log.with_suffix(".jsonl")
    rows.unlink(missing_ok=True)
    spec = {**spec, "rows": str(rows), "limit_s": timeout_s}
    command = [sys.executable, engine_side.__file__, json.dumps(spec)]
    error = ""
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout_s)
            if done.returncode:
                error = f"failed with status {done.returncode}, see {log}"
        except subprocess.TimeoutExpired:
            error = "not run: out of time"
    scheme = SIDES[spec["side"]].scheme if spec.get("side") in SIDES else None
    kernel = KERNELS.get(scheme)
    if kernel and not error and kernel not in log.read_text(encoding="utf-8", errors="replace"):
        error = f"not what it should be: {log} does not name {kernel}"
        rows.unlink(missing_ok=True)
    if error:  # of one that hung, the stack where it did
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(lines[-25:]))
        error += next((f" ({line[:200]})" for line in reversed(lines) if RAISED.match(line)), "")
    return (
        [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    ), error


def read_gbps() -> float:
    """What memory delivers to all cores: the best of some sums over 1 GiB."""
    import torch

    values, times = torch.zeros(1 << 28), []
    for _ in range(7):
        began = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - began)
    return values.nbytes / min(times) / 1e9


def label_of(args: argparse.Namespace, name: str) -> str:
    """Of files: geometry, the densities that were asked for, label."""
    asked = [
        f"mlp{args.mlp_density:g}" if args.mlp_density else "",
        f"heads{args.head_density:g}" if args.head_density else "",
    ]
    return "-".join(filter(None, (name, *asked, args.label)))


def kept(args: argparse.Namespace, row: dict[str, str]) -> bool:
    """Whether a row of an earlier run stays: on a CPU a grid takes many runs. Sides of a point are only
    compared within one, so a point measured again loses all of them but hf, which is slow and not a baseline
    of anything."""
    again = int(row["batch"]) in args.batch and int(row["context"]) in args.context
    return not again or (row["side"] == "hf" and "hf" not in args.sides)


def run_geometry(args: argparse.Namespace, name: str, budget: Budget) -> list[dict[str, Any]]:
    label = label_of(args, name)
    spec, table = prepare(args, name), Table(args.output / f"engine-{label}.csv")
    if args.device == "cpu":
        table.rows += [row for row in read_rows(table.path.name, args.output) if kept(args, row)]
    shared = {k: spec[k] for k in SHARED}
    shared |= {
        "label": args.label,
        "blocks": "+".join(spec["blocks"]),
        "weights": "random" if spec["synthetic"] else "checkpoint",
        "read_gbps": read_gbps() if args.device == "cpu" else None,
    }
    took = dict.fromkeys(args.sides, 0.0 if args.dry_run else ESTIMATED_START_S)
    for repeat in range(args.repeats):
        order = args.sides if repeat % 2 == 0 else args.sides[::-1]
        for side in order:
            if side == "hf" and repeat:
                continue
            rows, error = [], "not run: out of time"
            # hands of time: a side that cannot finish the alternation would only spoil the ratio
            if budget.allows(took[side]):
                began = time.monotonic()
                left = None if args.budget_s is None else budget.left_s
                child_spec = {**spec, "side": side, "budget_s": None if left is None else left - 15}
                rows, error = run_child(
                    child_spec, args.output / "logs" / f"engine-{label}-{side}-{repeat}.log", left
                )
                took[side] = time.monotonic() - began
            seen = {(row["batch"], row["context"]) for row in rows}
            points = (
                [(b, c) for c, b in hf_points(spec)]
                if side == "hf"
                else list(itertools.product(args.batch, args.context))
            )
            rows += [
                {"batch": b, "context": c, "status": error or "not run"}
                for b, c in points
                if (b, c) not in seen
            ]
            for row in rows:
                table.add(benchmark="engine", side=side, repeat=repeat, **shared, **row)
            good = [row for row in rows if row["status"] == "ok"]
            print(
                f"{label} {side} repeat {repeat}: {len(good)} of {len(points)} points, {took[side]:.0f} s"
                f" {error}",
                flush=True,
            )
            for row in good:
                busy = row["others_cores"]
                note = (
                    f"  NOT ALONE: other processes kept {busy:.2f} cores busy"
                    if args.device == "cpu" and busy > BUSY_CORES
                    else ""
                )
                print(
                    f"    batch {row['batch']} x {row['context']}: {row['tpot_p50_ms']:.3f} ms a token{note}",
                    flush=True,
                )
    return table.rows


# Of the spec, put into every row.
SHARED = (
    "geometry",
    "rank",
    "overlap",
    "mlp_lookahead",
    "survive",
    "true_rates",
    "spread",
    "seed",
    "steps",
    "dense_projections",
    "synthetic",
    "dry_run",
    "dtype",
    "predictor_dtype",
    "mlp_asked",
    "head_asked",
    "densities_from",
    "temperature",
)


def smoke(args: argparse.Namespace) -> None:
    """Both sides answer; steps ran sparse; graphs and eager agree.

    All variants run, beside each other, before anything is judged: which of them fail tells kernels,
    compilation and graphs apart.
    """
    variants, results, failed = ("dense", "dejavu", "dejavu-eager"), {}, []

    def answer(variant: str) -> tuple[list[dict[str, Any]], str]:
        spec = {"smoke": str(args.smoke), "side": variant, "dry_run": args.dry_run}
        return run_child(spec, args.output / "logs" / f"smoke-{variant}.log", args.budget_s)

    with ThreadPoolExecutor(len(variants)) as pool:
        answers = list(pool.map(answer, variants))
    for variant, (rows, error) in zip(variants, answers, strict=True):
        if error or not rows:
            failed.append(f"{variant}: {error or 'no answer'}")
            continue
        results[variant] = row = rows[0]
        print(
            f"{variant}: backend {row['backend']}, graphs {row['cudagraph_mode']}, steps"
            f" {row.get('steps', '-')}"
        )
        print(f"    {SMOKE_PROMPTS[0]} ...{row['text']!r}")
    if failed:
        failed.append(f"answered: {', '.join(results) or 'none'}")
        raise SystemExit("\n".join(f"smoke: {line}" for line in failed))

    def agreement(a: str, b: str) -> float:
        """Mean share of an answer before the first different token."""
        pairs = zip(results[a]["tokens"], results[b]["tokens"], strict=True)
        return sum(
            next((i for i, (s, t) in enumerate(zip(x, y, strict=True)) if s != t), len(x)) / len(x)
            for x, y in pairs
        ) / len(SMOKE_PROMPTS)

    share = results["dejavu"]["sparse_step_share"]
    graphs, dense = agreement("dejavu", "dejavu-eager"), agreement("dense", "dejavu")
    r = results["dejavu"]
    print(f"sparse steps {share:.1%}; MLP density {r['mlp_density']:.3f}, heads {r['head_density']:.3f}")
    print(
        f"tokens before the first difference: graphs and eager {graphs:.0%}, dense and sparse {dense:.0%}"
        " (approximate by design)"
    )
    if share <= 0.9:
        raise SystemExit("smoke: at most 90% of the steps ran sparse")
    if graphs < 0.5:
        raise SystemExit(
            "smoke: graphs and eager part in the first half of their answers; rounding alone seldom does that"
        )


def main() -> None:
    args = parse_args()
    os.environ.update(environment(args.dry_run))
    if args.smoke:
        return smoke(args)
    budget, every = Budget(args.budget_s), []
    for name in [path.name for path in args.model] if args.model else args.geometry:
        rows = run_geometry(args, name, budget)
        if args.device == "cpu" or "dense" not in args.sides:
            continue
        table = Table(args.output / f"engine-{label_of(args, name)}-ratios.csv")
        for row in ratios(args, rows):
            table.add(benchmark="engine ratio", dry_run=args.dry_run, **row)
        every += table.rows
    columns = (
        "geometry",
        "batch",
        "context",
        "side",
        "dense_ms",
        "side_ms",
        "speedup",
        "speedup_min",
        "speedup_max",
        "repeats",
        "model_speedup",
        "mlp_union_density",
        "head_density",
        "ttft_ratio",
        "kv_ratio",
        "async_scheduling",
    )
    if args.device == "cpu":
        found = read_rows("engine-*.csv", args.output)
        over_stock = speedups(found)
        if over_stock:
            write_rows(args.output / "speedups.csv", over_stock)
            print("\nover the fastest side of stock vLLM")
            print_rows(over_stock, SPEEDUP_COLUMNS)
        every = pivot(found)
        columns = (
            "geometry",
            "label",
            "batch",
            "context",
            "mlp_density",
            "head_density",
            "dense_ms",
            "dejavu_ms",
            "speedup",
            "speedup_min",
            "speedup_max",
            "repeats",
            "hf_ms",
            "dense_state_ratio",
            "prefill_ratio",
            "ttft_ratio",
            "dense_gbps",
            "gbps_ratio",
            "mlp_counted",
            "head_counted",
            "others_cores",
        )
        if every:
            write_rows(args.output / "speed.csv", every)
    if not every:
        return
    kind = "real weights and text" if args.model else "synthetic weights and selections"
    print(
        f"\n{kind}; time per output token, dense over"
        f" side{'; DRY RUN, no measurement' if args.dry_run else ''}"
    )
    print_rows(every, columns)


if __name__ == "__main__":
    main()
