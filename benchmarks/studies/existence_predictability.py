"""The existence study's part `predictability`: how well active neurons and important heads follow from ever
more context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from existence_statistics import auc, mean_error, ratio_error, selected_share
from existence_study import Seen, Study, Walk, markdown, mean_of

from vllm_dejavu.predictor_training import forms
from vllm_dejavu.predictor_training.calibrate import quantile
from vllm_dejavu.predictor_training.collect import Moments
from vllm_dejavu.predictor_training.labels import Labels, active_neurons, neuron_energy
from vllm_dejavu.predictor_training.train import LayerWeights, fit_heads, fit_mlp

# Units are compared at this multiple of the true density.
MULTIPLE = 1.25
# A head counts as important above the median contribution of its layer's heads.
HEAD_SHARE = 0.5
# Observations that the unconditional rate counts for in a token's own rate.
BACKOFF = 4.0
# Hidden states that neurons and heads are regressed on, by ever more context, and whether a head's gate could
# read them in time.
INPUTS = ("embedding", "attn_output", "previous", "attn_input", "mlp_input")
BEFORE_HEADS = ("embedding", "previous", "attn_input")


@dataclass
class Sums:
    """Raw moments of one layer under names of our own, fp64; `as_moments` shows them to the fits of
    training.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    num_tokens: int = 0

    def add(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = self.tensors[name] + value.double() if name in self.tensors else value.double()

    def add_batch(
        self, inputs: dict[str, torch.Tensor], active: torch.Tensor, energy: torch.Tensor, heads: torch.Tensor
    ) -> None:
        m = inputs["mlp_input"]
        for name, x in inputs.items():
            for key, value in (
                ("second", x.T @ x),
                ("sum", x.sum(0)),
                ("mlp_input", x.T @ m),
                ("heads", x.T @ heads),
            ):
                self.add(f"{name}.{key}", value)
        for key, value in (
            ("active", active.sum(0)),
            ("energy", energy.square().sum(0)),
            ("heads.sum", heads.sum(0)),
            ("heads.square", heads.square().sum(0)),
        ):
            self.add(key, value)
        self.num_tokens += len(m)

    def as_moments(self, layer: int, name: str, device: torch.device | str = "cpu") -> Moments:
        """`attn_input` stands for the input of this name, whatever it is."""
        tensors = {
            f"layers.{layer}.attn_input.{k}": self.tensors[f"{name}.{k}"]
            for k in ("second", "sum", "mlp_input", "heads")
        }
        for key in ("mlp_input.second", "mlp_input.sum", "active", "energy", "heads.sum", "heads.square"):
            tensors[f"layers.{layer}.{key}"] = self.tensors[key]
        return Moments({k: t.to(device) for k, t in tensors.items()}, self.num_tokens)


class TokenTable:
    """Means by token id, for the ids of a text; `rate` backs off to the mean over all tokens."""

    def __init__(self, ids: torch.Tensor, units: int):
        self.ids = ids.unique()
        self.sums = torch.zeros(len(self.ids), units, device=ids.device)
        self.counts = torch.zeros(len(self.ids), device=ids.device)
        self.all_sum, self.all_count = torch.zeros(units, dtype=torch.float64, device=ids.device), 0

    def add(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        place = torch.searchsorted(self.ids, tokens).clamp_max(len(self.ids) - 1)
        known = self.ids[place] == tokens
        self.sums.index_add_(0, place[known], values[known].float())
        self.counts.index_add_(0, place[known], torch.ones_like(place[known], dtype=torch.float))
        self.all_sum += values.double().sum(0)
        self.all_count += len(values)

    def overall(self) -> torch.Tensor:
        return (self.all_sum / self.all_count).float()

    def rate(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, units]; every token must be one of the table's ids."""
        place = torch.searchsorted(self.ids, tokens)
        return (self.sums[place] + BACKOFF * self.overall()) / (self.counts[place] + BACKOFF)[:, None]


def judge(study: Study, scores: torch.Tensor, active: torch.Tensor, density: float) -> dict[str, float]:
    """AUC over all (token, unit) pairs and recall at MULTIPLE x the density; errors from the windows' own."""
    windows = [
        auc(s.flatten(), a.flatten())
        for s, a in zip(scores.split(study.seq_len), active.split(study.seq_len), strict=True)
    ]
    kept = selected_share(scores, min(1.0, MULTIPLE * density))
    recall, error = ratio_error(study.by_window((kept * active).sum(1)), study.by_window(active.sum(1)))
    return {
        "auc": auc(scores.flatten(), active.flatten()),
        "auc_se": mean_error(torch.tensor(windows))[1],
        "recall": recall,
        "recall_se": error,
    }


def part_predictability(study: Study) -> None:
    opt, batch, table, rows = study.opt, study.args.batch, study.table("predictability"), []
    decoder = opt.model.model.decoder
    wanted = study.some_layers()
    scored_ids = study.scored.flatten().to(opt.device)
    walks = Walk(opt, study.train, batch), Walk(opt, study.scored, batch)
    generator = torch.Generator().manual_seed(study.args.seed)

    def inputs(seen: Seen) -> dict[str, torch.Tensor]:
        x = decoder.embed_tokens(seen.tokens)
        x = x if decoder.project_in is None else decoder.project_in(x)
        return {"embedding": x, **seen.inputs}

    for layer in range(max(wanted) + 1):
        if layer not in wanted:
            for walk in walks:
                for _ in walk.layer():
                    pass
            continue
        norms, grams = study.fc2_norms(layer), study.grams(layer)
        sums, tables, contributions = (
            Sums(),
            {b: TokenTable(scored_ids, n) for b, n in study.units.items()},
            [],
        )
        for seen in walks[0].layer():
            targets = Labels().head_targets(seen.attn, grams)
            active = active_neurons(seen.z)
            sums.add_batch(inputs(seen), active, neuron_energy(seen.z, norms), targets)
            tables["neurons"].add(seen.tokens, active)
            tables["heads"].add(seen.tokens, targets)
            contributions.append(targets)
        threshold = quantile(torch.cat(contributions), 1 - HEAD_SHARE)
        held: dict[str, list[torch.Tensor]] = {}
        for seen in walks[1].layer():
            for name, value in {
                **inputs(seen),
                "active": active_neurons(seen.z),
                "targets": Labels().head_targets(seen.attn, grams),
            }.items():
                held.setdefault(name, []).append(value)
        text = {name: torch.cat(parts) for name, parts in held.items()}
        truth = {"neurons": text["active"], "heads": text["targets"] > threshold}
        density = {block: float(mask.float().mean()) for block, mask in truth.items()}
        weights = LayerWeights.of(opt, layer)
        weights = LayerWeights(*(None if w is None else w.to(opt.device) for w in vars(weights).values()))

        def report(block: str, name: str, scores: torch.Tensor, **extra: Any) -> None:
            row = {
                "model": study.name,
                "block": block,
                "layer": layer,  # noqa: B023
                "input": name,
                "density": density[block],  # noqa: B023
                "in_time": block == "neurons" or name not in INPUTS or name in BEFORE_HEADS,
                **judge(study, scores, truth[block], density[block]),  # noqa: B023
                **extra,
                "tokens": study.train.numel(),
                "scored_tokens": study.scored.numel(),
            }
            rows.append(row)
            table.add(**row)

        spread = (text["targets"] - tables["heads"].overall()).double().square().sum()
        for name in INPUTS:
            if name not in text:
                continue  # nothing lies in front of layer 0
            fit = fit_mlp(
                sums.as_moments(layer, name, opt.device),
                layer,
                weights,
                "attn_input",
                opt.geometry.hidden_size,
                forms.get("closed_form"),
            )
            report(
                "neurons",
                name,
                torch.nn.functional.linear(text[name], (fit.up @ fit.down).float(), fit.bias.float()),
                explained=fit.explained,
            )
            heads = fit_heads(sums.as_moments(layer, name), layer, "self")
            predicted = torch.nn.functional.linear(
                text[name], heads.weight.float().to(opt.device), heads.bias.float().to(opt.device)
            )
            report(
                "heads",
                name,
                predicted,
                explained=float(1 - (text["targets"] - predicted).double().square().sum() / spread),
            )
        for block in study.units:
            shape = truth[block].shape
            report(block, "token", tables[block].rate(scored_ids))
            report(block, "static", tables[block].overall().expand(shape).contiguous())
            report(block, "random", torch.rand(shape, generator=generator).to(opt.device))
        print(f"predictability: layer {layer} done", flush=True)

    image = plot_predictability(study, rows)
    order = (*INPUTS[:1], "token", *INPUTS[1:], "static", "random")
    parts = []
    for block in study.units:
        lines = []
        for layer in wanted:
            found = {r["input"]: r for r in rows if (r["block"], r["layer"]) == (block, layer)}
            lines.append(
                {"layer": layer, "density": next(iter(found.values()))["density"]}
                | {f"{n}_{k}": v for n, r in found.items() for k, v in r.items() if k in ("auc", "recall")}
            )
        means = {"layer": "mean"} | {
            k: mean_of(lines, k) for k in dict.fromkeys(k for line in lines for k in line) if k != "layer"
        }
        for key in ("auc", "recall"):
            parts.append(
                f"{block},"
                f" {'AUC over (token, unit) pairs' if key == 'auc' else f'recall at {MULTIPLE} x density'}:"
            )
            parts.append(
                markdown(
                    [*lines, means],
                    {"layer": "layer", "density": "density"} | {n: f"{n}_{key}" for n in order},
                )
            )
    means = {
        (b, n): {
            k: mean_of(
                [r for r in rows if (r["block"], r["input"]) == (b, n) and (r["layer"] or len(wanted) == 1)],
                k,
            )
            for k in ("auc", "recall")
        }
        for b in study.units
        for n in order
    }
    errors = max(r["auc_se"] for r in rows if r["input"] != "random")

    def say(block: str, *names: str) -> str:
        return ", ".join(f"{n} {means[block, n]['auc']:.3f} ({means[block, n]['recall']:.3f})" for n in names)

    study.write(
        "predictability",
        "Predictability",
        "Linear regression of the pre-activations (heads: of the logarithm of the contribution) at full"
        f" rank, fitted on {study.train.numel():,} tokens, scored on {study.scored.numel():,} held-out ones."
        f" `token`: activation rate of each token id, with {BACKOFF:g} observations of the unconditional"
        " rate; `static`: that rate alone. Heads count as important above their layer's median contribution."
        " `mlp_input` determines neurons by definition: a check, not a result. For heads, `attn_output` and"
        " `mlp_input` come after the fact. `explained` in the CSV: share of variance, for neurons on the"
        f" training text. Standard errors are in the CSV (AUC: at most {errors:.4f}).",
        *parts,
        "Neurons, mean AUC (recall) over the layers but the first, which has no `previous`:"
        f" {say('neurons', *order)}.",
        f"Heads: {say('heads', *order)}.",
        image,
    )


def plot_predictability(study: Study, rows: list[dict[str, Any]]) -> str:
    made = study.figure(2, 2)
    if made is None:
        return ""
    figure, axes = made
    for line, block in zip(axes, study.units, strict=True):
        for axis, key in zip(line, ("auc", "recall"), strict=True):
            for name in dict.fromkeys(r["input"] for r in rows):
                found = [r for r in rows if (r["block"], r["input"]) == (block, name)]
                style = {"static": "k--", "random": "k:", "token": "C7-"}.get(name, "-")
                axis.errorbar(
                    [r["layer"] for r in found],
                    [r[key] for r in found],
                    yerr=[r[f"{key}_se"] for r in found],
                    fmt=style,
                    marker="o",
                    ms=3,
                    label=name,
                )
            axis.set(
                xlabel="layer",
                ylabel="AUC" if key == "auc" else f"recall at {MULTIPLE} x density",
                title=block,
            )
            axis.title.set_fontsize(9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return study.save(figure, "predictability", "what predicts active neurons and important heads")
