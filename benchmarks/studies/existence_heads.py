"""The existence study's part `heads`: heavy and uniform attention heads, and what they contribute."""

from __future__ import annotations

import math
from typing import Any

import torch
from existence_statistics import mean_error, spearman
from existence_study import Study, Walk, markdown, span

from vllm_dejavu.predictor_training.labels import head_contributions

# Attention maps are reduced over so many tokens, from the position on at which a tenth of the visible tokens
# is one.
MAP_TOKENS, MAP_FROM, MAP_SHARE = 4096, 9, 0.1
SENTENCE = (
    "She opened the letter, read it twice, and put it in the fire before her sister came back into the room."
)


def map_statistics(maps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every query position: entropy relative to uniform attention over the visible tokens, mass on the
    first token, mass on the largest tenth.

    Args:
        maps: [B, heads, L, L], rows sum to 1.

    Returns:
        name -> [B, heads, L]; the entropy of the first position is NaN.
    """
    maps = maps.float()
    visible = torch.arange(1, maps.shape[-1] + 1, device=maps.device)
    entropy = -(maps * maps.clamp_min(1e-30).log()).sum(-1) / visible.log()
    count = (MAP_SHARE * visible - 1e-6).ceil().long()
    largest = maps.topk(int(count.max()), dim=-1).values.cumsum(-1)
    index = (count - 1)[None, None, :, None].expand(*maps.shape[:-1], 1)
    return {"entropy": entropy, "bos": maps[..., 0], "top": largest.gather(-1, index).squeeze(-1)}


def part_heads(study: Study) -> None:
    opt = study.opt
    kept = opt.config._attn_implementation
    opt.model.set_attn_implementation("eager")  # others never form the maps
    try:
        rows, correlations = head_rows(study)
        image = plot_heads(study, rows)
        maps = plot_maps(study, rows)
    finally:
        opt.model.set_attn_implementation(kept)
    for name, found in (("heads", rows), ("heads_correlation", correlations)):
        table = study.table(name)
        for row in found:
            table.add(**row)
    heavy, uniform = min(rows, key=lambda r: r["entropy"]), max(rows, key=lambda r: r["entropy"])
    overall = correlations[0]
    pairs = [r for r in correlations if r["scope"] == "(token, head) pairs"]
    within = [r for r in correlations if r["scope"] == "tokens of a head, mean over heads"]
    study.write(
        "heads",
        "Heavy and uniform heads",
        f"Positions from {MAP_FROM} on, {rows[0]['tokens']:,} tokens. Entropy: of the attention distribution"
        " over that of a uniform one on the visible tokens (0: one token, 1: uniform). `top 10%`: mass on"
        " the tenth of visible tokens that gets most. Contribution: norm after out_proj.",
        (
            markdown(
                rows,
                {
                    "layer": "layer",
                    "head": "head",
                    "entropy": "entropy",
                    "on BOS": "bos",
                    "on top 10%": "top",
                    "contribution": "contribution",
                },
            )
            if len(rows) <= 64
            else "A row a head is in existence_heads.csv."
        ),
        "Spearman correlation of entropy and contribution:",
        markdown(correlations, {"layer": "layer", "scope": "scope", "n": "n", "spearman": "spearman"}),
        f"The heaviest head is {heavy['layer']}.{heavy['head']} (entropy {heavy['entropy']:.2f},"
        f" {100 * heavy['top']:.0f}% of its mass on a tenth of the tokens), the most uniform"
        f" {uniform['layer']}.{uniform['head']} ({uniform['entropy']:.2f}, {100 * uniform['top']:.0f}%). Over"
        f" the means of {overall['n']} heads entropy and contribution correlate at {overall['spearman']:+.2f}"
        f" (under no correlation its standard deviation is {1 / math.sqrt(max(1, overall['n'] - 1)):.2f});"
        f" within a layer, over (token, head) pairs, at {span(pairs, 'spearman', 2)}; within a head, over"
        f" tokens, at {span(within, 'spearman', 2)}.",
        image,
        maps,
    )


def head_rows(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a head, and correlations: of heads' means first, then of every layer."""
    opt, heads = study.opt, study.units["heads"]
    windows = study.held_out[: max(1, MAP_TOKENS // study.seq_len)]
    walk, rows, correlations = Walk(opt, windows, 1), [], []
    for layer in range(len(opt.layers)):
        grams = study.grams(layer)
        found: dict[str, list[torch.Tensor]] = {}
        for seen in walk.layer():
            if seen.maps is None:
                raise RuntimeError(
                    "The attention layers gave no maps: this version of transformers has no eager attention"
                    " for OPT."
                )
            statistics = {k: v[0].T for k, v in map_statistics(seen.maps).items()} | {
                "contribution": head_contributions(seen.attn, grams)
            }
            for name, value in statistics.items():  # [L, heads]
                found.setdefault(name, []).append(value[MAP_FROM:].double().cpu())
        text = {name: torch.stack(parts) for name, parts in found.items()}  # [windows, positions, heads]
        for head in range(heads):
            row = {"model": study.name, "layer": layer, "head": head}
            for name, values in text.items():
                row[name], row[f"{name}_se"] = mean_error(values[:, :, head].mean(1))
            rows.append({**row, "tokens": text["entropy"][..., 0].numel()})
        pairs = torch.tensor(
            [spearman(e, c) for e, c in zip(text["entropy"], text["contribution"], strict=True)]
        )
        within = torch.tensor(
            [
                [spearman(e[:, h], c[:, h]) for h in range(heads)]
                for e, c in zip(text["entropy"], text["contribution"], strict=True)
            ]
        ).mean(1)
        for scope, values in (("(token, head) pairs", pairs), ("tokens of a head, mean over heads", within)):
            mean, error = mean_error(values)
            correlations.append(
                {
                    "model": study.name,
                    "layer": layer,
                    "scope": scope,
                    "n": text["entropy"].numel(),
                    "spearman": mean,
                    "spearman_se": error,
                }
            )
    overall = spearman(*(torch.tensor([r[k] for r in rows]) for k in ("entropy", "contribution")))
    return rows, [
        {"model": study.name, "layer": "all", "scope": "means of heads", "n": len(rows), "spearman": overall},
        *correlations,
    ]


def plot_heads(study: Study, rows: list[dict[str, Any]]) -> str:
    made = study.figure(1, 2)
    if made is None:
        return ""
    figure, [axes] = made
    for axis, (key, label) in zip(
        axes, (("entropy", "entropy / uniform"), ("bos", "mass on BOS")), strict=True
    ):
        points = axis.scatter(
            [r[key] for r in rows],
            [r["contribution"] for r in rows],
            c=[r["layer"] for r in rows],
            cmap="viridis",
        )
        axis.set(xlabel=label, ylabel="mean contribution")
    figure.colorbar(points, ax=list(axes), label="layer")
    return study.save(figure, "heads", "a point a head")


def plot_maps(study: Study, rows: list[dict[str, Any]]) -> str:
    """Attention maps of one sentence: the heaviest and the most uniform head of the first, a middle and the
    last layer.
    """
    count, tokenizer = len(study.opt.layers), study.opt.tokenizer()
    wanted = sorted({0, count // 2, count - 1})
    made = study.figure(2, len(wanted), width=3.6, height=3.6)
    if made is None:
        return ""
    figure, axes = made
    ids = [study.opt.bos, *tokenizer(study.args.sentence, add_special_tokens=False)["input_ids"]][
        : study.seq_len
    ]
    words = ["<BOS>", *(tokenizer.decode([i]).strip() or "_" for i in ids[1:])]
    walk = Walk(study.opt, torch.tensor([ids]), 1)
    for layer in range(count):
        [seen] = list(walk.layer())
        if layer not in wanted:
            continue
        ordered = sorted((r for r in rows if r["layer"] == layer), key=lambda r: r["entropy"])
        for line, (kind, row) in enumerate((("heaviest", ordered[0]), ("most uniform", ordered[-1]))):
            axis = axes[line][wanted.index(layer)]
            axis.imshow(seen.maps[0, row["head"]].float().cpu().sqrt(), cmap="magma_r", vmin=0, vmax=1)
            axis.set_xticks(range(len(words)), words, rotation=90, fontsize=5)
            axis.set_yticks(range(len(words)), words, fontsize=5)
            axis.set_title(
                f"layer {layer}, head {row['head']}: {kind}, entropy {row['entropy']:.2f}", fontsize=8
            )
    return study.save(figure, "attention", "attention maps (square root of the weight)")
