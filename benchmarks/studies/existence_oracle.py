"""The existence study's part `oracle`: natural density, and how few units a selection that knows the truth
needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from existence_statistics import LogHistogram, mean_error, rise
from existence_study import Study, Walk, markdown, mean_of, span

from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates
from vllm_dejavu.predictor_training.labels import Labels, active_neurons, head_contributions, neuron_energy

# Perplexity that oracle selection may cost; the lower ends of the search for it, and how far apart its last
# two densities may be.
BUDGET = 0.01
LOWEST = {"neurons": 0.005, "heads": 0.05, "share": 0.1}
TOLERANCE = 1.02
ENERGY_SHARE = 0.99
SHARED = "neurons, even share"


@dataclass
class Scored:
    """nats: [windows], mean of each window. density: block -> [layers], what was really kept."""

    nats: torch.Tensor
    density: dict[str, torch.Tensor]

    def mean_density(self, block: str) -> float:
        return float(self.density[block].mean()) if block in self.density else 1.0


Cut = float | int


def choose(values: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Units that matter most: above a threshold (float), or so many of each token (int), none that are 0. [T,
    units] -> bool.
    """
    if isinstance(cut, int):
        mask = torch.zeros_like(values, dtype=torch.bool).scatter_(1, values.topk(cut, dim=1).indices, True)
        return mask & (values > 0)
    return values > cut


class Oracle:
    """Runs a model with selections that know the truth.

    Args:
        norms, grams: by layer, of fc2's rows and the heads.
    """

    def __init__(self, opt: HfModel, norms: list[torch.Tensor], grams: list[torch.Tensor], batch: int):
        self.opt, self.norms, self.grams, self.batch = opt, norms, grams, batch

    def score(self, tokens: torch.Tensor, cuts: dict[str, list[Cut]], two_pass: bool = False) -> Scored:
        """Held-out nats under `cuts`: block -> by layer; a block without cuts stays dense.

        Args:
            two_pass: choose in a dense pass and apply in a second one (the paper's), instead of choosing from
                what the pass itself computes.
        """
        kept: dict[str, torch.Tensor] = {
            block: torch.zeros(len(self.opt.layers), dtype=torch.float64) for block in cuts
        }
        total: dict[str, float] = dict.fromkeys(cuts, 0.0)
        recorded: dict[tuple[str, int], torch.Tensor] = {}

        def choice(block: str, layer: int, values: Callable[[], torch.Tensor]) -> torch.Tensor | None:
            if block not in cuts:
                return None
            mask = recorded.pop((block, layer), None)
            if mask is None:
                mask = choose(values(), cuts[block][layer])
                kept[block][layer] += float(mask.double().mean(1).sum())
                total[block] += len(mask) / len(self.opt.layers)
            return mask

        def on_attention(layer: int, states: LayerStates, attn: torch.Tensor) -> torch.Tensor | None:
            return choice("heads", layer, lambda: head_contributions(attn, self.grams[layer]))

        def on_mlp(layer: int, states: LayerStates, z: torch.Tensor) -> torch.Tensor | None:
            return choice("neurons", layer, lambda: neuron_energy(z, self.norms[layer]))

        def record(call: Callable, block: str) -> Callable:
            def recording(layer: int, states: LayerStates, value: torch.Tensor) -> None:
                masks[block, layer] = call(layer, states, value)

            return recording

        nats = []
        for part in tokens.split(self.batch):
            if two_pass:
                masks: dict[tuple[str, int], torch.Tensor | None] = {}
                with self.opt.observed(record(on_attention, "heads"), record(on_mlp, "neurons")):
                    self.opt.decoder(part)
                recorded.update({k: m for k, m in masks.items() if m is not None})
            with self.opt.observed(on_attention, on_mlp):
                nats.append(self.opt.nll(part).double().mean(1))
        return Scored(torch.cat(nats), {block: kept[block] / total[block] for block in cuts})


def lowest_density(
    cost: Callable[[float], float], low: float, high: float, budget: float, tolerance: float = TOLERANCE
) -> float:
    """The lowest density that costs at most `budget`, by bisection of its logarithm between one that costs
    more and one that does not.
    """
    while high > tolerance * low:
        middle = math.sqrt(low * high)
        if cost(middle) <= budget:
            high = middle
        else:
            low = middle
    return high


def part_oracle(study: Study) -> None:
    opt, batch, count = study.opt, study.args.batch, len(study.opt.layers)
    norms, grams = [study.fc2_norms(i) for i in range(count)], [study.grams(i) for i in range(count)]
    tokens = study.train.numel() + study.held_out.numel()
    table, rows, histograms = study.table("oracle"), [], {"neurons": [], "heads": []}
    walks = Walk(opt, study.train, batch), Walk(opt, study.held_out, batch)
    top_heads = max(1, study.units["heads"] // 2)
    for layer in range(count):
        energies, contributions, fired = LogHistogram(), LogHistogram(), 0
        for seen in walks[0].layer():
            energies.add(neuron_energy(seen.z, norms[layer]))
            contributions.add(head_contributions(seen.attn, grams[layer]))
            fired = fired + active_neurons(seen.z).sum(0)
        histograms["neurons"].append(energies)
        histograms["heads"].append(contributions)
        natural, share, norm, top = [], [], [], []
        for seen in walks[1].layer():
            fired = fired + active_neurons(seen.z).sum(0)
            natural.append(active_neurons(seen.z).float().mean(1))
            share.append(Labels("energy", ENERGY_SHARE).active(seen.z, norms[layer]).float().mean(1))
            heads = head_contributions(seen.attn, grams[layer])
            norm.append(heads.mean(1))
            squares = heads.square()
            top.append(squares.topk(top_heads, dim=1).values.sum(1) / squares.sum(1).clamp_min(1e-30))
        row: dict[str, Any] = {
            "model": study.name,
            "layer": layer,
            "neurons": study.units["neurons"],
            "dead_neurons": int((fired == 0).sum()),
            "dead_tokens": tokens,
        }
        for name, values in (
            ("natural_density", natural),
            ("energy99_density", share),
            ("contribution", norm),
            ("top_half_of_heads", top),
        ):
            row[name], row[f"{name}_se"] = mean_error(study.by_window(torch.cat(values)) / study.seq_len)
        rows.append({**row, "tokens": study.held_out.numel()})
        table.add(**rows[-1])
    print(f"oracle: mean natural density {mean_of(rows, 'natural_density'):.4f}", flush=True)

    oracle = Oracle(opt, norms, grams, batch)
    dense = oracle.score(study.held_out, {}).nats
    curve, known = study.table("oracle_curve"), {}

    def cuts(densities: dict[str, float], rule: str) -> dict[str, list[Cut]]:
        if rule == "top":
            return {block: [max(1, round(d * study.units[block]))] * count for block, d in densities.items()}
        if rule == "share":
            return {
                block: [h.threshold(d * h.positive_share()) for h in histograms[block]]
                for block, d in densities.items()
            }
        return {block: [h.threshold(d) for h in histograms[block]] for block, d in densities.items()}

    def measure(densities: dict[str, float], rule: str = "threshold", two_pass: bool = False) -> Scored:
        key = (tuple(sorted(densities.items())), rule, two_pass)
        if key not in known:
            scored = known[key] = oracle.score(study.held_out, cuts(densities, rule), two_pass)
            cost, error = rise(scored.nats, dense)
            curve.add(
                model=study.name,
                blocks="+".join(densities),
                rule=rule,
                passes=2 if two_pass else 1,
                **{f"{b}_nominal": d for b, d in densities.items()},
                **{f"{b}_density": scored.mean_density(b) for b in densities},
                ppl_increase=cost,
                ppl_increase_se=error,
                tokens=study.held_out.numel(),
            )
        return known[key]

    def cost(densities: dict[str, float], rule: str = "threshold") -> float:
        return rise(measure(densities, rule).nats, dense)[0]

    # keeps all that are active, in every layer
    every = max(h.positive_share() for h in histograms["neurons"])
    neurons = lowest_density(lambda d: cost({"neurons": d}), min(LOWEST["neurons"], every / 2), every, BUDGET)
    share = lowest_density(lambda d: cost({"neurons": d}, "share"), LOWEST["share"], 1.0, BUDGET)
    heads = lowest_density(lambda d: cost({"heads": d}), LOWEST["heads"], 1.0, BUDGET)
    # Heads first, with half of the budget: costs of blocks roughly add up, so about as much is left for
    # neurons.
    half = lowest_density(lambda d: cost({"heads": d}), heads, 1.0, BUDGET / 2)
    fixed = {} if half == 1.0 else {"heads": half}
    both = {
        **fixed,
        "neurons": lowest_density(lambda d: cost({**fixed, "neurons": d}), neurons, every, BUDGET),
    }

    limits, table = [], study.table("oracle_limits")
    points = {"neurons": {"neurons": neurons}, "heads": {"heads": heads}, "both": both}
    for name, densities in {**points, SHARED: {"neurons": share}}.items():
        densities = {b: d for b, d in densities.items() if d < 1.0}  # 1: dense, and not to be measured
        scored = (
            measure(densities, "share" if name == SHARED else "threshold") if densities else Scored(dense, {})
        )
        increase, error = rise(scored.nats, dense)
        limits.append(
            {
                "model": study.name,
                "blocks": name,
                "ppl_increase": increase,
                "ppl_increase_se": error,
                "budget": BUDGET,
                "dense_ppl": math.exp(float(dense.mean())),
            }
            | {f"{b}_nominal": densities.get(b, 1.0) for b in study.units}
            | {f"{b}_density": scored.mean_density(b) for b in study.units}
            | {f"{b}_by_layer": " ".join(f"{x:.4f}" for x in scored.density[b]) for b in scored.density}
            | {"tokens": study.held_out.numel(), "windows": len(dense)}
        )
        table.add(**limits[-1])

    passes, table = [], study.table("oracle_passes")
    for name, densities in points.items():
        densities = {b: d for b, d in densities.items() if d < 1.0}
        for scale, rule in ((1.0, "threshold"), (1.0, "top"), (0.5, "threshold")) if densities else ():
            at = {b: d * scale for b, d in densities.items()}
            one, two = measure(at, rule), measure(at, rule, two_pass=True)
            difference, error = mean_error(two.nats - one.nats)
            row = {"model": study.name, "blocks": name, "rule": rule, "of_limit": scale}
            for key, scored in (("one_pass", one), ("two_pass", two)):
                row |= {f"{key}_{b}": scored.mean_density(b) for b in at}
                row[f"{key}_increase"], row[f"{key}_increase_se"] = rise(scored.nats, dense)
            passes.append(
                {
                    **row,
                    "difference_nats": difference,
                    "difference_nats_se": error,
                    "tokens": study.held_out.numel(),
                }
            )
            table.add(**passes[-1])
        print(f"oracle: {name} done", flush=True)

    image = plot_oracle(study, rows, curve.rows)
    total, dead = study.units["neurons"] * count, sum(r["dead_neurons"] for r in rows)
    worst = max(passes, key=lambda r: abs(r["difference_nats"]), default=None)
    compared = (
        ""
        if worst is None
        else (
            " Between one pass and two at the same cut the largest difference is"
            f" {worst['difference_nats']:+.5f} ± {worst['difference_nats_se']:.5f} nats ({worst['blocks']},"
            f" rule `{worst['rule']}`, {worst['of_limit']:g} x the limit's density)."
        )
    )
    study.write(
        "oracle",
        "Oracle densities",
        "Thresholds are quantiles of the training text, one a layer, so every layer gets the same density"
        " unless fewer neurons fire (`nominal`; what was kept is `density`). `energy99`: neurons that hold"
        f" {100 * ENERGY_SHARE:g}% of the squared energies of a token. Dead: silent in {tokens:,} tokens."
        " `top half`: share of the heads' squared contributions that each token's larger half holds.",
        markdown(
            rows,
            {
                "layer": "layer",
                "natural density": "natural_density",
                "dead": "dead_neurons",
                "energy99 density": "energy99_density",
                "top half of heads": "top_half_of_heads",
            },
        ),
        f"Lowest densities at which oracle selection costs at most {100 * BUDGET:g}% of perplexity"
        f" ({len(dense)} windows, dense {math.exp(float(dense.mean())):.2f}). `both`: heads at the density at"
        f" which they alone cost half of that, then neurons down to the whole. `{SHARED}`: every layer keeps"
        " the same share (`nominal`) of what is active in it, instead of the same density.",
        markdown(
            limits,
            {
                "blocks": "blocks",
                "neurons nominal": "neurons_nominal",
                "neurons kept": "neurons_density",
                "heads kept": "heads_density",
                "perplexity rise": "ppl_increase",
            },
        ),
        "One pass chooses from what it computes itself; two passes are the paper's: chosen densely, applied"
        " in a second pass. `top`: a fixed number a token.",
        markdown(
            passes,
            {
                "blocks": "blocks",
                "rule": "rule",
                "x limit": "of_limit",
                "neurons, 1 pass": "one_pass_neurons",
                "heads, 1 pass": "one_pass_heads",
                "rise, 1 pass": "one_pass_increase",
                "neurons, 2": "two_pass_neurons",
                "heads, 2": "two_pass_heads",
                "rise, 2 passes": "two_pass_increase",
                "2 - 1, nats": "difference_nats",
            },
        ),
        f"Natural density is {mean_of(rows, 'natural_density'):.3f} in the mean"
        f" ({span(rows, 'natural_density')} by layer); {dead} of {total} neurons are dead"
        f" ({100 * dead / total:.0f}%), and among those that are not the density is"
        f" {mean_of(rows, 'natural_density') * total / max(1, total - dead):.3f}. Neurons alone can go to"
        f" {limits[0]['neurons_density']:.3f} ({limits[3]['neurons_density']:.3f} at the same share of every"
        f" layer's active ones), heads alone to {limits[1]['heads_density']:.3f}, both together to"
        f" {limits[2]['neurons_density']:.3f} and {limits[2]['heads_density']:.3f}.{compared}",
        image,
    )


def plot_oracle(study: Study, rows: list[dict[str, Any]], curve: list[dict[str, Any]]) -> str:
    made = study.figure(1, 3)
    if made is None:
        return ""
    figure, [[layers, neurons, heads]] = made
    at = [r["layer"] for r in rows]
    for key, label in (("natural_density", "active"), ("energy99_density", "99% of energy")):
        layers.errorbar(
            at, [r[key] for r in rows], yerr=[r[f"{key}_se"] for r in rows], marker="o", ms=3, label=label
        )
    layers.plot(at, [r["dead_neurons"] / r["neurons"] for r in rows], "x", color="grey", label="dead")
    layers.set(xlabel="layer", ylabel="share of neurons", ylim=(0, None))
    layers.legend(fontsize=7)
    for axis, block in ((neurons, "neurons"), (heads, "heads")):
        points = sorted(
            (r[f"{block}_density"], 100 * r["ppl_increase"], 100 * r["ppl_increase_se"])
            for r in curve
            if (r["blocks"], r["rule"], r["passes"]) == (block, "threshold", 1)
        )
        shown = [p for p in points if p[1] < 60 * 100 * BUDGET] or points
        axis.errorbar(
            [p[0] for p in shown],
            [max(p[1], 1e-3) for p in shown],
            yerr=[p[2] for p in shown],
            marker="o",
            ms=3,
        )
        axis.axhline(100 * BUDGET, color="grey", lw=0.8, ls="--")
        axis.set(
            xlabel=f"{block} kept, mean over layers",
            ylabel="perplexity rise, %",
            yscale="symlog",
            title=f"oracle, {block} alone",
        )
        axis.title.set_fontsize(9)
    return study.save(figure, "oracle", "oracle densities")
