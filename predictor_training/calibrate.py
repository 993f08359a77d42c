"""Choose every gate's operating point under a perplexity budget, and measure what it then selects.

Each gate has candidate operating points (a density: of neurons as a multiple of the natural one, of heads as
a share). Each is measured alone; then bytes are traded against perplexity over all gates at once (one
Lagrange multiplier), and the joint choice is measured, because effects of different layers do not simply add
up.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_dejavu.artifact import DTYPES
from vllm_dejavu.kernels import reference
from vllm_dejavu.manifest import GateSpec
from vllm_dejavu.predictor import Predictor, quantize
from vllm_dejavu.predictor_training.collect import layer_lookahead
from vllm_dejavu.predictor_training.forms import FittedMlp
from vllm_dejavu.predictor_training.hf_opt import LayerStates, OptModel, Resumable
from vllm_dejavu.predictor_training.labels import active_neurons, head_contributions, head_grams
from vllm_dejavu.predictor_training.train import FittedHeads

# Of the neurons' natural density.
DENSITY_MULTIPLES = (3.0, 2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.7)
HEAD_DENSITIES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Part of the budget spent on the calibration text; the rest is for text it has not seen.
BUDGET_USED = 0.9
UPPER_QUANTILE = 0.95
# Tokens on which single candidates are compared; the joint choice is measured on all of the calibration text.
PROBE_TOKENS = 4096
# Joint measurements spent on single steps after the search over all gates.
REFINEMENTS = 6
# Points of the density-quality curve, and edges of the histograms of scores.
CURVE_POINTS = 8
SCORE_BINS = (-8.0, 8.0, 64)

Key = tuple[int, str]  # layer, block


@dataclass(eq=False)
class Gate:
    """A fitted predictor at one operating point, as training runs it. `tensors` are those of the artifact.

    margin: added to an MLP's scores before they were scaled. threshold: of heads' true contributions.
    """

    block: str
    lookahead: str
    tensors: dict[str, torch.Tensor]
    margin: float | None = None
    threshold: float | None = None
    predictor: Predictor = field(init=False)

    def __post_init__(self) -> None:
        self.predictor = Predictor(self.tensors)

    def scores(self, states: LayerStates, value: torch.Tensor) -> torch.Tensor:
        """[T, units]; positive is selected. value: the block's pre-activations or attention output, which
        only an oracle may read.
        """
        x = states.gate_input(self.block, self.lookahead)
        return self.predictor.to(x.device).scores(x)


@dataclass(eq=False)
class Point:
    """A candidate operating point: its gate (None: dense), density, bytes relative to a dense layer's MLP,
    cost in nats.
    """

    gate: Gate | None
    density: float
    bytes: float
    nats: float
    label: str


def stored(tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """A predictor's tensors as an artifact of this dtype holds them: biases and rates in fp32, weights in
    `dtype`.
    """
    tensors = {k: v.float() if k in ("bias", "activation_rate") else v for k, v in tensors.items()}
    if dtype == "int8":
        return quantize(tensors, 8)
    return {k: v if k in ("bias", "activation_rate") else v.to(DTYPES[dtype]) for k, v in tensors.items()}


def make_mlp_gate(fitted: FittedMlp, margin: float, lookahead: str, dtype: str) -> Gate:
    """Fold the margin into the bias."""
    tensors = {
        "down": fitted.down,
        "up": fitted.up,
        "bias": fitted.bias + margin,
        "activation_rate": fitted.activation_rate,
    }
    return Gate("mlp", lookahead, stored(tensors, dtype), margin=margin)


def make_head_gate(
    fitted: FittedHeads, cut: float, threshold: float, rate: torch.Tensor, lookahead: str, dtype: str
) -> Gate:
    """A head is selected when its predicted score exceeds `cut`; it is truly active when its contribution
    exceeds `threshold`.
    """
    tensors = {"weight": fitted.weight, "bias": fitted.bias - cut, "activation_rate": rate}
    return Gate("attention", lookahead, stored(tensors, dtype), threshold=threshold)


class Masked:
    """Runs a model with a set of gates; with `measure` also records what they select.

    Attributes (after a run with measure):
        counts: key -> per-token selected counts, list of [T]. active, hit: key -> totals. rate: key ->
            [units] active counts.
        rows: key -> masks of `keep_rows` tokens drawn from all of the text, for unions. First tokens are left
            out: they are never decoded. histograms: key -> [2, bins], scores of inactive and active units.
    """

    def __init__(
        self,
        opt: OptModel,
        gates: dict[Key, Gate],
        *,
        measure: bool = False,
        keep_rows: int = 4096,
        seed: int = 0,
    ):
        self.opt, self.gates, self.measure, self.keep_rows = opt, gates, measure, keep_rows
        self.counts: dict[Key, list[torch.Tensor]] = {}
        self.active: dict[Key, int] = {}
        self.hit: dict[Key, int] = {}
        self.rate: dict[Key, torch.Tensor] = {}
        self.rows: dict[Key, list[torch.Tensor]] = {}
        self.histograms: dict[Key, torch.Tensor] = {}
        self.tokens = 0
        self._drawn = torch.zeros(0, dtype=torch.long)
        self._generator = torch.Generator().manual_seed(seed)
        heads = opt.config.num_attention_heads
        self.grams = (
            {i: head_grams(opt.weight(i, "self_attn.out_proj"), heads) for i, b in gates if b == "attention"}
            if measure
            else {}
        )

    def _mask(
        self, key: Key, states: LayerStates, value: torch.Tensor, truth: Callable[[Gate], torch.Tensor]
    ) -> torch.Tensor | None:
        gate = self.gates.get(key)
        if gate is None:
            if self.measure and key[1] == "mlp":
                self.active[key] = self.active.get(key, 0) + int(active_neurons(value).sum())
            return None
        scores = gate.scores(states, value)
        mask = reference.select(scores, torch.ones(len(scores), dtype=torch.bool, device=scores.device))
        if self.measure:
            active = truth(gate)
            self.counts.setdefault(key, []).append(mask.sum(1))
            self.active[key] = self.active.get(key, 0) + int(active.sum())
            self.hit[key] = self.hit.get(key, 0) + int((active & mask).sum())
            self.rate[key] = self.rate.get(key, 0) + active.sum(0)
            self.rows.setdefault(key, []).append(mask[self._drawn.to(mask.device)])
            self._count_scores(key, scores, active)
        return mask

    def _count_scores(self, key: Key, scores: torch.Tensor, active: torch.Tensor) -> None:
        low, high, bins = SCORE_BINS
        # In units of their spread: stored scores have any scale.
        scaled = (scores / scores.std().clamp_min(1e-12)).clamp(low, high).cpu()
        counts = torch.stack([torch.histc(scaled[m], bins, low, high) for m in (~active.cpu(), active.cpu())])
        self.histograms[key] = self.histograms.get(key, 0) + counts

    def on_mlp(self, layer: int, states: LayerStates, z: torch.Tensor) -> torch.Tensor | None:
        return self._mask((layer, "mlp"), states, z, lambda gate: active_neurons(z))

    def on_attention(self, layer: int, states: LayerStates, attn: torch.Tensor) -> torch.Tensor | None:
        return self._mask(
            (layer, "attention"),
            states,
            attn,
            lambda gate: head_contributions(attn, self.grams[layer]) > gate.threshold,
        )

    def nll(self, tokens: torch.Tensor, batch: int) -> float:
        """Mean negative log-likelihood, nats a token. tokens: [num_windows, seq_len]."""
        total, count = 0.0, 0
        share = min(1.0, self.keep_rows / max(1, tokens[:, 1:].numel()))
        with self.opt.observed(self.on_attention, self.on_mlp):
            for part in tokens.split(batch):
                if self.measure:
                    later = torch.arange(part.numel()).view(part.shape)[:, 1:].flatten()
                    chosen = torch.randperm(len(later), generator=self._generator)[
                        : math.ceil(share * len(later))
                    ]
                    self._drawn = later[chosen]
                values = self.opt.nll(part)
                total, count = total + float(values.double().sum()), count + values.numel()
                self.tokens += part.numel()
        return total / count

    def nll_from(self, runs: list[Resumable]) -> float:
        """As `nll`, of batches that stand in front of the first layer with a gate."""
        with self.opt.observed(self.on_attention, self.on_mlp):
            return float(torch.cat([self.opt.nll_from(run) for run in runs]).double().mean())


@dataclass
class Seen:
    """What one layer did on the probe text: `mlp_x`, `attn_x` [T, hidden]: gate inputs; `density`: of
    neurons; `norms` [T, heads]: the heads' true contributions."""

    mlp_x: torch.Tensor
    density: float
    attn_x: torch.Tensor
    norms: torch.Tensor


class Calibrator:
    """Searches operating points.

    Args:
        tokens: [num_windows, seq_len] of held-out text. budget: allowed perplexity rise, 0.01 for 1%. blocks:
            to gate.
        state: file for finished measurements, so that an interrupted search resumes, or None; key: as
            `Collector`.
        log: called with a dict for every measurement made.
    """

    def __init__(
        self,
        opt: OptModel,
        mlp: list[FittedMlp],
        heads: list[FittedHeads],
        lookahead: dict[str, str],
        tokens: torch.Tensor,
        *,
        budget: float,
        dtype: str,
        batch: int,
        blocks: tuple[str, ...] = ("mlp", "attention"),
        state: Path | None = None,
        key: dict[str, Any] | None = None,
        log: Callable[[dict[str, Any]], None] = lambda record: None,
    ):
        self.opt, self.mlp, self.heads, self.lookahead, self.tokens = opt, mlp, heads, lookahead, tokens
        self.budget, self.dtype, self.batch, self.blocks, self.log = budget, dtype, batch, blocks, log
        self.state, self.key = state, json.dumps(key, sort_keys=True)
        # Candidates are compared with the dense run on the same tokens, so a part of the text tells them
        # apart.
        self.probe = tokens[: max(1, min(len(tokens), PROBE_TOKENS // tokens.shape[1]))]
        self.cache: dict[str, float] = {}
        if state is not None and state.is_file():
            saved = json.loads(state.read_text(encoding="utf-8"))
            self.cache = saved["nll"] if saved.get("key") == self.key else {}

    def measured(self, name: str, measure: Callable[[], float]) -> float:
        """Mean nats of a text with some gates, remembered by name."""
        if name not in self.cache:
            self.cache[name] = measure()
            self.log({"measured": name, "nats": self.cache[name]})
            if self.state is not None:
                partial = self.state.with_suffix(".partial")
                partial.write_text(json.dumps({"key": self.key, "nll": self.cache}), encoding="utf-8")
                os.replace(partial, self.state)
        return self.cache[name]

    def run(self) -> tuple[dict[Key, Gate], dict[str, Any]]:
        """The chosen gates (dense blocks are absent) and a record of the search."""
        points = self.points()
        choices = _choices(points)
        chosen, record = self._joint(points, choices)
        record["curve"] = self._curve(choices)
        return {k: p.gate for k, p in chosen.items() if p.gate is not None}, record

    def points(self) -> dict[Key, list[Point]]:
        """Every gate's candidates, each measured alone on the probe text, the most careful (dense) first."""
        limit = math.log1p(self.budget)
        points: dict[Key, list[Point]] = {}
        runs = [self.opt.start(part) for part in self.probe.split(self.batch)]
        dense = self.measured("dense/probe", lambda: Masked(self.opt, {}).nll_from(runs))
        for layer in tqdm(range(len(self.opt.layers)), desc="calibrate", unit="layer"):
            seen, following = self._observe(runs)
            for block in self.blocks:
                key = (layer, block)
                points[key] = [Point(None, 1.0, _dense_bytes(self.opt, block), 0.0, "dense")]
                for gate, density, label in self.candidates(key, seen):
                    size = _predictor_bytes(self.opt, gate) + density * _dense_bytes(self.opt, block)
                    masked = Masked(self.opt, {key: gate})
                    nats = self.measured(f"{layer}/{block}/{label}", partial(masked.nll_from, runs)) - dense
                    points[key].append(Point(gate, density, size, max(nats, 0.0), label))
                    if nats > limit:
                        break  # later candidates keep less
            runs = following
        return points

    def _observe(self, runs: list[Resumable]) -> tuple[Seen, list[Resumable]]:
        """One layer, dense: what it did, and the batches behind it."""
        opt, caught = self.opt, {name: [] for name in ("mlp_x", "density", "attn_x", "norms")}
        grams = head_grams(opt.weight(runs[0].layer, "self_attn.out_proj"), opt.config.num_attention_heads)

        def on_attention(layer: int, states: LayerStates, attn: torch.Tensor) -> None:
            caught["attn_x"].append(
                states.gate_input("attention", layer_lookahead(self.lookahead["attention"], layer)).clone()
            )
            caught["norms"].append(head_contributions(attn, grams))

        def on_mlp(layer: int, states: LayerStates, z: torch.Tensor) -> None:
            caught["mlp_x"].append(
                states.gate_input("mlp", layer_lookahead(self.lookahead["mlp"], layer)).clone()
            )
            caught["density"].append(active_neurons(z).float().mean(1))

        following = [opt.advance(run, on_attention, on_mlp) for run in runs]
        seen = {name: torch.cat(parts) for name, parts in caught.items()}
        return Seen(**{**seen, "density": float(seen["density"].mean())}), following

    def candidates(self, key: Key, seen: Seen) -> Iterator[tuple[Gate, float, str]]:
        """(gate, density, label) of a block, ever fewer units."""
        layer, block = key
        lookahead = layer_lookahead(self.lookahead[block], layer)
        if block == "mlp":
            plain = make_mlp_gate(self.mlp[layer], 0.0, lookahead, "float32").predictor.to(seen.mlp_x.device)
            scores = plain.scores(seen.mlp_x[::4]).flatten().cpu().sort().values
            for multiple in DENSITY_MULTIPLES:
                density = multiple * seen.density
                if 0 < density < 1:
                    margin = -float(scores[min(len(scores) - 1, int((1 - density) * len(scores)))])
                    yield (
                        make_mlp_gate(self.mlp[layer], margin, lookahead, self.dtype),
                        density,
                        f"{multiple:g} x natural",
                    )
            return
        fit = self.heads[layer]
        predicted = reference.linear_scores(
            seen.attn_x, fit.weight.to(seen.attn_x.device), fit.bias.float().to(seen.attn_x.device)
        )
        for density in HEAD_DENSITIES:
            cut, threshold = (quantile(v, 1 - density) for v in (predicted, seen.norms))
            rate = (seen.norms > threshold).float().mean(0).cpu()
            yield (
                make_head_gate(fit, cut, threshold, rate, lookahead, self.dtype),
                density,
                f"density {density:g}",
            )

    def _joint(
        self, points: dict[Key, list[Point]], choices: list[dict[Key, Point]]
    ) -> tuple[dict[Key, Point], dict[str, Any]]:
        """The cheapest choice whose measured perplexity rise stays inside the budget, by bisection on the
        multiplier.
        """
        dense = self.measured("dense/all", lambda: Masked(self.opt, {}).nll(self.tokens, self.batch))
        budget = BUDGET_USED * math.log1p(self.budget)
        with tqdm(
            desc="joint search", total=math.ceil(math.log2(len(choices) + 1)) + REFINEMENTS, unit="run"
        ) as bar:

            def rise(choice: dict[Key, Point]) -> float:
                bar.update()
                return (
                    self.measured(
                        f"joint/{_name(choice)}",
                        lambda: Masked(self.opt, _gates(choice)).nll(self.tokens, self.batch),
                    )
                    - dense
                )

            # choices[low] fits (or is all dense), choices[high] does not.
            chosen, nats = {k: ps[0] for k, ps in points.items()}, 0.0
            low, high = -1, len(choices)
            while high - low > 1:
                middle = (low + high) // 2
                measured = rise(choices[middle])
                if measured <= budget:
                    low, chosen, nats = middle, choices[middle], measured
                else:
                    high = middle
            # The multiplier skips points between the corners of its curve: spend what is left gate by gate.
            refused: set[Point] = set()
            for _ in range(REFINEMENTS):
                options = [
                    ((chosen[k].bytes - p.bytes) / max(p.nats - chosen[k].nats, 1e-6), k, p)
                    for k, ps in points.items()
                    for p in ps
                    if p not in refused
                    and p.bytes < chosen[k].bytes
                    and p.nats - chosen[k].nats <= budget - nats
                ]
                if not options:
                    break
                _, key, point = max(options, key=lambda o: o[0])
                measured = rise({**chosen, key: point})
                if measured <= budget:
                    chosen, nats = {**chosen, key: point}, measured
                else:
                    refused.add(point)
        record = {
            "dense_ppl": math.exp(dense),
            "sparse_ppl": math.exp(dense + nats),
            "ppl_increase": math.expm1(nats),
            "max_ppl_increase": self.budget,
            "points": {
                f"{k[0]}.{k[1]}": [[p.label, round(p.bytes, 5), round(p.nats, 6)] for p in ps]
                for k, ps in points.items()
            },
        }
        return chosen, record

    def _curve(self, choices: list[dict[Key, Point]]) -> list[dict[str, float]]:
        """Perplexity rise against density, measured on the probe text at joint choices from careful to
        daring.
        """
        dense = self.cache["dense/probe"]
        picks = sorted({round(i * (len(choices) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
        curve = []
        for choice in tqdm([choices[i] for i in picks], desc="density-quality curve", unit="run"):
            nats = (
                self.measured(
                    f"curve/{_name(choice)}",
                    lambda c=choice: Masked(self.opt, _gates(c)).nll(self.probe, self.batch),
                )
                - dense
            )
            means = {block: [p.density for k, p in choice.items() if k[1] == block] for block in self.blocks}
            curve.append(
                {"ppl_increase": math.expm1(nats), "bytes": sum(p.bytes for p in choice.values())}
                | {f"{block}_density": sum(values) / len(values) for block, values in means.items()}
            )
        return curve


def _choices(points: dict[Key, list[Point]]) -> list[dict[Key, Point]]:
    """Distinct joint choices from the most careful to the most daring, by the price of a nat in bytes."""
    choices: list[dict[Key, Point]] = []
    for exponent in range(160, -41, -1):
        price = 2.0 ** (exponent / 8)
        choice = {k: min(ps, key=lambda p: p.bytes + price * p.nats) for k, ps in points.items()}  # noqa: B023
        if not choices or choice != choices[-1]:
            choices.append(choice)
    return choices


def _name(choice: dict[Key, Point]) -> str:
    return ",".join(f"{k[0]}{k[1][0]}={p.label}" for k, p in choice.items())


def _gates(choice: dict[Key, Point]) -> dict[Key, Gate]:
    return {k: p.gate for k, p in choice.items() if p.gate is not None}


def quantile(values: torch.Tensor, q: float) -> float:
    """The value below which a share q lies, of all elements."""
    ordered = values.flatten().sort().values  # torch.quantile refuses more than 2^24 values
    return float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])


def describe(
    opt: OptModel, gates: dict[Key, Gate], tokens: torch.Tensor, dtype: str, batch: int, seed: int
) -> tuple[dict[Key, GateSpec], Masked]:
    """Run the chosen gates over the text and write down what they select: a GateSpec for every block of every
    layer, and the run.
    """
    run = Masked(opt, gates, measure=True, seed=seed)
    run.nll(tokens, batch)
    generator = torch.Generator().manual_seed(seed)
    specs: dict[Key, GateSpec] = {}
    for layer in range(len(opt.layers)):
        for block in ("mlp", "attention"):
            key = (layer, block)
            gate = gates.get(key)
            units = opt.config.ffn_dim if block == "mlp" else opt.config.num_attention_heads
            if gate is None:
                natural = run.active[key] / (run.tokens * units) if block == "mlp" else None
                specs[key] = GateSpec(state="dense", oracle_density=natural)
                continue
            counts = torch.cat(run.counts[key]).float() / units
            gate.tensors["activation_rate"] = (
                (run.rate[key] / run.tokens).float().cpu()
                if block == "attention"
                else gate.tensors["activation_rate"]
            )
            specs[key] = GateSpec(
                state="sparse",
                form="low_rank" if block == "mlp" else "linear",
                lookahead=gate.lookahead,
                rank=len(gate.tensors["down"]) if block == "mlp" else 0,
                dtype=dtype,
                density=_summary(counts),
                union_density=_unions(torch.cat(run.rows[key]).cpu(), generator),
                oracle_density=run.active[key] / (run.tokens * units),
                recall=run.hit[key] / run.active[key] if run.active[key] else 1.0,
                margin=gate.margin,
                threshold=gate.threshold,
            )
    return specs, run


def _summary(values: torch.Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "upper": quantile(values, UPPER_QUANTILE)}


def _unions(rows: torch.Tensor, generator: torch.Generator, draws: int = 200) -> dict[str, dict[str, float]]:
    """Share of units selected by any of B random rows, by B."""
    out = {}
    for batch in BATCH_SIZES:
        picks = torch.randint(len(rows), (draws, batch), generator=generator)
        out[str(batch)] = _summary(torch.stack([rows[p].any(0).float().mean() for p in picks]))
    return out


def _dense_bytes(opt: OptModel, block: str) -> float:
    """Bytes a gate can skip for one token, relative to one layer's MLP: fc1 and fc2; or Q, out_proj and the K
    and V of half the model's context."""
    hidden, ffn, context = opt.config.hidden_size, opt.config.ffn_dim, opt.config.max_position_embeddings / 2
    return 1.0 if block == "mlp" else (hidden * hidden + context * hidden) / (hidden * ffn)


def _predictor_bytes(opt: OptModel, gate: Gate) -> float:
    """Bytes of a gate's predictor, relative to one layer's MLP in 16 bits."""
    weights = [t for name, t in gate.tensors.items() if name in ("down", "up", "weight")]
    return sum(t.numel() * t.element_size() / 2 for t in weights) / (
        2 * opt.config.hidden_size * opt.config.ffn_dim
    )
