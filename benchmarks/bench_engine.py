"""Whole engines, dense vLLM against dejavu: time per token, time to first token, throughput, memory. A
measurement.

    python benchmarks/bench_engine.py --geometry 6.7b --output results/
    python benchmarks/bench_engine.py --device cpu --geometry 1.3b --mlp-density 0.10 --head-density 0.5
    --output results/ python benchmarks/bench_engine.py --device cpu --model DIR --text FILE.txt --output
    results/ python benchmarks/bench_engine.py --dry-run --output /tmp/out        # tiny, on a CPU; times mean
    nothing python benchmarks/bench_engine.py --smoke examples/opt-books-7m      # dense; sparse; sparse and
    eager

Each side runs in a process of its own with the same settings (engine_side.py); sides alternate, and their
order changes from repeat to repeat. In a process every (batch, context) is driven step by step. With
--geometry weights and predictors are synthetic (synthetic.py): speed only; with --model they are a
checkpoint's, prompts are its own kind of text, and rows say `synthetic` False. Densities counted in the timed
steps stand in every row. The ratio of each repeat is taken, then their median; on a GPU it is printed beside
the roofline MODEL at the counted densities.

Sides: `dense` is vLLM's own OPT; `dejavu` the sparse one; `dejavu-dense` ours with mode "dense"; `hf` is
Hugging Face Transformers, eager, one point unless --hf-points all. Time per token is the host's clock between
two steps that gave tokens, with async scheduling as vLLM has it by default (rows say whether it was on): what
the host adds to a step beyond what that hides is in it, on both sides.

On a CPU vLLM's defaults hold (compiled, its own attention), engines use all cores this process may use, the
KV cache is as large as the largest point needs, and no point's prompts are read twice: short prompts warm an
engine up. `speed.csv` there has a row a point with all sides beside each other, made from all engine-*.csv of
the folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_side
import synthetic
from common import (
    Budget,
    Table,
    geometry,
    median,
    model_line,
    number,
    print_rows,
    provenance,
    read_rows,
    write_rows,
)
from engine_side import SMOKE_PROMPTS, build_llm, drive, environment, hf_points, steps_needed

from vllm_dejavu.roofline import GEOMETRIES, Geometry

__all__ = ["build_llm", "drive", "environment", "prepare"]  # what profile_step.py takes

VLLM_SIDES = ("dense", "dejavu", "dejavu-dense")
SIDES = (*VLLM_SIDES, "hf")
# Tokens of one step. An engine starts with a step of this size, which on 2 cores takes 1.3B in bf16 some
# seconds a thousand.
PREFILL_TOKENS = {"cuda": 8192, "cpu": 1024}
DTYPE = {"cuda": "float16", "cpu": "bfloat16"}
PREDICTOR_DTYPE = {"cuda": "float16", "cpu": "int8"}  # int8 is what `vllm-dejavu train` makes
PREFILLS = {"cuda": 0, "cpu": 3}
MAX_LEN = 2048
CPU_BLOCK = 128  # tokens of a block of vLLM's KV cache on a CPU
ESTIMATED_START_S = 60.0
RAISED = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Exit)\b")  # the last line of a traceback
BUSY_CORES = (
    0.1  # more than this with other processes: the row is no measurement of this machine (engine_side.Others)
)


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
    if error:  # of one that hung, the stack where it did
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(lines[-25:]))
        error += next((f" ({line[:200]})" for line in reversed(lines) if RAISED.match(line)), "")
    return (
        [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    ), error


def prepare(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What children need to know: of a geometry, whose synthetic model and artifact are made once per set of
    parameters, or of the model directory that `name` is one of."""
    args = complete(args)
    spec = real(args, name) if args.model else synthetic_model(args, name)
    g = Geometry(**spec["shape"])
    spec |= {k: getattr(args, k) for k in PASSED_ON}
    spec |= {
        "prefill_tokens": PREFILL_TOKENS[args.device],
        "max_model_len": min(MAX_LEN, g.positions - 2),
        "slots": max(args.batch),
    }
    if args.device == "cpu" and not args.dry_run:
        spec |= cpu_sizes(g, spec)
    if args.dry_run:
        spec |= {"dtype": "float32", "max_model_len": 256}
    return spec


# Options that children get as they are.
PASSED_ON = (
    "device",
    "dtype",
    "batch",
    "context",
    "blocks",
    "overlap",
    "mlp_lookahead",
    "survive",
    "spread",
    "seed",
    "steps",
    "warmup",
    "prefill",
    "temperature",
    "hf_points",
    "memory",
    "async_scheduling",
    "dense_projections",
    "dry_run",
)


def synthetic_model(args: argparse.Namespace, name: str) -> dict[str, Any]:
    g = geometry(name)
    rank = args.rank or synthetic.rank_of(g, args.predictor_dtype)
    profile, heads, source = synthetic.target(name, args.mlp_density, args.head_density)
    recipe = f"{zlib.crc32(Path(synthetic.__file__).read_bytes()):08x}"
    directory = (
        args.work
        / f"{name}-rank{rank}-{args.predictor_dtype}-mlp{profile[1]:g}-heads{heads:g}-{args.mlp_lookahead}"
        f"-spread{args.spread:g}-seed{args.seed}-{recipe}"
    )
    if not (directory / "dejavu" / "dejavu.json").exists():
        # in a process of its own, whose memory on the device is free again before an engine measures what is
        # left
        options = {
            "geometry": name,
            "output": directory,
            "rank": rank,
            "predictor-dtype": args.predictor_dtype,
            "mlp-density": args.mlp_density,
        }
        options |= {
            "head-density": args.head_density,
            "mlp-lookahead": args.mlp_lookahead,
            "spread": args.spread,
            "seed": args.seed,
        }
        subprocess.run(
            [
                sys.executable,
                synthetic.__file__,
                *(f"--{k}={v}" for k, v in options.items() if v is not None),
            ],
            check=True,
        )
    return {
        "geometry": name,
        "shape": dataclasses.asdict(g),
        "synthetic": True,
        "model": str(directory),
        "predictor": str(directory / "dejavu"),
        "rank": rank,
        "predictor_dtype": args.predictor_dtype,
        "mlp_asked": profile[1],
        "head_asked": heads,
        "densities_from": source,
    }


def real(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A model directory with its own weights, tokenizer and artifact; prompts out of the text."""
    from vllm_dejavu import artifact
    from vllm_dejavu.plan import find_model

    path = next(path for path in args.model if path.name == name)
    shape, _ = find_model(str(path))
    manifest, _ = artifact.load_manifest(path / "dejavu")
    gates = [layer["mlp"] for layer in manifest.layers if layer["mlp"].sparse]
    prompts = args.work / f"prompts-{name}-seed{args.seed}.json"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    windows = {
        context: text_prompts(
            path, args.text, context, max(*args.batch, engine_side.CALIBRATION_ROWS), args.seed
        )
        for context in args.context
    }
    prompts.write_text(json.dumps(windows), encoding="utf-8")
    return {
        "geometry": name,
        "shape": dataclasses.asdict(shape),
        "synthetic": False,
        "model": str(path),
        "predictor": None,
        "prompts": str(prompts),
        "rank": max((gate.rank for gate in gates), default=0),
        "predictor_dtype": "+".join(sorted({gate.dtype for gate in gates})),
        "mlp_asked": None,
        "head_asked": None,
        "densities_from": "the artifact's gates, real text",
    }


def text_prompts(model: Path, text: Path, length: int, count: int, seed: int) -> list[list[int]]:
    """[count] windows of `length` tokens, each with BOS in front, drawn from all over a text.

    Raises:
        DataError: the text has no window of that length.
    """
    from transformers import AutoTokenizer

    from vllm_dejavu.predictor_training import data

    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = data.tokenize(data.read_documents(str(text)), tokenizer)
    bos = json.loads((model / "config.json").read_text(encoding="utf-8")).get("bos_token_id", 2)
    return data.pack(documents, length, bos, max_tokens=count * length, seed=seed).tokens.tolist()


def cpu_sizes(g: Geometry, spec: dict[str, Any]) -> dict[str, int]:
    """Length, requests and KV cache that the points need, and no more.

    Points that need more positions than the model has are left out here; a side reports them as not fitting.
    """
    import torch

    slots = max(engine_side.CALIBRATION_ROWS, *spec["batch"])
    needs = [
        (batch, steps_needed(batch, context, spec))
        for batch, context in itertools.product(spec["batch"], spec["context"])
    ]
    needs = [(batch, needed) for batch, needed in needs if needed <= spec["max_model_len"]]
    longest = max([needed for _, needed in needs], default=spec["max_model_len"])
    longest = max(longest, min(spec["max_model_len"], 2 * engine_side.SHORT_PROMPT))  # calibration
    points = [*needs, (slots, 2 * engine_side.SHORT_PROMPT), (1, longest)]
    blocks = max(batch * -(-needed // CPU_BLOCK) for batch, needed in points) + 2  # vLLM keeps one for itself
    block_bytes = CPU_BLOCK * 2 * g.hidden * getattr(torch, spec["dtype"]).itemsize * g.num_layers
    return {"max_model_len": longest, "slots": slots, "kv_cache_bytes": blocks * block_bytes}


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


def ratios(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per point and side: dense time over this side's, of each repeat; beside it the model at the counted
    densities.
    """
    out = []
    keys = dict.fromkeys((r["geometry"], r["context"], r["batch"]) for r in rows)
    for name, context, batch in keys:
        at = [
            r
            for r in rows
            if (r["geometry"], r["context"], r["batch"]) == (name, context, batch) and r["status"] == "ok"
        ]
        dense = {r["repeat"]: r for r in at if r["side"] == "dense"}
        for side in (s for s in args.sides if s != "dense"):
            mine = [r for r in at if r["side"] == side]
            # Transformers runs once: against the dense run of its repeat
            pairs = [(dense[r["repeat"]], r) for r in mine if r["repeat"] in dense]
            point = {
                "geometry": name,
                "batch": batch,
                "context": context,
                "side": side,
                "synthetic": not args.model,
                "label": args.label,
            }
            if not pairs:
                if side != "hf" or mine:
                    out.append({**point, "speedup": "not measured"})
                continue
            values = [d["tpot_p50_ms"] / r["tpot_p50_ms"] for d, r in pairs]
            row = {
                **point,
                "dense_ms": median(d["tpot_p50_ms"] for d, _ in pairs),
                "side_ms": median(r["tpot_p50_ms"] for _, r in pairs),
                "speedup": median(values),
                "speedup_min": min(values),
                "speedup_max": max(values),
                "repeats": len(values),
                "ttft_ratio": median(d["ttft_p50_ms"] / r["ttft_p50_ms"] for d, r in pairs),
                "kv_ratio": pairs[0][1].get("kv_tokens", 0) / (pairs[0][0].get("kv_tokens") or 1),
                "async_scheduling": pairs[0][1].get("async_scheduling"),
            }
            last = mine[-1]
            if side == "dejavu":
                row |= {
                    k: last[k]
                    for k in (
                        "mlp_density",
                        "mlp_union_density",
                        "head_density",
                        "head_union_density",
                        "survivors",
                        "sparse_step_share",
                    )
                }
            if side == "dejavu" and not args.model:
                line, row["model_speedup"] = model_line(
                    name,
                    batch,
                    context,
                    provenance()["device"],
                    mlp_density=last["mlp_union_density"] or 1.0,
                    head_density=last["head_density"] or 1.0,
                    head_union_density=last["head_union_density"],
                    survivors=1.0 if last["survivors"] is None else last["survivors"],
                    predictor_rank=last["rank"],
                    predictor_dtype_bytes=1 if last["predictor_dtype"] == "int8" else 2,
                )
                print(line)
            out.append(row)
    return out


POINT = ("geometry", "label", "synthetic", "dtype", "mlp_asked", "head_asked", "batch", "context")
PROVENANCE = ("device", "commit", "torch", "vllm", "transformers")


def pivot(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a point (POINT), its sides beside each other. Ratios are above 1 where dejavu is faster; each
    is taken within a repeat, then the median.

    Args:
        rows: of engine-*.csv, values as numbers or as text; those without status ok are left out.

    Returns:
        Columns: mlp_density, head_density: per token as asked for, and where nothing was, as counted;
        *_counted and *_union: counted in the timed steps; dense_ms, dejavu_ms, dejavu_dense_ms, hf_ms: median
        time per token; speedup (min, max): dense / dejavu; dense_state_ratio: dense / dejavu-dense; hf_ratio:
        hf / dejavu; ttft_ratio, prefill_ratio: dense / dejavu to the first token of the batch, and of a lone
        prompt; *_gbps: weights read over time; others_cores: the most that other processes kept busy during
        the timed steps of any side. Empty: not measured.
    """
    groups: dict[tuple, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        if row.get("status") == "ok":
            key = tuple(str(row.get(k, "")) for k in POINT)
            groups.setdefault(key, {}).setdefault(row["side"], {})[int(row["repeat"])] = row
    out = []
    for sides in groups.values():
        dense, ours, ours_dense, hf = (
            sides.get(side, {}) for side in ("dense", "dejavu", "dejavu-dense", "hf")
        )
        if not dense:
            continue

        def middle(runs: dict[int, dict[str, Any]], what: str) -> float | None:
            values = [v for run in runs.values() if (v := number(run, what)) is not None]
            return median(values) if values else None

        def against(
            above: dict[int, dict[str, Any]], below: dict[int, dict[str, Any]], what: str
        ) -> list[float]:
            pairs = [(number(above[r], what), number(below[r], what)) for r in above.keys() & below.keys()]
            return [a / b for a, b in pairs if a is not None and b]

        def ratio(
            above: dict[int, dict[str, Any]], below: dict[int, dict[str, Any]], what: str
        ) -> float | None:
            values = against(above, below, what)
            return median(values) if values else None

        speedups, some = against(dense, ours, "tpot_p50_ms"), next(iter((ours or dense).values()))
        seen = {
            what: middle(ours, what)
            for what in (
                "mlp_density",
                "mlp_union_density",
                "head_density",
                "head_union_density",
                "survivors",
            )
        }
        asked = {block: number(some, f"{block}_asked") for block in ("mlp", "head")}
        out.append(
            {
                "geometry": some["geometry"],
                "batch": int(some["batch"]),
                "context": int(some["context"]),
                "mlp_density": seen["mlp_density"] if asked["mlp"] is None else asked["mlp"],
                "head_density": seen["head_density"] if asked["head"] is None else asked["head"],
                "dense_ms": middle(dense, "tpot_p50_ms"),
                "dejavu_ms": middle(ours, "tpot_p50_ms"),
                "speedup": median(speedups) if speedups else None,
                "speedup_min": min(speedups, default=None),
                "speedup_max": max(speedups, default=None),
                "repeats": len(speedups),
                "hf_ms": middle(hf, "tpot_p50_ms"),
                "hf_ratio": ratio(hf, ours, "tpot_p50_ms"),
                "dejavu_dense_ms": middle(ours_dense, "tpot_p50_ms"),
                "dense_state_ratio": ratio(dense, ours_dense, "tpot_p50_ms"),
                "ttft_ratio": ratio(dense, ours, "ttft_p50_ms"),
                "prefill_ratio": ratio(dense, ours, "prefill_ms"),
                "dense_state_prefill_ratio": ratio(dense, ours_dense, "prefill_ms"),
                "dense_p99_ms": middle(dense, "tpot_p99_ms"),
                "dejavu_p99_ms": middle(ours, "tpot_p99_ms"),
                "dense_prefill_ms": middle(dense, "prefill_ms"),
                "dejavu_prefill_ms": middle(ours, "prefill_ms"),
                "dense_gbps": middle(dense, "weight_gbps"),
                "dejavu_gbps": middle(ours, "weight_gbps"),
                "gbps_ratio": ratio(ours, dense, "weight_gbps"),
                "dense_weight_mb": middle(dense, "weight_mb"),
                "dejavu_weight_mb": middle(ours, "weight_mb"),
                "dense_memory_gb": middle(dense, "peak_memory_gb"),
                "dejavu_memory_gb": middle(ours, "peak_memory_gb"),
                "mlp_counted": seen["mlp_density"],
                "mlp_union": seen["mlp_union_density"],
                "head_counted": seen["head_density"],
                "head_union": seen["head_union_density"],
                "survivors": seen["survivors"],
                "sparse_step_share": middle(ours, "sparse_step_share"),
                "predictor_mb": middle(ours, "predictor_mb"),
                "others_cores": max(
                    (
                        v
                        for runs in sides.values()
                        for run in runs.values()
                        if (v := number(run, "others_cores")) is not None
                    ),
                    default=None,
                ),
                **{
                    k: some.get(k)
                    for k in (
                        "rank",
                        "predictor_dtype",
                        "dtype",
                        "threads",
                        "compilation",
                        "async_scheduling",
                        "densities_from",
                        "synthetic",
                        "weights",
                        "label",
                        "steps",
                        "seed",
                        "dry_run",
                    )
                },
                **{
                    k: ", ".join(
                        dict.fromkeys(
                            str(run[k]) for runs in sides.values() for run in runs.values() if run.get(k)
                        )
                    )
                    for k in PROVENANCE
                },
            }
        )
    # a real model's densities differ from point to point: not sorted by
    return sorted(
        out,
        key=lambda r: (
            r["geometry"],
            str(r["label"]),
            *((r["mlp_density"] or 0, r["head_density"] or 0) if str(r["synthetic"]) == "True" else (0, 0)),
            r["context"],
            r["batch"],
        ),
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


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Dense vLLM against dejavu, whole engines.")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        help="(not given: cuda where torch finds one; a dry run rehearses a GPU's)",
    )
    parser.add_argument("--geometry", nargs="+", choices=[*GEOMETRIES, "tiny"], default=["6.7b"])
    parser.add_argument(
        "--model",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="instead: a checkpoint with tokenizer and artifact (DIR/dejavu); takes --text",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="prompts for --model: .txt or .jsonl, also .xz, .gz"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="of the sampling (not given: 0; 1 with --model, lest greedy text repeat itself)",
    )
    parser.add_argument(
        "--mlp-density",
        type=float,
        help="neurons that one token selects (not given: the geometry's preset); unions are scaled with it",
    )
    parser.add_argument(
        "--head-density", type=float, help="heads that one token selects; 1: attention is not gated"
    )
    parser.add_argument(
        "--predictor-dtype", choices=synthetic.PREDICTOR_DTYPES, help="(not given: float16; int8 on a CPU)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of weights and KV cache (not given: float16; bfloat16 on a CPU)",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--context", nargs="+", type=int, default=[256, 1920], help="prompt tokens")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["dense", "dejavu"])
    parser.add_argument("--side", choices=SIDES, help="this side alone, once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps of a point")
    parser.add_argument("--warmup", type=int, default=8, help="decode steps before them")
    parser.add_argument(
        "--prefill",
        type=int,
        metavar="TIMES",
        help="also time a lone prompt of each context, so often (not given: 0; 3 on a CPU)",
    )
    parser.add_argument(
        "--hf-points",
        choices=["first", "all"],
        default="first",
        help="(batch, context) that hf is measured at",
    )
    parser.add_argument("--blocks", nargs="+", choices=["mlp", "attention"], default=["mlp", "attention"])
    parser.add_argument("--mlp-lookahead", choices=["self", "attn_input"], default="self")
    parser.add_argument(
        "--overlap", action="store_true", help="predict on a side stream; takes --mlp-lookahead attn_input"
    )
    parser.add_argument(
        "--survive", type=float, default=1.0, help="share of neurons that fc1 brings out positive for a token"
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="of the MLP predictor; a small one shows what its bytes cost (not given: 3%% of the MLP)",
    )
    parser.add_argument("--spread", type=float, default=0.0, help="densities of layers vary by this share")
    parser.add_argument(
        "--dense-projections",
        action="store_true",
        help="ablation: Q and out_proj read every head; head densities are not counted then",
    )
    parser.add_argument(
        "--async-scheduling",
        choices=["default", "on", "off"],
        default="default",
        help="on both sides (%(default)s: vLLM's)",
    )
    parser.add_argument("--memory", type=float, default=0.9, help="gpu_memory_utilization (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="put into file names and rows: the name of an ablation")
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "dejavu-bench",
        help="synthetic models (%(default)s)",
    )
    parser.add_argument(
        "--budget-s", type=float, help="stop starting points after this; they are reported as not run"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny geometry on the CPU, eager: the script, not the speed"
    )
    parser.add_argument(
        "--smoke", type=Path, metavar="MODEL", help="instead: both sides answer a prompt of this model"
    )
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """With every option: callers such as profile_step.py name a few; and with what follows from the
    device.
    """
    args = argparse.Namespace(**{**vars(options().parse_args([])), **vars(args)})
    if args.device is None:
        import torch

        # a dry run rehearses the GPU suite, unless told otherwise
        args.device = "cuda" if args.dry_run or torch.cuda.is_available() else "cpu"
    for name, defaults in {"dtype": DTYPE, "predictor_dtype": PREDICTOR_DTYPE, "prefill": PREFILLS}.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.device])
    if args.temperature is None:
        args.temperature = 1.0 if args.model else 0.0
    return args


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options()
    args = complete(parser.parse_args(argv))
    for name in ("mlp_density", "head_density"):
        if (density := getattr(args, name)) is not None and not 0 < density <= 1:
            parser.error(
                f"--{name.replace('_', '-')} {density} is out of range: a density is a share kept, in (0, 1]"
            )
    if args.model and not args.text:
        parser.error("--model needs --text FILE: its prompts")
    if args.model and (args.dry_run or args.mlp_density or args.head_density):
        parser.error(
            "--model brings its own geometry and densities: leave out --dry-run, --mlp-density and"
            " --head-density"
        )
    if args.overlap and args.mlp_lookahead == "self":
        parser.error(
            "--overlap needs --mlp-lookahead attn_input: what reads the MLP's own input cannot run before it"
        )
    if args.side:
        args.sides, args.repeats = [args.side], 1
    if args.dry_run:
        args.geometry, args.batch, args.context = (
            ["tiny"],
            [b for b in args.batch if b <= 8],
            [min(64, args.context[0])],
        )
        args.prefill = min(args.prefill, 2)
        args.steps, args.warmup, args.repeats = min(args.steps, 8), min(args.warmup, 2), min(args.repeats, 2)
    return args


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
        every = pivot(read_rows("engine-*.csv", args.output))
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
