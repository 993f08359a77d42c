"""Pictures and the Markdown table of predictor_study.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import figures
from common import read_rows

from vllm_dejavu import markdown


def plot(
    output: Path, forms: Sequence[tuple[str, str]], dtypes: Sequence[str], density_multiple: float
) -> None:
    """PNG of whatever CSV files are there. forms: (form, loss) of each line; dtypes: a column each."""
    if (plt := figures.pyplot()) is None:
        return

    def mean(group: list[dict[str, str]], key: str) -> float:
        return sum(float(r[key]) for r in group) / len(group)

    found = read_rows("forms.csv", output)
    if found:
        figure, axes = figures.panels(plt, 2, len(dtypes), width=4, height=3, sharex=True, layout="tight")
        for column, dtype in enumerate(dtypes):
            for name, loss in forms:
                for row, key in enumerate(("auc", "kept_energy")):
                    groups = defaultdict(list)
                    for r in found:
                        if (r["form"], r["loss"], r["dtype"]) == (name, loss, dtype):
                            groups[float(r["byte_budget"])].append(r)
                    if groups:
                        axes[row][column].plot(
                            sorted(groups),
                            [mean(groups[b], key) for b in sorted(groups)],
                            "o-",
                            label=f"{name}, {loss}",
                            ms=3,
                        )
            axes[0][column].set_title(dtype)
            axes[1][column].set_xlabel("predictor bytes / MLP bytes")
        axes[0][0].set_ylabel("AUC")
        axes[1][0].set_ylabel(f"kept energy at {density_multiple} x natural")
        axes[0][0].legend(fontsize=7)
        figures.save(figure, output / "forms.png", dpi=120)
    found = read_rows("data.csv", output)
    if found:
        figure, [[ax]] = figures.panels(plt, 1, 1, width=5.5, layout="tight")
        points = sorted(
            (int(r["tokens"]), 100 * float(r["ppl_increase"])) for r in found if r["form"] == "closed_form"
        )
        ax.semilogx(*zip(*points, strict=True), "o", label="closed form, a point a seed")
        for r in found:
            if r["form"] == "svd":
                ax.axhline(100 * float(r["ppl_increase"]), color="grey", ls="--", lw=0.8)
        ax.set(
            xlabel="training tokens (dashed: svd, none)",
            ylabel=f"perplexity rise, %, MLPs at {density_multiple} x natural",
            ylim=(0, None),
        )
        ax.legend(fontsize=8)
        figures.save(figure, output / "data.png", dpi=120)
    found = read_rows("heads.csv", output)
    if found:
        figure, [[ax]] = figures.panels(plt, 1, 1, width=5.5, layout="tight")
        for name in dict.fromkeys(r["selection"] for r in found):
            points = sorted(
                (float(r["head_density"]), 100 * float(r["ppl_increase"]))
                for r in found
                if r["selection"] == name
            )
            ax.plot(*zip(*points, strict=True), "o", label=name)
        ax.set(xlabel="mean head density", ylabel="perplexity rise, % (held-out text, MLPs dense)")
        ax.legend(fontsize=7)
        figures.save(figure, output / "heads.png", dpi=120)


def summary(output: Path) -> str:
    """Markdown of the forms: means over layers; of those, mean and range over seeds."""
    rows = read_rows("forms.csv", output)
    if not rows:
        return ""
    groups: dict[tuple, dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        groups[r["dtype"], float(r["byte_budget"]), int(r["rank"]), r["form"], r["loss"]][r["seed"]].append(r)
    keys = ("auc", "recall", "kept_energy")
    lines = []
    for (dtype, budget, rank, form, loss), seeds in sorted(groups.items()):
        cells = [dtype, f"{100 * budget:g}%", str(rank), form, loss, str(len(seeds))]
        for key in keys:
            means = [sum(float(r[key]) for r in rows) / len(rows) for rows in seeds.values()]
            cells.append(f"{sum(means) / len(means):.4f} ({min(means):.4f}-{max(means):.4f})")
        lines.append(cells)
    header = ["weights", "bytes", "rank", "form", "loss", "seeds", *keys]
    return "\n".join(markdown.table(header, lines))
