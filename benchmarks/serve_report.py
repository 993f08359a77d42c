"""What bench_serve.py shows: ratios of both sides a rate, as CSV, Markdown and a picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import figures
import tables
from common import median, number, read_rows, write_rows
from engine_columns import BUSY_CORES
from engine_ratios import PROVENANCE
from engine_sides import STOCK

TIMES = ("tpot_p50_ms", "tpot_p99_ms", "ttft_p50_ms", "ttft_p99_ms")


def sides_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The names of both sides: `stock` and `ours`.

    Raises:
        ValueError: rows of more sides than one of each.
    """
    names = dict.fromkeys(row["side"] for row in rows)
    stock, ours = [n for n in names if n in STOCK], [n for n in names if n not in STOCK]
    if len(stock) > 1 or len(ours) > 1:
        raise ValueError(
            f"serve.csv has the sides {list(names)}, expected one of stock vLLM and one of ours: give each"
            " pair an --output of its own."
        )
    return {"stock": (stock or ["dense"])[0], "ours": (ours or ["dejavu"])[0]}


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a rate, both sides beside each other.

    Args:
        rows: of serve.csv, values as numbers or as text; those without status ok are left out, but for their
            failed requests.

    Returns:
        Columns: stock, ours: which sides; stock_*, ours_*: medians over repeats; *_ratio, with _min and _max
        over repeats: stock / ours of times, ours / stock of output_tokens_per_s. None where no repeat has
        both sides.
    """
    out, names = [], sides_of(rows)
    for rate in sorted({float(row["request_rate"]) for row in rows}):
        every = [row for row in rows if float(row["request_rate"]) == rate]
        at = [row for row in every if row["status"] == "ok"]
        sides = {
            which: {int(row["repeat"]): row for row in at if row["side"] == name}
            for which, name in names.items()
        }
        stock, ours = sides["stock"], sides["ours"]
        pairs = [(stock[repeat], ours[repeat]) for repeat in sorted(stock.keys() & ours.keys())]

        def middle(side: str, what: str) -> float | None:
            values = [v for row in sides[side].values() if (v := number(row, what)) is not None]  # noqa: B023
            return median(values) if values else None

        result: dict[str, Any] = {"request_rate": rate, "repeats": len(pairs), **names}
        for what in (*TIMES, "output_tokens_per_s", "request_rate_achieved"):
            result |= {f"{side}_{what}": middle(side, what) for side in names}
        for what in (*TIMES, "output_tokens_per_s"):
            above, below = (1, 0) if what == "output_tokens_per_s" else (0, 1)
            values = [
                a / b
                for pair in pairs
                if (a := number(pair[above], what)) is not None and (b := number(pair[below], what))
            ]
            name = what.removesuffix("_ms")
            result |= {
                f"{name}_ratio": median(values) if values else None,
                f"{name}_ratio_min": min(values, default=None),
                f"{name}_ratio_max": max(values, default=None),
            }
        for what in (
            "sparse_step_share",
            "mlp_density",
            "mlp_union_density",
            "head_density",
            "head_union_density",
            "cache_density",
            "survivors",
            "tokens_per_step",
        ):
            result[what] = middle("ours", what)
        result |= {
            f"{which}_failed": sum(int(row["failed"]) for row in every if row["side"] == name)
            for which, name in names.items()
        }
        result["others_cores"] = max(
            (v for row in at if (v := number(row, "others_cores")) is not None), default=None
        )
        kept = (
            "requests",
            "input_len",
            "output_len",
            "temperature",
            "dtype",
            "prompts",
            "seed",
            "max_num_seqs",
            "server_options",
            "weights",
            "synthetic",
            "dry_run",
        )
        result |= {
            "benchmark": "serve ratio",
            "model": every[0].get("model"),
            **{k: every[0].get(k) for k in kept},
        }
        result |= {
            k: ", ".join(dict.fromkeys(str(row[k]) for row in every if row.get(k))) for k in PROVENANCE
        }
        out.append(result)
    return out


def cell(row: Mapping[str, Any], key: str, form: str) -> str:
    return tables.cell(number(row, key), form)


def ranged(row: Mapping[str, Any], name: str) -> str:
    if number(row, name) is None:
        return "-"
    return (
        f"**{cell(row, name, '.2f')}x** ({cell(row, f'{name}_min', '.2f')}-{cell(row, f'{name}_max', '.2f')})"
    )


COLUMNS = (
    (
        "requests/s",
        lambda r: "all at once" if math.isinf(float(r["request_rate"])) else f"{float(r['request_rate']):g}",
    ),
    ("achieved, {stock}", lambda r: cell(r, "stock_request_rate_achieved", ".2f")),
    ("{ours}", lambda r: cell(r, "ours_request_rate_achieved", ".2f")),
    ("TPOT p50 ms, {stock}", lambda r: cell(r, "stock_tpot_p50_ms", ".1f")),
    ("{ours}", lambda r: cell(r, "ours_tpot_p50_ms", ".1f")),
    ("{stock} / {ours} (range)", lambda r: ranged(r, "tpot_p50_ratio")),
    ("p99", lambda r: ranged(r, "tpot_p99_ratio")),
    ("TTFT p50 ms, {stock}", lambda r: cell(r, "stock_ttft_p50_ms", ".0f")),
    ("{ours}", lambda r: cell(r, "ours_ttft_p50_ms", ".0f")),
    ("{stock} / {ours} (range)", lambda r: ranged(r, "ttft_p50_ratio")),
    ("p99", lambda r: ranged(r, "ttft_p99_ratio")),
    ("tokens/s, {stock}", lambda r: cell(r, "stock_output_tokens_per_s", ".1f")),
    ("{ours}", lambda r: cell(r, "ours_output_tokens_per_s", ".1f")),
    ("{ours} / {stock} (range)", lambda r: ranged(r, "output_tokens_per_s_ratio")),
    ("sparse steps", lambda r: cell(r, "sparse_step_share", ".0%")),
    (
        "MLP density (union)",
        lambda r: f"{cell(r, 'mlp_density', '.2f')} ({cell(r, 'mlp_union_density', '.2f')})",
    ),
    (
        "head density (union)",
        lambda r: f"{cell(r, 'head_density', '.2f')} ({cell(r, 'head_union_density', '.2f')})",
    ),
    ("failed", lambda r: str(int(number(r, "stock_failed") or 0) + int(number(r, "ours_failed") or 0))),
)


def alone(rows: Sequence[Mapping[str, Any]]) -> str:
    """A warning where others were busy on the CPU that was measured."""
    busy = max((number(row, "others_cores") or 0.0 for row in rows), default=0.0)
    return (
        f"; NOT ALONE: other processes kept up to {busy:.2f} cores busy"
        if busy > BUSY_CORES and any(str(r["device"]).startswith("CPU") for r in rows)
        else ""
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of `ratios`, with a line of what was served."""
    first = rows[0]
    about = (
        f"{first['model']}, {first['dtype']}; {first['requests']} requests of {first['input_len']} +"
        f" {first['output_len']} tokens, {first['prompts']}; {first['device']};"
        f" {max(int(r['repeats']) for r in rows)} repeats"
    )
    about += alone(rows)
    if str(first["dry_run"]) == "True":
        about += "; DRY RUN, no measurement"
    named = [(name.format(**first), value) for name, value in COLUMNS]
    return "\n".join([about, "", *tables.of_columns(named, rows)])


def plot(directory: Path, pyplot: Any) -> None:
    """TPOT and TTFT by request rate, bars from the fastest to the slowest repeat; share of sparse steps and
    densities.
    """
    rows = [row for row in read_rows("serve.csv", directory) if row["status"] == "ok"]
    if not rows:
        return
    rates, names = sorted({float(row["request_rate"]) for row in rows}), sides_of(rows)
    groups = defaultdict(list)
    for row in rows:
        groups[row["side"], rates.index(float(row["request_rate"]))].append(row)
    figure, [axes] = figures.panels(pyplot, 1, 3)

    def curve(axis: Any, side: str, what: str, label: str, **style: Any) -> None:
        points = []
        for place in range(len(rates)):
            values = [v for row in groups.get((side, place), ()) if (v := number(row, what)) is not None]
            if values:
                points.append((place, median(values), min(values), max(values)))
        if points:
            places, middle, low, high = zip(*points, strict=True)
            axis.errorbar(
                places,
                middle,
                yerr=figures.bars(middle, low, high),
                marker="o",
                capsize=3,
                label=label,
                **style,
            )

    for axis, what, name in zip(
        axes,
        ("tpot_p50_ms", "ttft_p50_ms"),
        ("time per output token, p50, ms", "time to first token, p50, ms"),
        strict=False,
    ):
        for side in names.values():
            curve(axis, side, what, side)
        axis.set(title=name)
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")  # at saturation requests queue
    for each in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
        each("{x:g}")
    curve(axes[2], names["ours"], "sparse_step_share", "sparse steps", color="black")
    for what, label in (
        ("mlp_density", "neurons per token"),
        ("mlp_union_density", "neurons per step"),
        ("head_density", "heads per token"),
        ("head_union_density", "heads per step"),
    ):
        curve(axes[2], names["ours"], what, label, linestyle=":")
    axes[2].set(title="shares: sparse steps, densities in them", ylim=(0, 1.05))
    for axis in axes:
        axis.set_xticks(
            range(len(rates)), ["all at once" if math.isinf(rate) else f"{rate:g}" for rate in rates]
        )
        axis.set_xlabel("requests a second")
        axis.legend(fontsize=7)
    first = rows[0]
    title = (
        f"{figures.dry_run(rows)}Serving {first['model']}, {first['dtype']}, {first['input_len']} +"
        f" {first['output_len']} tokens\nprompts: {first['prompts']}\n{figures.provenance(rows)}{alone(rows)}"
    )
    print(figures.save(figure, directory / "serve.png", title))


def report(directory: Path) -> None:
    """serve-ratios.csv, the Markdown table and the picture of a folder's serve.csv."""
    rows = read_rows("serve.csv", directory)
    if not rows:
        print(f"bench_serve: {directory}/serve.csv has no rows")
        return
    table = ratios(rows)
    write_rows(directory / "serve-ratios.csv", table)
    print("\n" + markdown(table))
    if (plt := figures.pyplot()) is not None:
        plot(directory, plt)
