"""Pictures of the quality study: quality against sparsity, and how long continuations stay dense's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import figures
import numpy as np
from common import number
from quality_tasks import BLOCK_SETS, MODES, NAMES, OWN

COLOURS = {"oracle": "tab:green", "predictor": "tab:blue", "random": "tab:red", "static": "tab:orange"}


def plot(output: Path, tables: dict[str, list[dict[str, str]]]) -> list[Path]:
    """PNG of the tables that have rows; nothing without matplotlib."""
    if (plt := figures.pyplot()) is None:
        return []
    made = []
    rows = tables["sweep"]
    for metric, name in (("nll", "quality_perplexity"), ("accuracy", "quality_accuracy")):
        tasks = list(dict.fromkeys(r["task"] for r in rows if r["metric"] == metric))
        blocks = [b for b in BLOCK_SETS if any(r["blocks"] == b and r["mode"] != "dense" for r in rows)]
        if tasks and blocks:
            made.append(plot_sweep(output / f"{name}.png", rows, tasks, blocks, metric, plt))
    if tables["generation"]:
        made.append(plot_generation(output / "quality_generation.png", tables["generation"], plt))
    return made


def plot_sweep(
    path: Path, rows: list[dict[str, str]], tasks: list[str], blocks: list[str], metric: str, pyplot: Any
) -> Path:
    """A row of panels a task, a column a block set; bars: standard errors of the paired difference to
    dense.
    """
    figure, axes = figures.panels(
        pyplot, len(tasks), len(blocks), width=4.2, height=2.9, sharex="col", sharey="row"
    )
    for line, task in zip(axes, tasks, strict=True):
        dense = next((r for r in rows if r["task"] == task and r["mode"] == "dense"), None)
        for axis, block in zip(line, blocks, strict=True):
            if dense is not None:
                centre, se = (
                    (0.0, number(dense, "value_se") or 0.0)
                    if metric == "nll"
                    else (number(dense, "value"), number(dense, "value_se") or 0.0)
                )
                low, high = (
                    (math.exp(centre - se), math.exp(centre + se))
                    if metric == "nll"
                    else (centre - se, centre + se)
                )
                axis.axhspan(low, high, color="grey", alpha=0.25, lw=0)
                axis.axhline(
                    math.exp(centre) if metric == "nll" else centre, color="grey", lw=0.8, label="dense"
                )
                if metric == "accuracy" and number(dense, "chance") is not None:
                    axis.axhline(number(dense, "chance"), color="black", ls=":", lw=0.8, label="chance")
            for mode in MODES:
                found = [r for r in rows if (r["task"], r["blocks"], r["mode"]) == (task, block, mode)]
                for own in (False, True):
                    part = sorted(
                        (r for r in found if (r["density"] == OWN) == own),
                        key=lambda r: float(r["total_sparsity"]),
                    )
                    if not part:
                        continue
                    x = [float(r["total_sparsity"]) for r in part]
                    if metric == "nll":
                        y = [1 + float(r["ppl_increase"]) for r in part]
                        bars = [number(r, "ppl_increase_se") or 0.0 for r in part]
                        bars = [[min(b, 0.99 * v) for b, v in zip(bars, y, strict=True)], bars]
                    else:
                        y, bars = (
                            [float(r["value"]) for r in part],
                            [number(r, "difference_se") or 0.0 for r in part],
                        )
                    axis.errorbar(
                        x,
                        y,
                        yerr=bars,
                        fmt="*" if own else "o-",
                        ms=11 if own else 3.5,
                        lw=1.2,
                        capsize=2,
                        color=COLOURS[mode],
                        label="predictor, as calibrated" if own else mode,
                        zorder=3 if own else 2,
                    )
            if metric == "nll":
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if task == tasks[0]:
                axis.set_title(NAMES[block])
            if task == tasks[-1]:
                axis.set_xlabel("total sparsity (weight bytes not read, batch 1)")
        line[0].set_ylabel(f"{task}\nperplexity / dense" if metric == "nll" else f"{task}\naccuracy")
    axes[-1][0].legend(fontsize=7)
    title = "Band: dense ± its standard error; bars: standard error of the paired difference to dense"
    return figures.save(figure, path, title, dpi=120)


def plot_generation(path: Path, rows: list[dict[str, str]], pyplot: Any) -> Path:
    """Share of prompts whose continuation is still dense's, by position, with its standard error."""
    length, baseline = int(rows[0]["new_tokens"]), rows[0]["dtype"]
    figure, [axes] = figures.panels(pyplot, 1, 2, height=3.6, sharey=True)
    for axis, decoding in zip(axes, ("greedy", "sampled"), strict=True):
        for mode, dtype in dict.fromkeys((r["mode"], r["dtype"]) for r in rows):
            if (mode, dtype) == ("dense", baseline):
                continue
            agreement = np.array(
                [
                    float(r["agreement"])
                    for r in rows
                    if (r["decoding"], r["mode"], r["dtype"]) == (decoding, mode, dtype)
                ]
            )
            x = np.arange(1, length + 1)
            share = (agreement[:, None] >= x[None, :]).mean(0)
            error = np.sqrt(share * (1 - share) / len(agreement))
            axis.plot(x, share, label=f"{mode}, {dtype}")
            axis.fill_between(x, share - error, share + error, alpha=0.25)
        axis.set(title=decoding, xlabel="new tokens", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel(f"share still as dense in {baseline}")
    return figures.save(figure, path, dpi=120)
