"""The existence study's part `drift`: how slowly the residual stream turns from layer to layer."""

from __future__ import annotations

from typing import Any

import figures
import torch
from common import number, read_rows
from existence_predictability import MULTIPLE
from existence_statistics import mean_error
from existence_study import Study, Walk, markdown, span

from vllm_dejavu.predictor_training.calibrate import quantile


def part_drift(study: Study) -> None:
    opt, table, rows = study.opt, study.table("drift"), []
    walk = Walk(opt, study.scored, study.args.batch)
    generator = torch.Generator().manual_seed(study.args.seed)
    count, earlier, middle = len(opt.layers), [], None

    def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)

    def statistics(name: str, values: torch.Tensor) -> dict[str, float]:
        """Of all tokens but BOS, which no step ever decodes."""
        values = values.view(-1, study.seq_len)[:, 1:].cpu()
        mean, error = mean_error(values.mean(1))
        return {
            name: mean,
            f"{name}_se": error,
            f"{name}_p5": quantile(values, 0.05),
            f"{name}_p95": quantile(values, 0.95),
        }

    rows = [{"model": study.name, "layer": i, "layer_norm": opt.geometry.norm} for i in range(count)]
    for layer in range(count):
        found: dict[str, list[torch.Tensor]] = {}
        for seen in walk.layer():
            for name in ("before", "middle", "after"):
                found.setdefault(name, []).append(getattr(seen, name).float())
            for name, update, of in (
                ("attn_update", seen.attn_update, seen.before),
                ("mlp_update", seen.mlp_update, seen.middle),
            ):
                found.setdefault(name, []).append(
                    update.float().norm(dim=-1) / of.float().norm(dim=-1).clamp_min(1e-30)
                )
        now = {name: torch.cat(parts) for name, parts in found.items()}
        other = torch.randperm(len(now["after"]), generator=generator).to(opt.device)
        row = rows[layer]
        row |= statistics("cos_next", cosine(now["before"], now["after"]))
        # What two tokens of the text have in common anyway.
        row |= statistics("cos_other_token", cosine(now["before"], now["after"][other]))
        row |= statistics("cos_attention", cosine(now["before"], now["middle"]))
        centred = [
            x - x.view(-1, study.seq_len, x.shape[-1])[:, 1:].mean((0, 1))
            for x in (now["before"], now["after"])
        ]
        row |= statistics("cos_next_centred", cosine(*centred))
        row |= statistics("attn_update", now["attn_update"]) | statistics("mlp_update", now["mlp_update"])
        if middle is not None:
            row |= statistics("cos_previous", cosine(middle, now["middle"]))
        if earlier:
            rows[layer - 1] |= statistics("cos_next_but_one", cosine(earlier[-1], now["after"]))
        earlier, middle = [now["before"]], now["middle"]
    for row in rows:
        table.add(**row, tokens=study.scored.numel())
    image = plot_drift(study, rows)
    later = [r for r in rows if r["layer"]]
    study.write(
        "drift",
        "Slowly changing embeddings",
        "Cosine similarity of the residual stream in front of a layer with the one behind it (`next`), with"
        " the one a layer further (`next but one`), with another token's behind it (`other token`), and with"
        " `next` after the mean over tokens is taken away (`centred`). `previous`: from in front of the MLP"
        " of the layer before to in front of this one's, what the lookahead `previous` bridges; `attention`:"
        " across this layer's attention, what `attn_input` bridges. Updates: norm over that of the residual"
        " it is added to. Means over tokens without BOS ± standard error; 5% and 95% quantiles are in the"
        " CSV."
        + (
            ""
            if opt.geometry.norm == "pre"
            else " This model is post-LN: the residual is taken after each LayerNorm."
        ),
        markdown(
            rows,
            {
                "layer": "layer",
                "next": "cos_next",
                "5%": "cos_next_p5",
                "95%": "cos_next_p95",
                "next but one": "cos_next_but_one",
                "other token": "cos_other_token",
                "centred": "cos_next_centred",
                "previous": "cos_previous",
                "attention": "cos_attention",
                "attention update": "attn_update",
                "MLP update": "mlp_update",
            },
        ),
        (
            f"Across layer 0 the cosine is {rows[0]['cos_next']:.3f}; across the others"
            f" {span(later, 'cos_next')} (the paper: about 0.99 from layer 2 on, for OPT-175B)."
            if later
            else ""
        ),
        (
            f"The lookahead `previous` looks across a cosine of {span(later, 'cos_previous')}, `attn_input`"
            f" across {span(later, 'cos_attention')}, `self` across none; unrelated tokens have"
            f" {span(rows, 'cos_other_token')}. {lookahead_reading(study, later)}Updates of layer 0 are"
            f" {rows[0]['attn_update']:.2f} (attention) and {rows[0]['mlp_update']:.2f} (MLP) of the"
            f" residual's norm, of the others {span(later, 'attn_update', 2)} and"
            f" {span(later, 'mlp_update', 2)}."
            if later
            else ""
        ),
        image,
    )


def lookahead_reading(study: Study, later: list[dict[str, Any]]) -> str:
    """What `predictability` found where the residual changes most and elsewhere; nothing if it did not
    run.
    """
    recall = {
        (int(r["layer"]), r["input"]): number(r, "recall")
        for r in read_rows("existence_predictability.csv", study.output)
        if (r["model"], r["block"]) == (study.name, "neurons")
    }
    layers = [
        r["layer"]
        for r in sorted(later, key=lambda r: r["cos_previous"])
        if (r["layer"], "previous") in recall
    ]
    if len(layers) < 2:
        return ""
    first, others = layers[0], layers[1:]

    def lost(layers: list[int]) -> str:
        return " against ".join(
            f"{sum(recall[i, n] for i in layers) / len(layers):.3f}" for n in ("previous", "attn_input")
        )

    return (
        f"Where that of `previous` is lowest, layer {first}, full-rank regression on it reaches a recall of"
        f" {lost([first])} on `attn_input` (neurons, held-out text, {MULTIPLE} x the density), in the other"
        f" layers {lost(others)}. "
    )


def plot_drift(study: Study, rows: list[dict[str, Any]]) -> str:
    made = study.figure(1, 2)
    if made is None:
        return ""
    figure, [[cosines, norms]] = made
    names = {
        cosines: (
            "cos_next",
            "cos_next_but_one",
            "cos_previous",
            "cos_attention",
            "cos_next_centred",
            "cos_other_token",
        ),
        norms: ("attn_update", "mlp_update"),
    }
    for axis, keys in names.items():
        for key in keys:
            found = [r for r in rows if key in r]
            ends = ([r[f"{key}_{end}"] for r in found] for end in ("p5", "p95"))
            spread = figures.bars([r[key] for r in found], *ends)
            axis.errorbar(
                [r["layer"] for r in found],
                [r[key] for r in found],
                yerr=spread,
                marker="o",
                ms=3,
                capsize=2,
                label=key.removeprefix("cos_"),
            )
        axis.set(xlabel="layer")
        axis.legend(fontsize=7)
    cosines.set(ylabel="cosine; bars: 5% to 95% of tokens")
    norms.set(ylabel="norm / residual's norm", yscale="log")
    return study.save(figure, "drift", "residual stream between layers")
