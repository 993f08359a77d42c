"""PNG from the CSV files of the other benchmarks; without matplotlib it says so and ends well.

python benchmarks/plots.py results/
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import figures
from common import number, read_rows


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
    figure, axes = figures.panels(pyplot, 1, len(groups), sharey=True)
    for axis, ((name, context), group) in zip(axes[0], groups.items(), strict=True):
        lines = defaultdict(list)
        for row in group:
            lines[" ".join(filter(None, (row["side"], row["label"])))].append(row)
        for label, points in lines.items():
            points.sort(key=lambda r: int(r["batch"]))
            batches, speedups = [int(r["batch"]) for r in points], [number(r, "speedup") for r in points]
            ends = ([number(r, f"speedup_{end}") for r in points] for end in ("min", "max"))
            spread = figures.bars(speedups, *ends)
            bars = axis.errorbar(batches, speedups, yerr=spread, marker="o", capsize=3, label=label)
            modelled = [(int(r["batch"]), m) for r in points if (m := number(r, "model_speedup")) is not None]
            if modelled:
                axis.plot(
                    *zip(*modelled, strict=True), ":", color=bars[0].get_color(), label=f"{label}: MODEL"
                )
        figures.batch_axis(axis, group)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{name}, context {context}", xlabel="batch")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("time per token, dense / side")
    figures.save_measured(figure, directory / "engine.png", "Decode speed over dense vLLM", rows)


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
    figure, axes = figures.panels(pyplot, lines_of, columns, sharey=True)
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
            ends = ([number(r, f"speedup_{end}") for r in points] for end in ("min", "max"))
            spread = figures.bars(speedups, *ends)
            axis.errorbar(
                [int(r["batch"]) for r in points], speedups, yerr=spread, marker="o", capsize=3, label=label
            )
        hf = [(int(r["batch"]), number(r, "dense_ms") / ms) for r in group if (ms := number(r, "hf_ms"))]
        if hf:
            axis.plot(*zip(*hf, strict=True), "x", color="black", label="Transformers")
        figures.batch_axis(axis, group)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{name}, context {context}", xlabel="batch")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for row_of_axes in axes:
        row_of_axes[0].set_ylabel("time per token, dense / side")
    figures.save_measured(figure, directory / "speed.png", "Decode speed over dense vLLM", rows)


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
    figure, axes = figures.panels(pyplot, 1, len(groups), sharey=True)
    for axis, (name, group) in zip(axes[0], groups.items(), strict=True):
        for kernel in dict.fromkeys(r["kernel"] for r in group):
            points = sorted((int(r["batch"]), number(r, "of_read")) for r in group if r["kernel"] == kernel)
            axis.plot(*zip(*points, strict=True), marker="o", label=kernel)
        figures.batch_axis(axis, group)
        axis.axhline(0.8, color="grey", linestyle="--", linewidth=0.8)
        axis.set(title=name, xlabel="batch", ylim=(0, 1.1))
    axes[0][0].set_ylabel("speed / contiguous read of the same bytes")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figures.save_measured(figure, directory / "kernels.png", "Kernels; dashed: the goal at 30B shapes", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="CSV of the benchmarks to PNG.")
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    if (plt := figures.pyplot()) is not None:
        for plot in (plot_engine, plot_speed, plot_kernels):
            plot(args.directory, plt)


if __name__ == "__main__":
    main()
