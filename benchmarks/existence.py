"""Does contextual sparsity exist in a model, and can it be predicted? The paper's observations, layer by
layer, on any OPT.

    python benchmarks/existence.py --model examples/opt-books-7m --data books_train.txt.xz --held-out
    books_test.txt.xz --output benchmarks/results/paper

Parts (`--parts`; all of them otherwise), each with its CSV and PNG and a section of existence.md:

- oracle: natural density, dead neurons, energy; the density at which a selection that knows the truth costs
  1% of perplexity; the paper's oracle in two passes beside one on the fly.
- bytes: weight bytes read a token at these densities, by our account and by the paper's. Reads what `oracle`
wrote.
- predictability: how well active neurons and important heads follow from ever more context, by linear fits of
full rank.
- drift: how slowly the residual stream turns from layer to layer.
- neighbours: neurons as a database for inner-product search (needs faiss), beside the trained predictor.
- heads: heavy and uniform attention heads, and what they contribute.

Training text fits regressions, tables and thresholds; held-out text is scored. Everything runs densely, or
with masks, in transformers. Standard errors are over windows of text.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_dejavu import artifact
from vllm_dejavu.kernels import cpu
from vllm_dejavu.predictor import Predictor
from vllm_dejavu.predictor_training import data, forms
from vllm_dejavu.predictor_training.calibrate import quantile
from vllm_dejavu.predictor_training.collect import Moments
from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates, Resumable
from vllm_dejavu.predictor_training.labels import (
    Labels,
    active_neurons,
    head_contributions,
    neuron_energy,
)
from vllm_dejavu.predictor_training.train import LayerWeights, fit_heads, fit_mlp
from vllm_dejavu.timing import Timer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import Table, median, number, percentile, pyplot, read_rows  # noqa: E402

# Perplexity that oracle selection may cost; the lower ends of the search for it, and how far apart its last
# two densities may be.
BUDGET = 0.01
LOWEST = {"neurons": 0.005, "heads": 0.05, "share": 0.1}
TOLERANCE = 1.02
ENERGY_SHARE = 0.99
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
# HNSW: links a vector, candidates while building (faiss's default), searched candidates as multiples of k.
# IVF: probed shares of the lists.
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 40, (1, 2, 4)
IVF_PROBES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
NEIGHBOUR_TOKENS_A_WINDOW = 32
# Attention maps are reduced over so many tokens, from the position on at which a tenth of the visible tokens
# is one.
MAP_TOKENS, MAP_FROM, MAP_SHARE = 4096, 9, 0.1
SENTENCE = (
    "She opened the letter, read it twice, and put it in the fire before her sister came back into the room."
)


def mean_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error over independent values (windows); NaN error of fewer than two."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def ratio_error(above: torch.Tensor, below: torch.Tensor) -> tuple[float, float]:
    """sum(above) / sum(below) over windows, and its standard error (linearised)."""
    above, below = above.double(), below.double()
    if not float(below.sum()):
        return math.nan, math.nan
    ratio = float(above.sum() / below.sum())
    left = (above - ratio * below).square().sum()
    n = len(above)
    return ratio, float((left / (n - 1) / n).sqrt() / below.mean()) if n > 1 else math.nan


def rise(sparse: torch.Tensor, dense: torch.Tensor) -> tuple[float, float]:
    """Relative rise of perplexity and its standard error, paired by window. Arguments: mean nats of each
    window.
    """
    mean, error = mean_error(sparse - dense)
    return math.expm1(mean), error * math.exp(mean)


def ascending(values: torch.Tensor) -> torch.Tensor:
    # numpy sorts several times faster on a CPU.
    return values.sort().values if values.is_cuda else torch.from_numpy(np.sort(values.numpy()))


def auc(scores: torch.Tensor, active: torch.Tensor) -> float:
    """How often an active pair scores above an inactive one, ties counting half; NaN where there are no such
    pairs.
    """
    positive, negative = scores[active], ascending(scores[~active])
    if not len(positive) or not len(negative):
        return math.nan
    positive = ascending(positive)  # neighbours look in the same place
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().sum() / 2 / len(positive) / len(negative))


def selected_share(scores: torch.Tensor, share: float) -> torch.Tensor:
    """How much of each unit is selected if exactly `share` of all are, the best first: 1, 0, or a fraction
    where scores tie at the edge.
    """
    wanted, count = share * scores.numel(), scores.numel()
    edge = ascending(scores.flatten())[min(count - 1, int((1 - share) * count))]
    above, tied = scores > edge, scores == edge
    fraction = (wanted - float(above.sum())) / float(tied.sum())
    return above.float() + tied * min(1.0, max(0.0, fraction))


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, the same mean rank where values tie."""
    _, place, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts + 1) / 2)[place].double()


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a.flatten()), ranks(b.flatten())]))[0, 1])


class LogHistogram:
    """Counts of non-negative values by their logarithm: gives the threshold of any density without keeping
    values.
    """

    LOW, HIGH, BINS = -9.0, 6.0, 8192  # decimal exponents: neighbouring thresholds differ by 0.4%

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)
        self.total = 0

    def add(self, values: torch.Tensor) -> None:
        exponents = values[values > 0].float().log10().clamp(self.LOW, self.HIGH)
        self.counts += torch.histc(exponents, self.BINS, self.LOW, self.HIGH).double().cpu()
        self.total += values.numel()

    def positive_share(self) -> float:
        return float(self.counts.sum()) / self.total

    def threshold(self, density: float) -> float:
        """The lowest edge above which at most `density` of all values lie; 0 if no more than that are
        positive.
        """
        if float(self.counts.sum()) <= density * self.total:
            return 0.0
        above = self.counts.flip(0).cumsum(0).flip(0)  # from each bin's lower edge on
        first = int((above > density * self.total).sum())
        return 10 ** (self.LOW + first * (self.HIGH - self.LOW) / self.BINS)


@dataclass
class Seen:
    """What a batch did in one layer; T tokens, flattened.

    Attributes:
        tokens: [T]. inputs: name (INPUTS without `embedding`) -> [T, hidden]; `previous` is missing in layer
            0.
        attn: [T, heads, head_size], before out_proj. z: [T, ffn], pre-activations.
        before, middle, after: residual stream in front of the layer, between its blocks, behind it (post-LN:
            after the LayerNorms).
        attn_update, mlp_update: what the blocks add. maps: [B, heads, L, L] attention, if the model runs in
            eager mode.
    """

    tokens: torch.Tensor
    inputs: dict[str, torch.Tensor]
    attn: torch.Tensor
    z: torch.Tensor
    before: torch.Tensor
    middle: torch.Tensor
    after: torch.Tensor
    attn_update: torch.Tensor
    mlp_update: torch.Tensor
    maps: torch.Tensor | None


def see(opt: HfModel, run: Resumable) -> tuple[Seen, Resumable]:
    """One layer, dense: what it did, and the batch behind it."""
    layer, caught = opt.layers[run.layer], {}

    def keep(name: str) -> Callable:
        def hook(module: Any, args: tuple, output: Any) -> None:
            caught[name] = output

        return hook

    def on_attention(index: int, states: LayerStates, attn: torch.Tensor) -> None:
        caught["attn"] = attn

    def on_mlp(index: int, states: LayerStates, z: torch.Tensor) -> None:
        caught["z"] = z
        caught["inputs"] = {
            name: x
            for name in ("previous", "attn_input", "mlp_input")
            if (x := states.named(name)) is not None
        }

    hooks = [
        layer.self_attn.out_proj.register_forward_hook(keep("attn_update")),
        layer.fc2.register_forward_hook(keep("mlp_update")),
        layer.self_attn.register_forward_hook(keep("self_attn")),
    ]
    try:
        following = opt.advance(run, on_attention, on_mlp)
    finally:
        for hook in hooks:
            hook.remove()
    before, after, attn_update, mlp_update = (
        x.reshape(-1, x.shape[-1])
        for x in (run.hidden, following.hidden, caught["attn_update"], caught["mlp_update"])
    )
    inputs = {"attn_output": attn_update, **caught["inputs"]}
    middle = before + attn_update if opt.geometry.norm == "pre" else inputs["mlp_input"]
    maps = caught["self_attn"][1]
    seen = Seen(
        run.tokens.flatten().to(opt.device),
        inputs,
        caught["attn"],
        caught["z"],
        before,
        middle,
        after,
        attn_update,
        mlp_update,
        maps,
    )
    return seen, following


class Walk:
    """Text on its way through the layers, all of it through one layer before the next: only one layer's
    states are held.
    """

    def __init__(self, opt: HfModel, tokens: torch.Tensor, batch: int):
        self.opt, self.runs = opt, [opt.start(part) for part in tokens.split(batch)]

    def layer(self) -> Iterator[Seen]:
        """The next layer, batch by batch; to be exhausted before the one after it."""
        for i, run in enumerate(self.runs):
            seen, self.runs[i] = see(self.opt, run)
            yield seen


class Study:
    """A model, its text, and where results go.

    Attributes:
        train, held_out: [windows, seq_len]; scored: the first windows of held_out.
        sections: part -> Markdown.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, Path(args.output)
        self.opt = HfModel(args.model, device=args.device)
        self.name = Path(args.model).name
        geometry = self.opt.geometry
        self.seq_len = min(args.seq_len or 2048, geometry.max_positions)
        self.units = {"neurons": geometry.ffn_dim, "heads": geometry.num_heads}
        self.train = self._windows(args.data, args.tokens, args.seed)
        self.held_out = self._windows(args.held_out, args.held_out_tokens, args.seed)
        self.scored = self.held_out[: max(1, args.scored_tokens // self.seq_len)]
        self.sections: dict[str, str] = {}

    def _windows(self, sources: list[str], max_tokens: int, seed: int) -> torch.Tensor:
        texts = [t for s in sources for t in data.read_documents(s, max_documents=self.args.max_documents)]
        return data.pack(
            data.tokenize(texts, self.opt.tokenizer()),
            self.seq_len,
            self.opt.bos,
            max_tokens=max_tokens,
            seed=seed,
        ).tokens

    def table(self, name: str) -> Table:
        return Table(self.output / f"existence_{name}.csv")

    def fc2_norms(self, layer: int) -> torch.Tensor:
        return self.opt.fc2_norms(layer)

    def grams(self, layer: int) -> torch.Tensor:
        return self.opt.head_grams(layer)

    def some_layers(self) -> list[int]:
        """At most `--layers`, evenly spaced, the first and the last among them."""
        count = len(self.opt.layers)
        wanted = min(count, self.args.layers)
        return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]

    def by_window(self, values: torch.Tensor) -> torch.Tensor:
        """[T, ...] in order of the text -> [windows, ...], sums."""
        return values.double().unflatten(0, (-1, self.seq_len)).sum(1).cpu()

    def write(self, part: str, title: str, *paragraphs: str) -> None:
        self.sections[part] = "\n\n".join([f"## {title}", *filter(None, paragraphs)])

    def figure(self, rows: int, columns: int, width: float = 4.2, height: float = 3.2) -> Any:
        """(figure, axes) of matplotlib, or None without it."""
        plt = pyplot()
        return (
            None
            if plt is None
            else plt.subplots(
                rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
            )
        )

    def save(self, figure: Any, part: str, title: str) -> str:
        """The PNG, and the line of Markdown that shows it."""
        figure.suptitle(f"{self.name}: {title}", fontsize=10)
        path = self.output / f"existence_{part}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        pyplot().close(figure)
        return f"![{title}]({path.name})"


def cell(value: Any, error: Any = None) -> str:
    """Of a Markdown table."""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        digits = 4 if abs(value) < 10 else 1
        text = f"{value:.{digits}f}"
        return text if error is None or math.isnan(error) else f"{text} ± {error:.{digits}f}"
    return "" if value is None else str(value)


def markdown(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """columns: heading -> key of the rows; an error is looked up under the key with `_se`."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row.get(k), row.get(f"{k}_se")) for k in columns.values()) + " |")
    return "\n".join(lines)


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    values = [r[key] for r in rows if isinstance(r.get(key), float) and not math.isnan(r[key])]
    return sum(values) / len(values) if values else math.nan


def span(rows: list[dict[str, Any]], key: str, digits: int = 3) -> str:
    values = [r[key] for r in rows]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def trained_predictor(study: Study, part: str) -> artifact.Artifact | None:
    """The artifact made for these weights; says so where there is none."""
    directory = Path(study.args.predictor or Path(study.args.model) / "dejavu")
    if not directory.is_dir() and not study.args.predictor:
        print(
            f"{part}: no artifact at {directory}, so nothing about the trained predictor; name one with"
            " --predictor",
            flush=True,
        )
        return None
    loaded = artifact.load(directory)
    artifact.check_model(loaded.manifest, study.opt.spec)
    artifact.check_fingerprint(loaded.manifest, study.opt.spec.fingerprint, study.name)
    return loaded


# --- oracle

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


# --- bytes


@dataclass(frozen=True)
class Weights:
    """Element counts of a model. layer: of a decoder layer; fixed: of it, read whatever is selected (norms,
    biases of out_proj and fc2).
    """

    hidden: int
    ffn: int
    layers: int
    bias: bool
    norms: int  # of a layer
    # read for every token besides the layers: LM head, projections, last norm, a row of each embedding
    outside: int
    stored: int

    @classmethod
    def of(cls, opt: HfModel) -> Weights:
        c, decoder, stored = (
            opt.config,
            opt.model.model.decoder,
            sum(p.numel() for p in opt.model.parameters()),
        )
        norms = 4 * c.hidden_size if c.layer_norm_elementwise_affine else 0
        modules = (decoder.final_layer_norm, decoder.project_in, decoder.project_out)
        others = sum(p.numel() for m in modules if m is not None for p in m.parameters())
        outside = opt.model.lm_head.weight.numel() + others + c.word_embed_proj_dim + c.hidden_size
        g = opt.geometry
        return cls(g.hidden_size, g.ffn_dim, g.num_layers, bool(c.enable_bias), norms, outside, stored)

    def layers_read(self, rows: float, columns: float, heads: float) -> float:
        """Elements of all layers that we read for a token: K and V whole, Q and out_proj of selected heads,
        rows of fc1, columns of fc2.
        """
        h, f, b = self.hidden, self.ffn, int(self.bias)
        attention = (2 + heads) * (h * h + b * h) + heads * h * h + b * h
        return self.layers * (attention + rows * (h * f + b * f) + columns * h * f + b * h + self.norms)

    def paper(self, neurons: float, heads: float) -> float:
        """Share of the layers' matrices by the paper's account: all four projections of a head that is not
        selected are skipped.
        """
        attention, mlp = 4 * self.hidden**2, 2 * self.hidden * self.ffn
        return (heads * attention + neurons * mlp) / (attention + mlp)


def bytes_row(
    weights: Weights,
    point: str,
    neurons: float,
    heads: float,
    columns: float | None = None,
    predictor: float = 0.0,
) -> dict[str, Any]:
    """Shares of bytes read at batch 1. predictor: its weights, in elements of the model's dtype; `columns`:
    of fc2, if not as many as fc1's rows.
    """
    dense = weights.layers_read(1, 1, 1)
    read = weights.layers_read(neurons, neurons if columns is None else columns, heads) + predictor
    paper = weights.paper(neurons, heads)
    return {
        "point": point,
        "neurons": neurons,
        "heads": heads,
        "layers_read": read / dense,
        "layers_fewer": dense / read,
        "paper_read": paper,
        "paper_fewer": 1 / paper,
        "model_read": (read + weights.outside) / weights.stored,
        "model_fewer": (dense + weights.outside) / (read + weights.outside),
    }


def artifact_row(study: Study, weights: Weights) -> dict[str, Any] | None:
    """The calibrated artifact's densities, with its predictors' bytes; None without one."""
    loaded = trained_predictor(study, "bytes")
    if loaded is None:
        return None
    count = len(loaded.manifest.layers)
    neurons = columns = heads = predictor = 0.0
    for layer, gates in enumerate(loaded.manifest.layers):
        for block, gate in gates.items():
            spec, tensors = loaded.gate(layer, block)
            density = gate.density["mean"] if gate.sparse else 1.0
            predictor += sum(
                t.numel() * t.element_size() / 2 for n, t in tensors.items() if n in ("down", "up", "weight")
            )
            if block == "attention":
                heads += density / count
            else:
                neurons += density / count
                known = gate.sparse and gate.oracle_density is not None and gate.recall is not None
                columns += (gate.oracle_density * gate.recall if known else density) / count
    return bytes_row(weights, "artifact, calibrated, predictors included", neurons, heads, columns, predictor)


def part_bytes(study: Study) -> None:
    weights = Weights.of(study.opt)
    points: list[tuple[str, float, float]] = [("dense", 1.0, 1.0)]
    layers = [r for r in read_rows("existence_oracle.csv", study.output) if r["model"] == study.name]
    limits = [r for r in read_rows("existence_oracle_limits.csv", study.output) if r["model"] == study.name]
    if layers:
        for name, key in (
            ("active neurons", "natural_density"),
            ("neurons with 99% of the energy", "energy99_density"),
        ):
            points.append((name, sum(number(r, key) for r in layers) / len(layers), 1.0))
        points += [
            (f"oracle limit, {r['blocks']}", number(r, "neurons_density"), number(r, "heads_density"))
            for r in limits
        ]
    else:
        print(
            f"bytes: {study.output} holds no results of the part `oracle` for {study.name}, so its points are"
            " missing; run that part first",
            flush=True,
        )
    points += [("paper, oracle: 95% and 80% sparse", 0.05, 0.2), ("paper, 85% sparse throughout", 0.15, 0.15)]
    rows = [bytes_row(weights, *p) for p in points]
    trained = artifact_row(study, weights)
    rows += [] if trained is None else [trained]
    table = study.table("bytes")
    for row in rows:
        table.add(model=study.name, **row, batch=1)
    by_name = {r["point"]: r for r in rows}
    claim, best = by_name["paper, 85% sparse throughout"], by_name.get("oracle limit, both")
    image = plot_bytes(study, rows)
    study.write(
        "bytes",
        "Weight bytes",
        "Reads for one token at batch 1, all weights of one type, no KV cache. Ours: K and V are always"
        " projected. `paper`: matrices of the layers only, all four projections of an unselected head"
        " skipped, no predictors. `model`: with LM head, embeddings' rows and last norm; its share is of all"
        " stored weights.",
        markdown(
            rows,
            {
                "point": "point",
                "neurons": "neurons",
                "heads": "heads",
                "layers read": "layers_read",
                "x fewer": "layers_fewer",
                "paper's account": "paper_read",
                "x fewer, paper's": "paper_fewer",
                "model read": "model_read",
                "x fewer, model": "model_fewer",
            },
        ),
        f"Sparsity of 85% throughout is {claim['paper_fewer']:.1f}x fewer bytes by the paper's account (it"
        f" says 7x); with K and V always read it is {claim['layers_fewer']:.1f}x of this model's layers, and"
        f" {claim['model_fewer']:.1f}x with what lies outside them"
        f" ({100 * weights.outside / (weights.outside + weights.layers_read(1, 1, 1)):.0f}% of a dense step's"
        " weights here)."
        + (
            ""
            if best is None
            else (
                f" At the oracle limit of both blocks it is {best['layers_fewer']:.1f}x (paper's account"
                f" {best['paper_fewer']:.1f}x), of the whole model {best['model_fewer']:.1f}x."
            )
        ),
        image,
    )


def plot_bytes(study: Study, rows: list[dict[str, Any]]) -> str:
    made = study.figure(1, 1, width=7.5, height=0.45 * len(rows) + 1.2)
    if made is None:
        return ""
    figure, [[axis]] = made
    for offset, (key, label) in enumerate(
        (
            ("paper_read", "layers, the paper's account"),
            ("layers_read", "layers, K and V always read"),
            ("model_read", "whole model, of stored weights"),
        )
    ):
        axis.barh(
            [i + 0.27 * (offset - 1) for i in range(len(rows))],
            [r[key] for r in rows],
            height=0.25,
            label=label,
        )
    axis.set_yticks(range(len(rows)), [r["point"] for r in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="share of weight bytes read a token")
    axis.legend(fontsize=7)
    return study.save(figure, "bytes", "weight bytes at batch 1")


# --- predictability


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


# --- drift


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
            spread = [[r[key] - r[f"{key}_p5"] for r in found], [r[f"{key}_p95"] - r[key] for r in found]]
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


# --- neighbours


def with_bias(fc1: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
    """Neurons as database vectors: the inner product with [x, 1] is the pre-activation."""
    return torch.cat([fc1, bias[:, None]], 1).float().contiguous().numpy()


def with_one(x: torch.Tensor) -> np.ndarray:
    return torch.cat([x.float(), torch.ones(len(x), 1)], 1).contiguous().numpy()


def to_l2(database: np.ndarray) -> np.ndarray:
    """One more coordinate that gives all vectors the same norm: the nearest by distance to [query, 0] has the
    largest inner product.
    """
    squares = (database.astype(np.float64) ** 2).sum(1)
    return np.concatenate([database, np.sqrt(squares.max() - squares)[:, None]], 1).astype(np.float32)


@dataclass
class Search:
    """A way to look neurons up: `ids(queries [T, hidden + 1], k)` gives [T, k], -1 where there are fewer."""

    method: str
    setting: str
    ids: Callable[[np.ndarray, int], np.ndarray]
    build_s: float


def searches(faiss: Any, database: np.ndarray, k: int) -> list[Search]:
    """Exact and approximate inner-product searches over one database."""
    count, width = database.shape
    found = []

    def build(make: Callable[[], Any], vectors: np.ndarray) -> tuple[Any, float]:
        start = time.perf_counter()
        index = make()
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
        return index, time.perf_counter() - start

    flat, seconds = build(lambda: faiss.IndexFlatIP(width), database)
    found.append(Search("exact", "IndexFlatIP", lambda q, k: flat.search(q, k)[1], seconds))

    def hnsw(metric: int, wide: int) -> Any:
        index = faiss.IndexHNSWFlat(wide, HNSW_LINKS, metric)
        index.hnsw.efConstruction = HNSW_BUILD
        return index

    graph, seconds = build(lambda: hnsw(faiss.METRIC_INNER_PRODUCT, width), database)
    spheres, seconds_l2 = build(lambda: hnsw(faiss.METRIC_L2, width + 1), to_l2(database))
    for multiple in HNSW_SEARCH:
        candidates = max(16, multiple * k)
        parameters = faiss.SearchParametersHNSW(efSearch=candidates)
        found.append(
            Search(
                "HNSW, inner product",
                f"efSearch {candidates}",
                lambda q, k, p=parameters: graph.search(q, k, params=p)[1],
                seconds,
            )
        )
        found.append(
            Search(
                "HNSW, L2 by augmentation",
                f"efSearch {candidates}",
                lambda q, k, p=parameters: spheres.search(np.pad(q, ((0, 0), (0, 1))), k, params=p)[1],
                seconds_l2,
            )
        )
    lists = max(1, round(math.sqrt(count)))

    def ivf() -> Any:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = (
            1  # it warns below 39; a list holds about as many vectors as there are lists
        )
        return index

    inverted, seconds = build(ivf, database)
    for share in IVF_PROBES:
        probes = max(1, round(share * lists))
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        found.append(
            Search(
                "IVF",
                f"nprobe {probes} of {lists}",
                lambda q, k, p=parameters: inverted.search(q, k, params=p)[1],
                seconds,
            )
        )
    return found


def mask_of(ids: np.ndarray, units: int) -> torch.Tensor:
    """[T, k] of ids, -1 for none -> [T, units], bool."""
    mask = torch.zeros(len(ids), units + 1, dtype=torch.bool)
    mask.scatter_(1, torch.from_numpy(np.where(ids < 0, units, ids)), True)
    return mask[:, :units]


def one_scale(scores: torch.Tensor, other_scores: torch.Tensor, other_z: torch.Tensor) -> torch.Tensor:
    """Scores comparable between neurons, in residual standard deviations: integer predictors carry a scale
    for every neuron.

    Args:
        scores: [T, ffn]. other_scores, other_z: of other text, for a regression of the pre-activation on the
            score, a neuron each.
    """
    s, true = other_scores.double(), other_z.double()
    s_mean, z_mean = s.mean(0), true.mean(0)
    variance = (s - s_mean).square().mean(0).clamp_min(1e-30)
    slope = ((s - s_mean) * (true - z_mean)).mean(0) / variance
    left = (true - z_mean - slope * (s - s_mean)).square().mean(0)
    floor = 1e-3 * (true - z_mean).square().mean(0).clamp_min(1e-30)
    return ((z_mean + slope * (scores.double() - s_mean)) / torch.maximum(left, floor).sqrt()).float()


def density_at_recall(scores: torch.Tensor, active: torch.Tensor, recall: float) -> float:
    """Share of units above the one threshold that catches this share of the active ones."""
    caught = ascending(scores[active])
    if not len(caught):
        return math.nan
    missed = min(len(caught) - 1, len(caught) - math.ceil(recall * len(caught) - 1e-9))
    return float((scores >= caught[missed]).float().mean())


@dataclass
class Base:
    """A database of neurons and the queries put to it.

    Attributes:
        x: [T, hidden], grouped by windows of `group` tokens; z: [T, ffn], true pre-activations.
        gate: tensors of its predictor, or None. fit_on: (x, z) of other text, for the predictor's scale;
            None: its scores mean nothing.
    """

    label: str
    fc1: torch.Tensor
    bias: torch.Tensor
    x: torch.Tensor
    z: torch.Tensor
    group: int
    gate: dict[str, torch.Tensor] | None
    fit_on: tuple[torch.Tensor, torch.Tensor] | None
    synthetic: bool = False


def synthetic_base(geometry: str, tokens: int, seed: int) -> Base:
    """Random neurons of another size, about one in 15 active; a random int8 predictor of 3% of the MLP's
    bytes.
    """
    hidden, ffn = (int(n) for n in geometry.lower().split("x"))
    g = torch.Generator().manual_seed(seed)
    fc1, bias, x = (
        torch.randn(ffn, hidden, generator=g) * hidden**-0.5,
        torch.full((ffn,), -1.5),
        torch.randn(tokens, hidden, generator=g),
    )
    rank = max(16, int(0.03 * 2 * hidden * ffn * 2 / (hidden + ffn)) // 16 * 16)
    gate = {
        "down": torch.randint(-127, 128, (rank, hidden), generator=g, dtype=torch.int8),
        "up": torch.randint(-127, 128, (ffn, rank), generator=g, dtype=torch.int8),
        "bias": torch.zeros(ffn),
        "activation_rate": torch.zeros(ffn),
    }
    return Base(
        f"SYNTHETIC {hidden}x{ffn}", fc1, bias, x, x @ fc1.T + bias, tokens, gate, None, synthetic=True
    )


def neighbour_rows(study: Study, faiss: Any, base: Base, layer: Any) -> list[dict[str, Any]]:
    """Recall and time of every search and of the predictor over one database."""
    ffn, active = len(base.fc1), base.z > 0
    natural = float(active.float().mean())
    k = max(1, round(natural * ffn))
    queries = with_one(base.x)
    found = searches(faiss, with_bias(base.fc1, base.bias), k)
    truth = active.double().unflatten(0, (-1, base.group)).sum((1, 2))

    def recall(mask: torch.Tensor) -> dict[str, float]:
        value, error = ratio_error((mask & active).double().unflatten(0, (-1, base.group)).sum((1, 2)), truth)
        return {"recall": value, "recall_se": error}

    common = {
        "model": study.name if not base.synthetic else "none",
        "layer": layer,
        "database": base.label,
        "synthetic": base.synthetic,
        "vectors": ffn,
        "width": base.fc1.shape[1] + 1,
        "k": k,
        "natural_density": natural,
    }
    rows, runs, exact = [], {}, None
    single = [queries[i : i + 1] for i in range(min(study.args.neighbours_tokens, len(queries)))]
    inputs = [base.x[i : i + 1].contiguous() for i in range(len(single))]
    scores = None
    if base.gate is not None and base.fit_on is not None:
        predictor = Predictor(base.gate)
        scores = one_scale(predictor.scores(base.x), predictor.scores(base.fit_on[0]), base.fit_on[1])
    for search in found:
        mask = mask_of(search.ids(queries, k), ffn)
        exact = mask if exact is None else exact
        row = {
            **common,
            "method": search.method,
            "setting": search.setting,
            "density": float(mask.float().mean()),
            **recall(mask),
            "of_exact": float((mask & exact).sum() / exact.sum()),
            "build_s": search.build_s,
        }
        if scores is not None:
            row["predictor_density_at_equal_recall"] = density_at_recall(scores, active, row["recall"])
        rows.append(row)
        runs[f"{search.method}/{search.setting}"] = lambda i, s=search: s.ids(single[i], k)
    plain = torch.nn.functional.linear
    rows.append(
        {
            **common,
            "method": "fc1 itself",
            "setting": "PyTorch, fp32",
            "density": natural,
            "recall": 1.0,
            "of_exact": 1.0,
            "predictor_density_at_equal_recall": math.nan,
        }
    )
    runs["fc1 itself/PyTorch, fp32"] = lambda i: (plain(inputs[i], base.fc1, base.bias) > 0).nonzero()
    if base.gate is not None:
        gate = Predictor(base.gate)
        lens = torch.ones(1, dtype=torch.int32)
        sides = {"PyTorch": lambda i: (gate.scores(inputs[i]) > 0).nonzero()}
        if cpu.available():
            sides["native"] = lambda i: cpu.select_neurons(inputs[i], gate.down, gate.up, gate.bias, lens)
        for side, run in sides.items():
            row = {
                **common,
                "method": "predictor",
                "setting": (
                    f"{side}, rank {len(base.gate['down'])},"
                    f" {str(base.gate['down'].dtype).removeprefix('torch.')}"
                ),
            }
            if scores is not None:
                mask = choose(scores - scores.min() + 1.0, k)
                row |= {
                    "density": k / ffn,
                    **recall(mask),
                    "of_exact": float((mask & exact).sum() / exact.sum()),
                }
                served = gate.scores(base.x) > 0
                row |= {
                    "served_density": float(served.float().mean()),
                    "served_recall": recall(served)["recall"],
                }
            rows.append(row)
            runs[f"{row['method']}/{row['setting']}"] = run
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = Timer(torch.device("cpu"), study.args.neighbours_rounds)(runs, len(single))
    finally:
        torch.set_num_threads(threads)
    for row in rows:
        us = times[f"{row['method']}/{row['setting']}"]
        row |= {
            "us": median(us),
            "us_p20": percentile(us, 0.2),
            "us_p80": percentile(us, 0.8),
            "timed_tokens": len(single),
            "rounds": len(us),
        }
    return rows


def neighbour_bases(study: Study) -> Iterator[tuple[int, Base]]:
    """Of some layers: fc1, queries spread over the scored windows, the artifact's predictor."""
    opt, wanted = study.opt, study.some_layers()
    loaded = trained_predictor(study, "neighbours")
    group = min(NEIGHBOUR_TOKENS_A_WINDOW, study.seq_len - 1)
    places = torch.linspace(1, study.seq_len - 1, group).long()
    walks = (
        Walk(opt, study.scored, study.args.batch),
        Walk(opt, study.train[: max(1, 4096 // study.seq_len)], study.args.batch),
    )
    for layer in range(max(wanted) + 1):
        states = []
        for walk in walks:
            parts: list[list[torch.Tensor]] = [[], []]
            for seen in walk.layer():
                for part, value in zip(parts, (seen.inputs["mlp_input"], seen.z), strict=True):
                    rows = value.view(-1, study.seq_len, value.shape[-1])
                    part.append(
                        (rows[:, places.to(value.device)] if walk is walks[0] else rows[:, 1:])
                        .flatten(0, 1)
                        .float()
                        .cpu()
                    )
            states.append([torch.cat(p) for p in parts])
        if layer not in wanted:
            continue
        weight, bias = opt.weight(layer, "fc1").float().cpu(), opt.weight(layer, "fc1", "bias")
        gate = None
        if loaded is not None:
            spec, tensors = loaded.gate(layer, "mlp")
            # Scores of the other lookaheads belong to other inputs.
            gate = tensors if spec.sparse and spec.lookahead == "self" else None
        yield (
            layer,
            Base(
                f"fc1 of layer {layer}",
                weight,
                torch.zeros(len(weight)) if bias is None else bias.float().cpu(),
                *states[0],
                group,
                gate,
                tuple(states[1]),
            ),
        )


def part_neighbours(study: Study) -> None:
    try:
        import faiss
    except ImportError:
        print(
            "neighbours: SKIPPED, faiss is not installed; pip install faiss-cpu and run: --parts neighbours",
            flush=True,
        )
        return
    faiss.omp_set_num_threads(1)
    table, rows = study.table("neighbours"), []
    for layer, base in neighbour_bases(study):
        rows += neighbour_rows(study, faiss, base, layer)
        print(f"neighbours: layer {layer} done", flush=True)
    for geometry in study.args.neighbours_geometry:
        made = neighbour_rows(
            study, faiss, synthetic_base(geometry, 4 * study.args.neighbours_tokens, study.args.seed), ""
        )
        rows += made
        print(f"neighbours: {made[0]['database']} done", flush=True)
    for row in rows:
        table.add(**row, threads=1, faiss=faiss.__version__)
    image = plot_neighbours(study, rows)
    real = [r for r in rows if not r["synthetic"]]
    shown = real_means(real) + [r for r in rows if r["synthetic"]]
    layers = len({r["layer"] for r in real})
    study.write(
        "neighbours",
        "Neurons as nearest neighbours",
        "Database: rows of fc1 with the bias appended; query: the MLP's input with 1 appended; k: the"
        " layer's natural density. One thread, one token at a time, microseconds with the call from Python,"
        f" median of {study.args.neighbours_rounds} rounds in which all took turns (20% and 80% in the CSV)."
        " `of exact`: neurons shared with the exact search. `predictor's density`: what the trained"
        " predictor keeps to reach the same recall with one threshold. Its own row is at k a token; its"
        " scores are put on one scale by a regression a neuron on training text. Real rows are means over"
        f" {layers} layers. SYNTHETIC rows: random vectors and a random predictor, for time only; random"
        " vectors have no neighbourhoods, so their recall says nothing about a trained model.",
        markdown(
            shown,
            {
                "database": "database",
                "method": "method",
                "setting": "setting",
                "recall": "recall",
                "of exact": "of_exact",
                "predictor's density": "predictor_density_at_equal_recall",
                "us": "us",
                "build, s": "build_s",
            },
        ),
        *neighbour_reading(real_means(real), [r for r in rows if r["synthetic"]]),
        image,
    )


def real_means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over layers, by method and place among its settings (efSearch follows k, and k the layer)."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for layer in dict.fromkeys(r["layer"] for r in rows):
        seen: dict[str, int] = {}
        for r in (r for r in rows if r["layer"] == layer):
            seen[r["method"]] = seen.get(r["method"], -1) + 1
            groups.setdefault((r["method"], seen[r["method"]]), []).append(r)
    out = []
    for (method, place), found in groups.items():
        setting = (
            f"efSearch max(16, {HNSW_SEARCH[place]}k)" if method.startswith("HNSW") else found[0]["setting"]
        )
        out.append(
            {"database": "fc1, mean", "method": method, "setting": setting}
            | {
                k: mean_of(found, k)
                for k in (
                    "recall",
                    "of_exact",
                    "predictor_density_at_equal_recall",
                    "us",
                    "build_s",
                    "natural_density",
                    "served_density",
                    "served_recall",
                )
            }
        )
    return out


def neighbour_reading(real: list[dict[str, Any]], synthetic: list[dict[str, Any]]) -> list[str]:
    out = []
    for rows in (real, synthetic):
        if not rows:
            continue
        by = {(r["method"], r["setting"].split(",")[0]): r for r in rows}
        exact, fc1 = by["exact", "IndexFlatIP"], by["fc1 itself", "PyTorch"]
        native = by.get(("predictor", "native")) or by.get(("predictor", "PyTorch"))
        approximate = [r for r in rows if r["method"].startswith(("HNSW", "IVF"))]
        text = (
            f"{rows[0]['database']}: exact search at k finds {exact['recall']:.3f} of the active neurons in"
            f" {exact['us']:.0f} us, fc1 itself takes {fc1['us']:.0f} us."
        )
        if native is not None:
            text += f" The predictor ({native['setting'].split(',')[0]}) takes {native['us']:.0f} us" + (
                f" and finds {native['recall']:.3f} at k (as served: {native['served_recall']:.3f} at density"
                f" {native['served_density']:.3f})."
                if native.get("recall") is not None and not math.isnan(native["recall"])
                else "."
            )
            enough = [r for r in approximate if r["recall"] >= native.get("recall", math.nan)]
            if native.get("recall") is not None and not math.isnan(native["recall"]):
                best = min(enough, key=lambda r: r["us"], default=None)
                text += (
                    " No approximate search here reaches its recall."
                    if best is None
                    else (
                        f" The fastest approximate search of at least its recall is {best['method']}"
                        f" ({best['setting']}): {best['recall']:.3f} in {best['us']:.0f} us."
                    )
                )
        best = max(approximate, key=lambda r: r["of_exact"])
        out.append(
            text
            + f" Of the approximate searches the most faithful, {best['method']} ({best['setting']}), shares"
            f" {best['of_exact']:.3f} with the exact one and takes {best['us']:.0f} us."
        )
    return out


def plot_neighbours(study: Study, rows: list[dict[str, Any]]) -> str:
    databases = {"real": [r for r in rows if not r["synthetic"]]} | {
        r["database"]: [q for q in rows if q["database"] == r["database"]] for r in rows if r["synthetic"]
    }
    made = study.figure(1, len(databases), height=3.8)
    if made is None:
        return ""
    figure, [axes] = made
    for axis, (name, found) in zip(axes, databases.items(), strict=True):
        found = real_means(found) if name == "real" else found
        key = "recall" if name == "real" else "of_exact"
        for method in dict.fromkeys(r["method"] for r in found):
            points = [(r["us"], r.get(key)) for r in found if r["method"] == method]
            if all(
                p[1] is None or math.isnan(p[1]) for p in points
            ):  # a random predictor's recall means nothing
                for (us, _), row in zip(points, (r for r in found if r["method"] == method), strict=True):
                    axis.axvline(
                        us,
                        color="k",
                        ls=":" if row["setting"].startswith("PyTorch") else "--",
                        lw=0.8,
                        label=f"predictor, {row['setting'].split(',')[0]}: time only",
                    )
            else:
                axis.plot(
                    *zip(*points, strict=True),
                    "-o" if method.startswith(("HNSW", "IVF")) else "s",
                    ms=4,
                    label=method,
                )
        axis.set(
            xscale="log",
            xlabel="us a token, one thread",
            ylabel="recall of active neurons at k" if key == "recall" else "share of exact top k",
            title="fc1, mean over layers" if name == "real" else name,
        )
        axis.title.set_fontsize(9)
        axis.tick_params(axis="x", which="minor", labelsize=6, labelrotation=90)
        axis.legend(fontsize=6)
    return study.save(figure, "neighbours", "neurons by nearest-neighbour search")


# --- heads


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


PARTS: dict[str, Callable[[Study], None]] = {
    "oracle": part_oracle,
    "bytes": part_bytes,
    "predictability": part_predictability,
    "drift": part_drift,
    "neighbours": part_neighbours,
    "heads": part_heads,
}
SECTION = re.compile(r"<!-- part: (\w+) \| (.*?) -->\n(.*?)(?=\n<!-- part: |\Z)", re.DOTALL)


def command_line(arguments: list[str]) -> str:
    """As typed, without the directories of absolute paths."""
    return " ".join(
        [
            "python benchmarks/existence.py",
            *(shlex.quote(Path(a).name if a.startswith("/") else a) for a in arguments),
        ]
    )


def write_report(study: Study, command: str) -> Path:
    """existence.md: this run's sections, and those of earlier runs on the same model for parts that did not
    run now.
    """
    path, opt = study.output / "existence.md", study.opt
    title = f"# Contextual sparsity in {study.name}: does it exist, can it be predicted?"
    sections = {part: (command, text) for part, text in study.sections.items()}
    if path.is_file():
        old = path.read_text(encoding="utf-8")
        if old.startswith(title + "\n"):
            sections = {
                part: (made_by, text.strip()) for part, made_by, text in SECTION.findall(old)
            } | sections
    names = {k: ", ".join(Path(s).name for s in getattr(study.args, k)) for k in ("data", "held_out")}
    lines = [
        title,
        "",
        f"    {command}",
        "",
        (
            f"Model: {study.name}, {len(opt.layers)} layers, hidden {opt.geometry.hidden_size}, ffn"
            f" {opt.geometry.ffn_dim}, {study.units['heads']} heads. Windows of {study.seq_len} tokens:"
            f" {study.train.numel():,} tokens of {names['data']} to fit, {study.held_out.numel():,} of"
            f" {names['held_out']} for perplexity, the first {study.scored.numel():,} of these for everything"
            " else that is scored. ± is a standard error over windows."
        ),
        "",
    ]
    for part in PARTS:
        if part in sections:
            made_by, text = sections[part]
            lines += [f"<!-- part: {part} | {made_by} -->", text, ""]
            if made_by != command and f"`{made_by}`" not in text:
                lines.insert(-1, f"\nThis section: `{made_by}`")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True, help="text to fit on")
    parser.add_argument("--held-out", nargs="+", required=True, help="text to score")
    parser.add_argument("--output", required=True)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--predictor", help="artifact directory; MODEL/dejavu unless named")
    parser.add_argument("--tokens", type=int, default=65_536, help="of training text")
    parser.add_argument("--held-out-tokens", type=int, default=16_384, help="for perplexity")
    parser.add_argument("--scored-tokens", type=int, default=8_192, help="of these, for the other statistics")
    parser.add_argument("--max-documents", type=int, help="of each text")
    parser.add_argument(
        "--seq-len", type=int, help="of a window; as long as the model allows, at most 2048, unless given"
    )
    parser.add_argument("--batch", type=int, default=4, help="windows at once")
    parser.add_argument(
        "--layers", type=int, default=12, help="that predictability and neighbours look at, evenly spaced"
    )
    parser.add_argument(
        "--neighbours-geometry",
        nargs="+",
        default=[],
        help="HIDDENxFFN: search times on a synthetic random database of this size too",
    )
    parser.add_argument("--neighbours-tokens", type=int, default=16, help="timed in every round")
    parser.add_argument("--neighbours-rounds", type=int, default=21)
    parser.add_argument("--sentence", default=SENTENCE, help="for the attention maps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice unless given")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    study = Study(args)
    command = command_line(arguments)
    for part in (p for p in PARTS if p in args.parts):
        start = time.monotonic()
        PARTS[part](study)
        print(f"{part}: {time.monotonic() - start:.0f} s", flush=True)
        write_report(study, command)
    print(study.output / "existence.md")


if __name__ == "__main__":
    main()
