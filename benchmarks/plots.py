"""PNG from the CSV files of the other benchmarks; without matplotlib it says so and ends well.

python benchmarks/plots.py results/
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from common import number, pyplot, read_rows


def scale(axis: Any, rows: list[dict[str, str]]) -> None:
    batches = sorted({int(r["batch"]) for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(b) for b in batches])
    axis.minorticks_off()


def finish(figure: Any, path: Path, title: str, rows: list[dict[str, str]]) -> None:
    where = (
        ", ".join(sorted({r["device"] for r in rows}))
        + "; commit "
        + ", ".join(sorted({r["commit"] for r in rows}))
    )
    dry = "DRY RUN, NO MEASUREMENT; " if any(r.get("dry_run") == "True" for r in rows) else ""
    real = {r.get("synthetic") == "False" for r in rows}
    kind = {(False,): "synthetic weights and selections", (True,): "real weights and text"}.get(
        tuple(real), "synthetic and real weights"
    )
    figure.suptitle(f"{dry}{title}\n{kind}\n{where}", fontsize=9)
    figure.savefig(path, dpi=130)
    print(path)


def plot_engine(directory: Path, pyplot: Any) -> None:
    """Speed-up over dense by batch, bars from the slowest to the fastest repeat; dotted: the roofline
    model.
    """
    rows = [r for r in read_rows("engine-*-ratios.csv", directory) if number(r, "speedup") is not None]
    groups = defaultdict(list)
    for row in rows:
        groups[row["geometry"], row["context"]].append(row)
    if not groups:
        return
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4.5 * len(groups), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, ((name, context), group) in zip(axes[0], groups.items(), strict=True):
        lines = defaultdict(list)
        for row in group:
            lines[" ".join(filter(None, (row["side"], row["label"])))].append(row)
        for label, points in lines.items():
            points.sort(key=lambda r: int(r["batch"]))
            batches, speedups = [int(r["batch"]) for r in points], [number(r, "speedup") for r in points]
            spread = [
                [s - number(r, "speedup_min") for s, r in zip(speedups, points, strict=True)],
                [number(r, "speedup_max") - s for s, r in zip(speedups, points, strict=True)],
            ]
            bars = axis.errorbar(batches, speedups, yerr=spread, marker="o", capsize=3, label=label)
            modelled = [(int(r["batch"]), m) for r in points if (m := number(r, "model_speedup")) is not None]
            if modelled:
                axis.plot(
                    *zip(*modelled, strict=True), ":", color=bars[0].get_color(), label=f"{label}: MODEL"
                )
        scale(axis, group)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{name}, context {context}", xlabel="batch")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("time per token, dense / side")
    finish(figure, directory / "engine.png", "Decode speed over dense vLLM", rows)


def plot_speed(directory: Path, pyplot: Any) -> None:
    """Of a CPU: speed-up over dense by batch, bars from the slowest to the fastest repeat; crosses:
    Transformers.
    """
    rows = [r for r in read_rows("speed.csv", directory) if number(r, "speedup") is not None]
    groups = defaultdict(list)
    for row in rows:
        groups[row["geometry"], int(row["context"])].append(row)
    if not groups:
        return
    columns = min(len(groups), 4)
    lines_of = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        lines_of,
        columns,
        figsize=(4.5 * columns, 4 * lines_of),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, ((name, context), group) in zip(axes.flat, sorted(groups.items()), strict=False):
        lines = defaultdict(list)
        for row in group:
            lines[
                f"MLP {number(row, 'mlp_density') or 1:.3g}, heads {number(row, 'head_density') or 1:.3g}"
                f" {row['label']}".strip()
            ].append(row)
        for label, points in lines.items():
            points.sort(key=lambda r: int(r["batch"]))
            speedups = [number(r, "speedup") for r in points]
            spread = [
                [s - number(r, "speedup_min") for s, r in zip(speedups, points, strict=True)],
                [number(r, "speedup_max") - s for s, r in zip(speedups, points, strict=True)],
            ]
            axis.errorbar(
                [int(r["batch"]) for r in points], speedups, yerr=spread, marker="o", capsize=3, label=label
            )
        hf = [(int(r["batch"]), number(r, "dense_ms") / ms) for r in group if (ms := number(r, "hf_ms"))]
        if hf:
            axis.plot(*zip(*hf, strict=True), "x", color="black", label="Transformers")
        scale(axis, group)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{name}, context {context}", xlabel="batch")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for row_of_axes in axes:
        row_of_axes[0].set_ylabel("time per token, dense / side")
    finish(figure, directory / "speed.png", "Decode speed over dense vLLM", rows)


def plot_kernels(directory: Path, pyplot: Any) -> None:
    """Share of the speed of a contiguous read, by batch, preset densities only."""
    rows = [
        r
        for r in read_rows("kernels.csv", directory)
        if number(r, "of_read") is not None and r["densities_from"] != "given"
    ]
    groups = defaultdict(list)
    for row in rows:
        groups[row["geometry"]].append(row)
    if not groups:
        return
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4.5 * len(groups), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (name, group) in zip(axes[0], groups.items(), strict=True):
        for kernel in dict.fromkeys(r["kernel"] for r in group):
            points = sorted((int(r["batch"]), number(r, "of_read")) for r in group if r["kernel"] == kernel)
            axis.plot(*zip(*points, strict=True), marker="o", label=kernel)
        scale(axis, group)
        axis.axhline(0.8, color="grey", linestyle="--", linewidth=0.8)
        axis.set(title=name, xlabel="batch", ylim=(0, 1.1))
    axes[0][0].set_ylabel("speed / contiguous read of the same bytes")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    finish(figure, directory / "kernels.png", "Kernels; dashed: the goal at 30B shapes", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="CSV of the benchmarks to PNG.")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    if (plt := pyplot()) is not None:
        for plot in (plot_engine, plot_speed, plot_kernels):
            plot(args.directory, plt)


if __name__ == "__main__":
    main()
