"""Sides of an engine compared: the ratio of each repeat on a GPU, one row a point with all sides on a CPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from common import median, model_line, number, provenance


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
