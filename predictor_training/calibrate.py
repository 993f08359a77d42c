"""Choose every gate's operating point under a perplexity budget, and measure what it then selects.

Each gate has candidate operating points (MLP: a margin in residual standard deviations; heads: a density). Each is
measured alone; then bytes are traded against perplexity over all gates at once (one Lagrange multiplier), and the joint
choice is measured, because effects of different layers do not simply add up.
"""
from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_dejavu.artifact import DTYPES, GateSpec
from vllm_dejavu.kernels import reference
from vllm_dejavu.predictor import Predictor
from vllm_dejavu.predictor_training.collect import layer_lookahead
from vllm_dejavu.predictor_training.hf_opt import LayerStates, OptModel
from vllm_dejavu.predictor_training.labels import active_neurons, head_contributions, head_grams
from vllm_dejavu.predictor_training.train import FittedHeads, FittedMlp

MARGINS = (2.0, 1.0, 0.5, 0.25, 0.0, -0.25, -0.5)
HEAD_DENSITIES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Part of the budget spent on the calibration text; the rest is for text it has not seen.
BUDGET_USED = 0.9
UPPER_QUANTILE = 0.95
# Tokens on which single candidates are compared; the joint choice is measured on all of the calibration text.
PROBE_TOKENS = 4096
# Joint measurements spent on single steps after the search over all gates.
REFINEMENTS = 8

Key = tuple[int, str]  # layer, block


@dataclass(eq=False)
class Gate:
    """A fitted predictor at one operating point, as training runs it. `tensors` are those of the artifact."""

    block: str
    lookahead: str
    tensors: dict[str, torch.Tensor]
    margin: float | None = None
    threshold: float | None = None
    predictor: Predictor = field(init=False)

    def __post_init__(self) -> None:
        self.predictor = Predictor(self.tensors)


@dataclass(eq=False)
class Point:
    """A candidate operating point: its gate (None: dense), bytes relative to a dense layer's MLP, cost in nats."""

    gate: Gate | None
    bytes: float
    nats: float
    label: str


def make_mlp_gate(fitted: FittedMlp, margin: float, lookahead: str, dtype: str) -> Gate:
    """Fold margin x residual standard deviation into the bias."""
    kind = DTYPES[dtype]
    tensors = {
        "down": fitted.down.to(kind), "up": fitted.up.to(kind),
        "bias": (fitted.bias + margin * fitted.residual_std).float(), "activation_rate": fitted.activation_rate.float(),
    }  # fmt: skip
    return Gate("mlp", lookahead, tensors, margin=margin)


def make_head_gate(fitted: FittedHeads, cut: float, threshold: float, rate: torch.Tensor, lookahead: str, dtype: str) -> Gate:
    """A head is selected when its predicted log norm exceeds `cut`; it is truly active when its norm exceeds `threshold`."""
    tensors = {
        "weight": fitted.weight.to(DTYPES[dtype]), "bias": (fitted.bias - cut).float(), "activation_rate": rate.float(),
    }  # fmt: skip
    return Gate("attention", lookahead, tensors, threshold=threshold)


class Masked:
    """Runs a model with a set of gates; with `measure` also records what they select.

    Attributes (after a run with measure):
        counts: key -> per-token selected counts, list of [T]. active, hit: key -> totals. rate: key -> [units] active counts.
        rows: key -> sampled masks [<= keep_rows, units], for unions.
    """

    def __init__(self, opt: OptModel, gates: dict[Key, Gate], *, measure: bool = False, keep_rows: int = 4096):
        self.opt, self.gates, self.measure, self.keep_rows = opt, gates, measure, keep_rows
        self.counts: dict[Key, list[torch.Tensor]] = {}
        self.active: dict[Key, int] = {}
        self.hit: dict[Key, int] = {}
        self.rate: dict[Key, torch.Tensor] = {}
        self.rows: dict[Key, list[torch.Tensor]] = {}
        self.tokens = 0
        heads = opt.config.num_attention_heads
        self.grams = {i: head_grams(opt.layers[i].self_attn.out_proj.weight, heads) for i, b in gates if b == "attention"} if measure else {}

    def _mask(self, key: Key, states: LayerStates, truth: Any) -> torch.Tensor | None:
        gate = self.gates.get(key)
        if gate is None:
            if self.measure and key[1] == "mlp":
                self.active[key] = self.active.get(key, 0) + int(truth(None).sum())
            return None
        x = states.gate_input(key[1], gate.lookahead)
        gate.predictor.to(x.device)
        mask = reference.select(gate.predictor.scores(x), torch.ones(len(x), dtype=torch.bool, device=x.device))
        if self.measure:
            active = truth(gate)
            self.counts.setdefault(key, []).append(mask.sum(1))
            self.active[key] = self.active.get(key, 0) + int(active.sum())
            self.hit[key] = self.hit.get(key, 0) + int((active & mask).sum())
            self.rate[key] = self.rate.get(key, 0) + active.sum(0)
            rows = self.rows.setdefault(key, [])
            if sum(map(len, rows)) < self.keep_rows:
                rows.append(mask[:: max(1, len(mask) // 256)])
        return mask

    def on_mlp(self, layer: int, states: LayerStates, z: torch.Tensor) -> torch.Tensor | None:
        return self._mask((layer, "mlp"), states, lambda gate: active_neurons(z))

    def on_attention(self, layer: int, states: LayerStates, attn: torch.Tensor) -> torch.Tensor | None:
        return self._mask((layer, "attention"), states, lambda gate: head_contributions(attn, self.grams[layer]) > gate.threshold)

    def nll(self, tokens: torch.Tensor, batch: int) -> float:
        """Mean negative log-likelihood, nats a token. tokens: [num_windows, seq_len]."""
        total, count = 0.0, 0
        with self.opt.observed(self.on_attention, self.on_mlp):
            for part in tokens.split(batch):
                values = self.opt.nll(part)
                total, count = total + float(values.double().sum()), count + values.numel()
                self.tokens += part.numel()
        return total / count


class Calibrator:
    """Searches operating points.

    Args:
        tokens: [num_windows, seq_len] of held-out text. budget: allowed perplexity rise, 0.01 for 1%.
        state: file for finished measurements, so that an interrupted search resumes; key: as `Collector`.
    """

    def __init__(
        self, opt: OptModel, mlp: list[FittedMlp], heads: list[FittedHeads], lookahead: dict[str, str], tokens: torch.Tensor,
        *, budget: float, dtype: str, batch: int, state: Path, key: dict[str, Any],
    ):  # fmt: skip
        self.opt, self.mlp, self.heads, self.lookahead, self.tokens = opt, mlp, heads, lookahead, tokens
        self.budget, self.dtype, self.batch = budget, dtype, batch
        self.state, self.key = state, json.dumps(key, sort_keys=True)
        # Candidates are compared with the dense run on the same tokens, so a part of the text tells them apart.
        self.probe = tokens[: max(1, min(len(tokens), PROBE_TOKENS // tokens.shape[1]))]
        self.cache: dict[str, float] = {}
        if state.is_file():
            saved = json.loads(state.read_text(encoding="utf-8"))
            self.cache = saved["nll"] if saved.get("key") == self.key else {}

    def measured(self, name: str, gates: dict[Key, Gate], tokens: torch.Tensor) -> float:
        """Mean nats of the text with these gates, remembered by name."""
        if name not in self.cache:
            self.cache[name] = Masked(self.opt, gates).nll(tokens, self.batch)
            partial = self.state.with_suffix(".partial")
            partial.write_text(json.dumps({"key": self.key, "nll": self.cache}), encoding="utf-8")
            os.replace(partial, self.state)
        return self.cache[name]

    def run(self) -> tuple[dict[Key, Gate], dict[str, Any]]:
        """The chosen gates (dense blocks are absent) and a record of the search."""
        dense = self.measured("dense/probe", {}, self.probe)
        norms = self._head_statistics()
        points: dict[Key, list[Point]] = {}
        limit = math.log1p(self.budget)
        keys = [(layer, block) for layer in range(len(self.opt.layers)) for block in ("mlp", "attention")]
        for key in tqdm(keys, desc="calibrate", unit="gate"):
            points[key] = [Point(None, _dense_bytes(self.opt, key[1]), 0.0, "dense")]
            for gate, density, label in self._candidates(key, norms):
                size = _predictor_bytes(self.opt, gate) + density * _dense_bytes(self.opt, key[1])
                nats = self.measured(f"{key[0]}/{key[1]}/{label}", {key: gate}, self.probe) - dense
                points[key].append(Point(gate, size, max(nats, 0.0), label))
                if nats > limit:
                    break  # later candidates keep less
        return self._joint(points)

    def _candidates(self, key: Key, norms: dict[int, tuple[torch.Tensor, torch.Tensor]]):
        layer, block = key
        lookahead = layer_lookahead(self.lookahead[block], layer)
        if block == "mlp":
            for margin in MARGINS:
                gate = make_mlp_gate(self.mlp[layer], margin, lookahead, self.dtype)
                yield gate, self._mlp_density(layer, gate), f"margin {margin:g}"
            return
        predicted, true = norms[layer]
        for density in HEAD_DENSITIES:
            cut, threshold = (float(torch.quantile(v.flatten(), 1 - density)) for v in (predicted, true))
            rate = (true > threshold).float().mean(0)
            yield make_head_gate(self.heads[layer], cut, threshold, rate, lookahead, self.dtype), density, f"density {density:g}"

    def _mlp_density(self, layer: int, gate: Gate) -> float:
        mask = gate.predictor.scores(self._inputs[layer]) > 0
        return float(mask.float().mean())

    def _head_statistics(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Predicted log and true contribution norms [tokens, heads] of every layer; keeps MLP gate inputs for densities."""
        predicted: dict[int, list[torch.Tensor]] = {}
        true: dict[int, list[torch.Tensor]] = {}
        inputs: dict[int, list[torch.Tensor]] = {}
        heads = self.opt.config.num_attention_heads
        grams = [head_grams(layer.self_attn.out_proj.weight, heads) for layer in self.opt.layers]

        def on_attention(layer: int, states: LayerStates, attn: torch.Tensor) -> None:
            x = states.gate_input("attention", layer_lookahead(self.lookahead["attention"], layer)).float()
            fit = self.heads[layer]
            predicted.setdefault(layer, []).append(reference.linear_scores(x, fit.weight, fit.bias.float()))
            true.setdefault(layer, []).append(head_contributions(attn, grams[layer]))

        def on_mlp(layer: int, states: LayerStates, z: torch.Tensor) -> None:
            inputs.setdefault(layer, []).append(states.gate_input("mlp", layer_lookahead(self.lookahead["mlp"], layer))[::4].clone())

        with self.opt.observed(on_attention, on_mlp):
            for part in self.probe.split(self.batch):
                self.opt.decoder(part)
        self._inputs = {layer: torch.cat(parts) for layer, parts in inputs.items()}
        return {layer: (torch.cat(predicted[layer]), torch.cat(true[layer])) for layer in predicted}

    def _joint(self, points: dict[Key, list[Point]]) -> tuple[dict[Key, Gate], dict[str, Any]]:
        """The cheapest choice whose measured perplexity rise stays inside the budget, by bisection on the multiplier."""
        dense = self.measured("dense/all", {}, self.tokens)

        def choose(multiplier: float) -> dict[Key, Point]:
            return {k: min(ps, key=lambda p: p.bytes + multiplier * p.nats) for k, ps in points.items()}

        # Distinct choices from the most careful to the most daring.
        choices: list[dict[Key, Point]] = []
        for exponent in range(160, -41, -1):
            choice = choose(2.0 ** (exponent / 8))
            if not choices or choice != choices[-1]:
                choices.append(choice)
        budget = BUDGET_USED * math.log1p(self.budget)
        with tqdm(desc="joint search", total=math.ceil(math.log2(len(choices) + 1)) + REFINEMENTS, unit="run") as bar:

            def rise(choice: dict[Key, Point]) -> float:
                gates = {k: p.gate for k, p in choice.items() if p.gate is not None}
                name = "joint/" + ",".join(f"{k[0]}{k[1][0]}={p.label}" for k, p in choice.items())
                bar.update()
                return self.measured(name, gates, self.tokens) - dense

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
                    if p not in refused and p.bytes < chosen[k].bytes and p.nats - chosen[k].nats <= budget - nats
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
            "points": {f"{k[0]}.{k[1]}": [[p.label, round(p.bytes, 5), round(p.nats, 6)] for p in ps] for k, ps in points.items()},
        }
        return {k: p.gate for k, p in chosen.items() if p.gate is not None}, record


def describe(opt: OptModel, gates: dict[Key, Gate], tokens: torch.Tensor, dtype: str, batch: int, seed: int) -> dict[Key, GateSpec]:
    """Run the chosen gates over the text and write down what they select: a GateSpec for every block of every layer."""
    run = Masked(opt, gates, measure=True)
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
            gate.tensors["activation_rate"] = (run.rate[key] / run.tokens).float() if block == "attention" else gate.tensors["activation_rate"]
            specs[key] = GateSpec(
                state="sparse", form="low_rank" if block == "mlp" else "linear", lookahead=gate.lookahead,
                rank=len(gate.tensors["down"]) if block == "mlp" else 0, dtype=dtype, density=_summary(counts),
                union_density=_unions(torch.cat(run.rows[key]), generator),
                oracle_density=run.active[key] / (run.tokens * units),
                recall=run.hit[key] / run.active[key] if run.active[key] else 1.0,
                margin=gate.margin, threshold=gate.threshold,
            )  # fmt: skip
    return specs


def _summary(values: torch.Tensor) -> dict[str, float]:
    ordered = values.sort().values  # torch.quantile refuses more than 2^24 values
    return {"mean": float(values.mean()), "upper": float(ordered[min(len(ordered) - 1, int(UPPER_QUANTILE * len(ordered)))])}


def _unions(rows: torch.Tensor, generator: torch.Generator, draws: int = 200) -> dict[str, dict[str, float]]:
    """Share of units selected by any of B random rows, by B."""
    out = {}
    for batch in BATCH_SIZES:
        picks = torch.randint(len(rows), (draws, batch), generator=generator)
        out[str(batch)] = _summary(torch.stack([rows[p].any(0).float().mean() for p in picks]))
    return out


def _dense_bytes(opt: OptModel, block: str) -> float:
    """Bytes a gate can skip for one token, relative to one layer's MLP: fc1 and fc2; or Q, out_proj and the K and V of
    half the model's context."""
    hidden, ffn, context = opt.config.hidden_size, opt.config.ffn_dim, opt.config.max_position_embeddings / 2
    return 1.0 if block == "mlp" else (hidden * hidden + context * hidden) / (hidden * ffn)


def _predictor_bytes(opt: OptModel, gate: Gate) -> float:
    """Bytes of a gate's predictor, relative to one layer's MLP in 16 bits."""
    weights = [t for name, t in gate.tensors.items() if name in ("down", "up", "weight")]
    return sum(t.numel() * t.element_size() / 2 for t in weights) / (2 * opt.config.hidden_size * opt.config.ffn_dim)
