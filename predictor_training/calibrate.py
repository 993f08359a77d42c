"""Choose every gate's operating point under a perplexity budget.

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from vllm_dejavu.config import BLOCKS
from vllm_dejavu.kernels import reference
from vllm_dejavu.kernels.interface import Linear
from vllm_dejavu.predictor_training.collect import layer_lookahead
from vllm_dejavu.predictor_training.gates import Gate, Key, make_head_gate, make_mlp_gate
from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates, Resumable
from vllm_dejavu.predictor_training.labels import active_neurons, head_contributions
from vllm_dejavu.predictor_training.masked import Masked
from vllm_dejavu.predictor_training.train import FittedLayer
from vllm_dejavu.sizes import cache_bytes, mlp_bytes, predictor_bytes, query_bytes

# Of the neurons' natural density.
DENSITY_MULTIPLES = (3.0, 2.0, 1.5, 1.25, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
HEAD_DENSITIES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1)
# Part of the budget spent on the calibration text; the rest is for text it has not seen, where opt-books-7m's
# rise was 0.8 and nemotron-books-10m's 1.3 to 1.5 times as much.
BUDGET_USED = 0.7
# Tokens on which single candidates are compared; the joint choice is measured on all of the calibration text.
PROBE_TOKENS = 4096
# Joint measurements spent on single steps after the search over all gates.
REFINEMENTS = 6
# Points of the density-quality curve.
CURVE_POINTS = 8


@dataclass(frozen=True)
class CalibrationSettings:
    """What is searched for.

    Attributes:
        lookahead: block -> as asked for. budget: allowed perplexity rise, 0.01 for 1%. dtype: of predictors'
            weights. batch: windows of a forward pass. blocks: to gate.
    """

    lookahead: dict[str, str]
    budget: float
    dtype: str
    batch: int
    blocks: tuple[str, ...] = BLOCKS


class Candidate(NamedTuple):
    """A gate that may be taken, the density meant by it, and what the record calls it."""

    gate: Gate
    density: float
    label: str


@dataclass(eq=False)
class Point:
    """A candidate that was measured: its gate (None: dense), density, bytes relative to a dense layer's MLP,
    cost in nats.
    """

    gate: Gate | None
    density: float
    bytes: float
    nats: float
    label: str


Points = dict[Key, list[Point]]  # every gate's, the most careful (dense) first
Choice = dict[Key, Point]  # one of every gate


class Measurements:
    """Mean nats of finished runs, by their names; in a file, so that an interrupted search resumes.

    Args:
        path: of the file, or None. key: as `Collector`. log: called with a dict for every measurement made.
    """

    def __init__(
        self,
        path: Path | None = None,
        key: dict[str, Any] | None = None,
        log: Callable[[dict[str, Any]], None] = lambda record: None,
    ):
        self.path, self.key, self.log = path, json.dumps(key, sort_keys=True), log
        self.nats: dict[str, float] = {}
        if path is not None and path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.nats = saved["nll"] if saved.get("key") == self.key else {}

    def of(self, name: str, measure: Callable[[], float]) -> float:
        """Of the run of this name; made unless it has been."""
        if name not in self.nats:
            self.nats[name] = measure()
            self.log({"measured": name, "nats": self.nats[name]})
            if self.path is not None:
                partial_file = self.path.with_suffix(".partial")
                partial_file.write_text(json.dumps({"key": self.key, "nll": self.nats}), encoding="utf-8")
                os.replace(partial_file, self.path)
        return self.nats[name]


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
        fitted: of every layer. tokens: [num_windows, seq_len] of held-out text.
    """

    def __init__(
        self,
        model: HfModel,
        fitted: list[FittedLayer],
        tokens: torch.Tensor,
        settings: CalibrationSettings,
        measurements: Measurements | None = None,
    ):
        self.model, self.fitted, self.tokens, self.settings = model, fitted, tokens, settings
        self.measurements = measurements or Measurements()
        # Candidates are compared with the dense run on the same tokens, so a part of the text tells them
        # apart: windows from all over it, as the first ones may all be of one document.
        windows = max(1, min(len(tokens), PROBE_TOKENS // tokens.shape[1]))
        self.probe = tokens[torch.arange(windows) * len(tokens) // windows]

    def run(self) -> tuple[dict[Key, Gate], dict[str, Any]]:
        """The chosen gates (dense blocks are absent) and a record of the search."""
        points = self.points()
        chosen, record = self._joint(points)
        record["curve"] = self._curve(_choices(points))
        return _gates(chosen), record

    def points(self) -> Points:
        """Every gate's candidates, each measured alone on the probe text."""
        limit = math.log1p(self.settings.budget)
        points: Points = {}
        runs = [self.model.start(part) for part in self.probe.split(self.settings.batch)]
        dense = self.measurements.of("dense/probe", partial(Masked(self.model, {}).nll_from, runs))
        for layer in tqdm(range(len(self.model.layers)), desc="calibrate", unit="layer"):
            seen, following = self._observe(runs)
            for block in self.settings.blocks:
                key = (layer, block)
                points[key] = [Point(None, 1.0, self._bytes(block), 0.0, "dense")]
                for gate, density, label in self.candidates(key, seen):
                    run = Masked(self.model, {key: gate})
                    measured = self.measurements.of(f"{layer}/{block}/{label}", partial(run.nll_from, runs))
                    size, nats = self._bytes(block, gate, density), measured - dense
                    points[key].append(Point(gate, density, size, max(nats, 0.0), label))
                    if nats > limit:
                        break  # later candidates keep less
            runs = following
        return points

    def _bytes(self, block: str, gate: Gate | None = None, density: float = 1.0) -> float:
        """Read for one token of what a gate can skip, with its predictor, relative to one layer's MLP: fc1
        and fc2; or Q, out_proj and the K and V of half the model's context."""
        geometry = self.model.geometry
        mlp, context = mlp_bytes(geometry), geometry.max_positions / 2
        heads = query_bytes(geometry) + context * cache_bytes(geometry)
        predictor = 0 if gate is None else predictor_bytes(gate.tensors)
        return predictor / mlp + density * ((mlp if block == "mlp" else heads) / mlp)

    def _observe(self, runs: list[Resumable]) -> tuple[Seen, list[Resumable]]:
        """One layer, dense: what it did, and the batches behind it."""
        caught = {name: [] for name in ("mlp_x", "density", "attn_x", "norms")}
        grams = self.model.head_grams(runs[0].layer)

        def gate_input(block: str, layer: int, states: LayerStates) -> torch.Tensor:
            return states.gate_input(block, layer_lookahead(self.settings.lookahead[block], layer)).clone()

        def on_attention(layer: int, states: LayerStates, attn: torch.Tensor) -> None:
            caught["attn_x"].append(gate_input("attention", layer, states))
            caught["norms"].append(head_contributions(attn, grams))

        def on_mlp(layer: int, states: LayerStates, z: torch.Tensor) -> None:
            caught["mlp_x"].append(gate_input("mlp", layer, states))
            caught["density"].append(active_neurons(z).float().mean(1))

        following = [self.model.advance(run, on_attention, on_mlp) for run in runs]
        seen = {name: torch.cat(parts) for name, parts in caught.items()}
        return Seen(**{**seen, "density": float(seen["density"].mean())}), following

    def candidates(self, key: Key, seen: Seen) -> Iterator[Candidate]:
        """Of a block, ever fewer units."""
        layer, block = key
        fitted, dtype = self.fitted[layer], self.settings.dtype
        lookahead = layer_lookahead(self.settings.lookahead[block], layer)
        if block == "mlp":
            plain = make_mlp_gate(fitted.mlp, 0.0, lookahead, "float32").predictor.to(seen.mlp_x.device)
            scores = plain.scores(seen.mlp_x[::4]).flatten().cpu().sort().values
            for multiple in DENSITY_MULTIPLES:
                density = multiple * seen.density
                if 0 < density < 1:
                    margin = -float(scores[min(len(scores) - 1, int((1 - density) * len(scores)))])
                    gate = make_mlp_gate(fitted.mlp, margin, lookahead, dtype)
                    yield Candidate(gate, density, f"{multiple:g} x natural")
            return
        weight, bias = (t.to(seen.attn_x.device) for t in (fitted.heads.weight, fitted.heads.bias.float()))
        predicted = reference.scores(seen.attn_x, Linear(weight, bias))
        for density in HEAD_DENSITIES:
            cut, threshold = (quantile(v, 1 - density) for v in (predicted, seen.norms))
            rate = (seen.norms > threshold).float().mean(0).cpu()
            gate = make_head_gate(fitted.heads, cut, threshold, rate, lookahead, dtype)
            yield Candidate(gate, density, f"density {density:g}")

    def _nll(self, choice: Choice, tokens: torch.Tensor) -> float:
        return Masked(self.model, _gates(choice)).nll(tokens, self.settings.batch)

    def _joint(self, points: Points) -> tuple[Choice, dict[str, Any]]:
        """The cheapest choice whose measured perplexity rise stays inside the budget, and a record.

        Where even the most careful choice of all gates exceeds it, because what cost nothing on the probe
        text does on all of it, one kind of block stays dense: the one without which less is read.
        """
        dense = self.measurements.of("dense/all", partial(self._nll, {}, self.tokens))
        budget = BUDGET_USED * math.log1p(self.settings.budget)
        choices = _choices(points)
        runs = math.ceil(math.log2(len(choices) + 1)) + REFINEMENTS
        with tqdm(desc="joint search", total=runs, unit="run") as bar:

            def rise(choice: Choice) -> float:
                bar.update()
                run = partial(self._nll, choice, self.tokens)
                return self.measurements.of(f"joint/{_name(choice)}", run) - dense

            all_dense = {key: candidates[0] for key, candidates in points.items()}
            chosen, nats = _bisected(choices, all_dense, rise, budget)
            if chosen is all_dense and len(self.settings.blocks) > 1:
                alone = [
                    _bisected(_choices(_only(points, block)), all_dense, rise, budget)
                    for block in self.settings.blocks
                ]
                chosen, nats = min(alone, key=lambda found: sum(p.bytes for p in found[0].values()))
            chosen, nats = _refined(points, chosen, nats, rise, budget)
        record = {
            "dense_ppl": math.exp(dense),
            "sparse_ppl": math.exp(dense + nats),
            "ppl_increase": math.expm1(nats),
            "max_ppl_increase": self.settings.budget,
            "points": {
                f"{k[0]}.{k[1]}": [[p.label, round(p.bytes, 5), round(p.nats, 6)] for p in ps]
                for k, ps in points.items()
            },
        }
        return chosen, record

    def _curve(self, choices: list[Choice]) -> list[dict[str, float]]:
        """Perplexity rise against density, measured on the probe text at joint choices from careful to
        daring.
        """
        dense = self.measurements.nats["dense/probe"]
        picks = sorted({round(i * (len(choices) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
        curve = []
        for choice in tqdm([choices[i] for i in picks], desc="density-quality curve", unit="run"):
            run = partial(self._nll, choice, self.probe)
            nats = self.measurements.of(f"curve/{_name(choice)}", run) - dense
            point = {"ppl_increase": math.expm1(nats), "bytes": sum(p.bytes for p in choice.values())}
            for block in self.settings.blocks:
                densities = [p.density for k, p in choice.items() if k[1] == block]
                point[f"{block}_density"] = sum(densities) / len(densities)
            curve.append(point)
        return curve


def _choices(points: Points) -> list[Choice]:
    """Distinct joint choices from the most careful to the most daring, by the price of a nat in bytes."""
    choices: list[Choice] = []
    for exponent in range(160, -41, -1):
        price = 2.0 ** (exponent / 8)
        choice = {
            key: min(candidates, key=lambda point, price=price: point.bytes + price * point.nats)
            for key, candidates in points.items()
        }
        if not choices or choice != choices[-1]:
            choices.append(choice)
    return choices


def _only(points: Points, block: str) -> Points:
    """With the others dense."""
    return {key: candidates if key[1] == block else candidates[:1] for key, candidates in points.items()}


def _bisected(
    choices: list[Choice], all_dense: Choice, rise: Callable[[Choice], float], budget: float
) -> tuple[Choice, float]:
    """The most daring choice that costs no more nats than the budget, and what it costs: by bisection on the
    multiplier.
    """
    # choices[low] fits (or is all dense), choices[high] does not.
    chosen, nats = all_dense, 0.0
    low, high = -1, len(choices)
    while high - low > 1:
        middle = (low + high) // 2
        measured = rise(choices[middle])
        if measured <= budget:
            low, chosen, nats = middle, choices[middle], measured
        else:
            high = middle
    return chosen, nats


def _refined(
    points: Points, chosen: Choice, nats: float, rise: Callable[[Choice], float], budget: float
) -> tuple[Choice, float]:
    """The choice after single steps: the multiplier skips points between the corners of its curve, so what
    is left of the budget is spent gate by gate.
    """
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
    return chosen, nats


def _name(choice: Choice) -> str:
    return ",".join(f"{k[0]}{k[1][0]}={p.label}" for k, p in choice.items())


def _gates(choice: Choice) -> dict[Key, Gate]:
    return {k: p.gate for k, p in choice.items() if p.gate is not None}


def quantile(values: torch.Tensor, q: float) -> float:
    """The value below which a share q lies, of all elements."""
    ordered = values.flatten().sort().values  # torch.quantile refuses more than 2^24 values
    return float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])
