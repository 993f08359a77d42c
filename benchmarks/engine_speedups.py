"""Our sides over the fastest that stock vLLM offers at each point, and over stock vLLM with as many bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import median, number
from engine_ratios import POINT, PROVENANCE
from engine_sides import SIDES, STOCK
from quantized import KERNELS

COLUMNS = (
    "geometry",
    "label",
    "batch",
    "context",
    "side",
    "side_ms",
    "stock",
    "stock_ms",
    "speedup",
    "speedup_min",
    "speedup_max",
    "repeats",
    "same_bits",
    "same_bits_speedup",
    "prefill_ratio",
    "ttft_ratio",
    "byte_limit_share",
)

Runs = dict[int, dict[str, Any]]  # by repeat


def _medians(sides: dict[str, Runs], what: str) -> dict[str, float]:
    found = {
        side: [v for run in runs.values() if (v := number(run, what)) is not None]
        for side, runs in sides.items()
    }
    return {side: median(values) for side, values in found.items() if values}


def _ratios(above: Runs, below: Runs, what: str) -> list[float]:
    pairs = [(number(above[r], what), number(below[r], what)) for r in sorted(above.keys() & below.keys())]
    return [a / b for a, b in pairs if a is not None and b]


def speedups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a point and side of ours. Ratios are above 1 where ours is faster; each is taken within a
    repeat, then the median.

    Args:
        rows: of engine-*.csv, values as numbers or as text; those without status ok are left out.

    Returns:
        Columns: weight_bits, head_bits: of the side. side_ms, stock_ms: median time per token. stock,
        stock_kernel: the side of stock vLLM with the least median, and the kernel of its linears that its log
        named. speedup (min, max): its time over ours. same_bits, same_bits_speedup: likewise, of the stock
        side whose layers have our bits. dense_speedup: of stock in 16 bits. ttft_ratio, prefill_ratio: over
        the stock side that is fastest in that: to the first token of a batch, and of a lone prompt.
        byte_limit_ms: weights and cache read (`cache_mb`, where a row has it), at `read_gbps`, what this
        machine's memory delivers; byte_limit_share: that over side_ms. Empty: not measured.
    """
    groups: dict[tuple, dict[str, Runs]] = {}
    for row in rows:
        if row.get("status") == "ok":
            key = tuple(str(row.get(k, "")) for k in POINT)
            groups.setdefault(key, {}).setdefault(row["side"], {})[int(row["repeat"])] = row
    out = []
    for sides in groups.values():
        stock = {name: sides[name] for name in STOCK if name in sides}
        if stock.keys() <= {"dense"}:  # speed.csv has that
            continue
        times = _medians(sides, "tpot_p50_ms")
        fastest = min(stock, key=times.__getitem__)
        for name, runs in sides.items():
            side = SIDES[name]
            if side.impl != "dejavu":
                continue
            same = next((s for s in stock if SIDES[s].bits == side.bits), None)
            some = next(iter(runs.values()))
            over = _ratios(stock[fastest], runs, "tpot_p50_ms")
            megabytes, gbps = (_medians({name: runs}, what).get(name) for what in ("weight_mb", "read_gbps"))
            cache = _medians({name: runs}, "cache_mb").get(name)
            limit = (megabytes + (cache or 0)) / gbps if megabytes and gbps else None

            def over_fastest(what: str, runs: Runs = runs, stock: dict[str, Runs] = stock) -> float | None:
                found = _medians(stock, what)
                values = _ratios(stock[min(found, key=found.__getitem__)], runs, what) if found else []
                return median(values) if values else None

            def over_side(
                other: str | None, runs: Runs = runs, stock: dict[str, Runs] = stock
            ) -> float | None:
                values = _ratios(stock.get(other or "", {}), runs, "tpot_p50_ms")
                return median(values) if values else None

            out.append(
                {
                    **{k: some.get(k) for k in POINT if k not in ("batch", "context")},
                    "batch": int(some["batch"]),
                    "context": int(some["context"]),
                    "side": name,
                    "weight_bits": side.bits,
                    "head_bits": side.head_bits,
                    "side_ms": times[name],
                    "stock": fastest,
                    "stock_kernel": KERNELS.get(SIDES[fastest].scheme or ""),
                    "stock_ms": times[fastest],
                    "speedup": median(over) if over else None,
                    "speedup_min": min(over, default=None),
                    "speedup_max": max(over, default=None),
                    "repeats": len(over),
                    "same_bits": same,
                    "same_bits_speedup": over_side(same),
                    "dense_speedup": over_side("dense"),
                    "ttft_ratio": over_fastest("ttft_p50_ms"),
                    "prefill_ratio": over_fastest("prefill_ms"),
                    "weight_mb": megabytes,
                    "cache_mb": cache,
                    "read_gbps": gbps,
                    "byte_limit_ms": limit,
                    "byte_limit_share": limit / times[name] if limit else None,
                    **{
                        f"{what}_counted": _medians({name: runs}, what).get(name)
                        for what in (
                            "mlp_density",
                            "mlp_union_density",
                            "head_density",
                            "head_union_density",
                            "cache_density",
                        )
                    },
                    "memory_gb": _medians({name: runs}, "peak_memory_gb").get(name),
                    "stock_memory_gb": _medians(stock, "peak_memory_gb").get(fastest),
                    **{k: some.get(k) for k in (*PROVENANCE, "threads", "dry_run")},
                }
            )
    order = list(SIDES)
    return sorted(
        out,
        key=lambda r: (r["geometry"], str(r["label"]), r["context"], order.index(r["side"]), r["batch"]),
    )
