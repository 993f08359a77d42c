"""What a training run shows: metrics as JSON lines, plots, and a card beside the artifact."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vllm_dejavu.artifact import Artifact
from vllm_dejavu.manifest import Manifest
from vllm_dejavu.predictor_training.masked import SCORE_BINS

LIBRARY = "vllm-dejavu"
BLOCKS = {"mlp": "MLP neurons", "attention": "attention heads"}


def say(text: str) -> None:
    """To whoever watches the run: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


class Log:
    """metrics.jsonl: a JSON object a line, with `stage` and `time` (seconds since the epoch). A resumed run
    appends.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, stage: str, **values: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"stage": stage, "time": round(time.time(), 3), **values}) + "\n")


def plot(directory: Path, manifest: Manifest, histograms: dict[tuple[int, str], torch.Tensor]) -> list[Path]:
    """layers.png (density, oracle density and recall by layer), scores.png, curve.png. Without matplotlib:
    none, and a line that says so.
    """
    try:
        import matplotlib
    except ImportError:
        say("plots left out: matplotlib is not installed (pip install 'vllm-dejavu[train]')")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)

    def save(figure: Any, name: str) -> Path:
        figure.tight_layout()
        figure.savefig(directory / name, dpi=120)
        plt.close(figure)
        return directory / name

    made = []
    layers = range(len(manifest.layers))
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, squeeze=False)
    for row, (block, title) in enumerate(BLOCKS.items()):
        gates = [layer[block] for layer in manifest.layers]
        axes[row][0].plot(layers, [g.density["mean"] for g in gates], "o-", label="selected")
        axes[row][0].plot(
            layers, [g.density["upper"] for g in gates], ":", color="C0", label="0.95 quantile over tokens"
        )
        axes[row][0].plot(
            layers,
            [float("nan") if g.oracle_density is None else g.oracle_density for g in gates],
            "s--",
            color="C1",
            label="truly active (oracle)",
        )
        axes[row][0].set(title=f"{title}: density", ylim=(0, 1.05), xlabel="layer")
        axes[row][1].plot(
            layers, [float("nan") if g.recall is None else g.recall for g in gates], "o-", color="C2"
        )
        axes[row][1].set(title=f"{title}: recall (gated layers)", ylim=(0, 1.05), xlabel="layer")
        axes[row][0].legend(fontsize=7)
    made.append(save(figure, "layers.png"))

    gated = sorted(key for key in histograms if key[1] == "mlp")
    if gated:
        columns = min(4, len(gated))
        figure, axes = plt.subplots(
            -(-len(gated) // columns),
            columns,
            figsize=(3 * columns, 2.2 * -(-len(gated) // columns)),
            squeeze=False,
        )
        low, high, bins = SCORE_BINS
        centres = torch.linspace(low, high, bins + 1)[:-1] + (high - low) / bins / 2
        for ax, key in zip(axes.flat, gated, strict=False):
            for counts, label in zip(histograms[key], ("inactive", "active"), strict=True):
                ax.step(centres, counts / counts.sum().clamp_min(1), where="mid", label=label)
            ax.axvline(0, color="grey", lw=0.8)
            ax.set_title(f"layer {key[0]}", fontsize=8)
        for ax in list(axes.flat)[len(gated) :]:
            ax.axis("off")
        axes[0][0].legend(fontsize=7)
        figure.suptitle("MLP scores over their spread; selected right of 0", fontsize=9)
        made.append(save(figure, "scores.png"))

    curve = manifest.calibration.get("curve") or []
    if curve:
        figure, ax = plt.subplots(figsize=(6, 4))
        for block, title in BLOCKS.items():
            ax.plot(
                [p[f"{block}_density"] for p in curve],
                [100 * p["ppl_increase"] for p in curve],
                "o-",
                label=title,
            )
        ax.axhline(100 * manifest.calibration["max_ppl_increase"], color="grey", ls=":", label="budget")
        ax.set(
            xlabel="mean density over layers",
            ylabel="perplexity rise, % (probe text)",
            title="joint choices, careful to daring",
        )
        ax.legend(fontsize=8)
        made.append(save(figure, "curve.png"))
    return made


def write_card(path: Path, made: Artifact, config: Any) -> None:
    """The card, unless somebody's own file stands in its place."""
    if path.is_file() and f"library_name: {LIBRARY}" not in path.read_text(
        encoding="utf-8", errors="replace"
    ):
        say(f"{path} is not a card of ours and was left as it is")
        return
    path.write_text(card(made, config), encoding="utf-8")


def card(made: Artifact, config: Any) -> str:
    """README.md of an artifact, with the metadata block that the Hugging Face hub reads."""
    m = made.manifest
    size = sum(t.numel() * t.element_size() for t in made.tensors.values())
    gated = {b: [layer[b] for layer in m.layers if layer[b].sparse] for b in BLOCKS}
    mean = {b: sum(layer[b].density["mean"] for layer in m.layers) / len(m.layers) for b in BLOCKS}
    cal, training = m.calibration, m.training
    rows = [
        f"| {i} | {b} | {g.density['mean']:.3f} | {_number(g.oracle_density)} | {_number(g.recall)} |"
        f" {_number(g.union_density.get('8', {}).get('mean'))} |"
        for i, layer in enumerate(m.layers)
        for b, g in layer.items()
        if g.sparse
    ]
    return "\n".join(
        [
            "---",
            f"library_name: {LIBRARY}",
            "tags: [contextual-sparsity, deja-vu, vllm]",
            "---",
            "",
            f"# Predictors for {Path(m.model.name).name}",
            "",
            (
                "A vllm-dejavu predictor artifact: low-rank scorers that name, for every token, the MLP"
                " neurons and attention heads worth reading."
            ),
            f"Made for weights with the fingerprint `{m.model.fingerprint}`; any others are refused.",
            "",
            "```",
            "vllm serve MODEL --model-impl dejavu --additional-config"
            f""" '{{"dejavu": {{"predictor": "{Path(config.output).name}"}}}}'""",
            "```",
            "",
            "| | |",
            "|---|---|",
            (
                f"| trained on | {', '.join(training['data'])}: {training['tokens']:,} tokens,"
                f" {training['documents']} documents; form {training['form']}, seed {training['seed']} |"
            ),
            (
                "| calibrated on |"
                f" {cal['data'] if isinstance(cal['data'], str) else ', '.join(cal['data'])}:"
                f" {cal['tokens']:,} tokens |"
            ),
            (
                f"| perplexity there | {cal['dense_ppl']:.3f} dense, {cal['sparse_ppl']:.3f} sparse:"
                f" {100 * cal['ppl_increase']:+.2f}% (budget {100 * cal['max_ppl_increase']:g}%) |"
            ),
            f"| size | {size / 1e6:.2f} MB, MLP rank {training['rank']}, {config.dtype} |",
            f"| MLP | {len(gated['mlp'])} of {len(m.layers)} layers gated, mean density {mean['mlp']:.3f} |",
            (
                f"| attention | {len(gated['attention'])} of {len(m.layers)} layers gated, mean density"
                f" {mean['attention']:.3f} |"
            ),
            f"| lookahead | MLP `{config.mlp_lookahead}`, heads `{config.head_lookahead}` |",
            f"| made with | {', '.join(f'{k} {v}' for k, v in m.versions.items())} |",
            "",
            "Gated blocks on the calibration text; blocks not listed run dense:",
            "",
            "| layer | block | density | truly active | recall | union of 8 |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            (
                "Perplexity was measured with masks in transformers on the calibration text. Measure your own"
                " text through the serving path:"
            ),
            "",
            "```",
            "vllm-dejavu evaluate --model MODEL --predictor THIS_DIRECTORY --data TEXT",
            "```",
            "",
        ]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
