"""Selections of the quality study: predictors and thresholds of a model, set on the calibration text."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from quality_masks import (
    BATCH_TOKENS,
    Masks,
    Rule,
    gate_rule,
    head_rule,
    neuron_rule,
    random_rule,
    static_rule,
)
from quality_tasks import BLOCK_SETS, OWN

from vllm_dejavu import artifact, selection
from vllm_dejavu.config import BLOCKS
from vllm_dejavu.predictor import state_name
from vllm_dejavu.predictor_training import evaluate, forms
from vllm_dejavu.predictor_training.calibrate import quantile
from vllm_dejavu.predictor_training.collect import Collector, Moments, Request, layer_lookahead
from vllm_dejavu.predictor_training.gates import Gate, Key, make_head_gate, make_mlp_gate
from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates
from vllm_dejavu.predictor_training.labels import (
    active_neurons,
    head_contributions,
    neuron_energy,
)
from vllm_dejavu.predictor_training.train import LayerWeights, covariance, fit_heads, fit_mlp

# Pairs of token and unit per layer on which a threshold is set.
CALIBRATION_PAIRS = 1 << 21


@dataclass(frozen=True)
class Scaled:
    """A predictor at no operating point yet. gate: as stored, in `dtype`. scale [units]: makes its units'
    scores comparable with each other."""

    gate: Gate
    dtype: str
    scale: torch.Tensor

    def at(self, cut: float) -> Gate:
        """Selects the units whose scaled score is above `cut`: the bias is shifted, nothing else."""
        g = self.gate
        return Gate(g.block, g.spec, {**g.tensors, "bias": g.tensors["bias"] - cut / self.scale})


def comparable(
    moments: Moments,
    layer: int,
    block: str,
    lookahead: str,
    tensors: dict[str, torch.Tensor],
    weights: LayerWeights,
) -> torch.Tensor:
    """What a unit's stored score must be multiplied with, so that one threshold can serve all units of a
    block: [units], fp32.

    Integers leave every unit's score on a scale of its own (`predictor.quantize`). Its unit comes back from
    the text's moments: of neurons the residual standard deviation of the pre-activation, regressed on the
    score; of heads the logarithm of their norm.
    """
    s, n = moments.layer(layer), moments.num_tokens
    name = state_name(block, layer_lookahead(lookahead, layer))
    x_sum = s[f"{name}.sum"]
    cov_x = covariance(s[f"{name}.second"], x_sum, x_sum, n)
    if block == "attention":
        weight = tensors["weight"].double()
        cov_xy = covariance(s[f"{name}.heads"], x_sum, s["heads.sum"], n)
        shared = (weight * cov_xy.T).sum(1)
        residual = torch.ones_like(shared)
    else:
        weight, m_sum = tensors["up"].double() @ tensors["down"].double(), s["mlp_input.sum"]
        cov_m = covariance(s["mlp_input.second"], m_sum, m_sum, n)
        cov_xm = cov_x if name == "mlp_input" else covariance(s[f"{name}.mlp_input"], x_sum, m_sum, n)
        shared = ((weights.fc1 @ cov_xm.T) * weight).sum(1)
        residual = ((weights.fc1 @ cov_m) * weights.fc1).sum(1)
    variance = ((weight @ cov_x) * weight).sum(1).clamp_min(1e-30)
    slope = shared / variance
    if block == "mlp":
        residual = (residual - slope * shared).clamp_min(1e-3 * residual).clamp_min(1e-30)
    # A score that does not rise with what it predicts keeps the sign of its bias at any threshold of this
    # size.
    return (slope / residual.sqrt()).clamp_min(1e-9).float()


@dataclass(frozen=True)
class Point:
    """A selection: mode "dense" or one of MODES; blocks: of BLOCK_SETS; density: a number, or OWN."""

    mode: str
    blocks: str
    density: str

    @property
    def keys(self) -> dict[str, str]:
        return asdict(self)


DENSE = Point("dense", "both", "1")


class Selections:
    """Rules for points of one model: predictors, and thresholds set on the calibration text.

    Args:
        loaded: the artifact. train, calibration: [windows, seq_len] tokens.
    """

    def __init__(
        self,
        opt: HfModel,
        loaded: artifact.Artifact,
        train: torch.Tensor,
        calibration: torch.Tensor,
        seed: int,
    ):
        self.opt, self.loaded, self.seed = opt, loaded, seed
        self.units = {b: opt.geometry.units(b) for b in BLOCKS}
        self.layers = range(opt.geometry.num_layers)
        self.fc2_norms = [opt.fc2_norms(i) for i in self.layers]
        self.grams = [opt.head_grams(i) for i in self.layers]
        specs = {
            b: [loaded.manifest.layers[i][b] for i in self.layers if loaded.manifest.layers[i][b].sparse]
            for b in BLOCKS
        }
        # Of layers whose gate must be fitted: what most gates behind layer 0 have.
        later = {
            b: Counter(
                loaded.manifest.layers[i][b].lookahead
                for i in self.layers[1:]
                if loaded.manifest.layers[i][b].sparse
            )
            for b in BLOCKS
        }
        self.lookahead = {
            b: later[b].most_common(1)[0][0] if later[b] else d
            for b, d in (("mlp", "self"), ("attention", "previous"))
        }
        self.dtype = {b: specs[b][0].dtype if specs[b] else "int8" for b in BLOCKS}
        self.rank = max((s.rank for s in specs["mlp"]), default=opt.geometry.hidden_size // 4)
        looks = {
            b: tuple(dict.fromkeys([self.lookahead[b], *(s.lookahead for s in specs[b])])) for b in BLOCKS
        }
        self.moments = Collector(opt, Request(looks, self.layers)).run(
            train, max(1, BATCH_TOKENS // train.shape[1])
        )
        self.fitted: list[Key] = []
        self.predictors = {(i, b): self._predictor(i, b) for i in self.layers for b in BLOCKS}
        self._calibrate(calibration)

    def _predictor(self, layer: int, block: str) -> Scaled:
        """The artifact's predictor where there is one, else a closed form."""
        weights = LayerWeights.of(self.opt, layer)
        spec, tensors = self.loaded.gate(layer, block)
        if spec.sparse:
            dtype, gate = spec.dtype, Gate(block, spec, tensors)
        else:
            self.fitted.append((layer, block))
            dtype = self.dtype[block]
            look = layer_lookahead(self.lookahead[block], layer)
            if block == "mlp":
                fit = fit_mlp(
                    self.moments,
                    layer,
                    weights,
                    look,
                    min(self.rank, self.opt.geometry.hidden_size),
                    forms.get("closed_form"),
                )
                gate = make_mlp_gate(fit, 0.0, look, dtype)
            else:
                rate = torch.ones(self.units[block])
                gate = make_head_gate(fit_heads(self.moments, layer, look), 0.0, 0.0, rate, look, dtype)
        weight = gate.tensors["up" if block == "mlp" else "weight"]
        if weight.dtype.is_floating_point:  # stored as fitted: comparable already
            return Scaled(gate, dtype, torch.ones(self.units[block]))
        return Scaled(
            gate, dtype, comparable(self.moments, layer, block, gate.spec.lookahead, gate.tensors, weights)
        )

    def _calibrate(self, tokens: torch.Tensor) -> None:
        """One dense pass: importances and scaled scores of some tokens, rates and mean contributions of
        all.
        """
        self.calibration_tokens = tokens.numel()
        stride = max(1, -(-tokens.numel() * max(self.units.values()) // CALIBRATION_PAIRS))
        seen: dict[tuple[str, int, str], list[torch.Tensor]] = defaultdict(list)
        often: dict[Key, torch.Tensor] = {}
        place = 0

        def look(key: Key, states: LayerStates, importance: torch.Tensor, frequency: torch.Tensor) -> None:
            layer, block = key
            rows = torch.arange(-place % stride, len(importance), stride, device=importance.device)
            predictor = self.predictors[key]
            x = states.gate_input(block, predictor.gate.spec.lookahead)[rows]
            seen["importance", layer, block].append(importance[rows].cpu())
            seen["score", layer, block].append(
                (predictor.gate.predictor.to(x.device).scores(x) * predictor.scale.to(x.device)).cpu()
            )
            often[key] = often.get(key, 0) + frequency.double().sum(0)

        def on_attention(layer: int, states: LayerStates, attn: torch.Tensor) -> None:
            norms = head_contributions(attn, self.grams[layer])
            look((layer, "attention"), states, norms, norms)

        def on_mlp(layer: int, states: LayerStates, z: torch.Tensor) -> None:
            look((layer, "mlp"), states, neuron_energy(z, self.fc2_norms[layer]), active_neurons(z))

        with self.opt.observed(on_attention, on_mlp):
            for part in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
                self.opt.decoder(part)
                place += part.numel()
        self.often = {k: v.float() / tokens.numel() for k, v in often.items()}
        self.seen = {k: torch.cat(v) for k, v in seen.items()}
        self.cuts: dict[tuple[str, Key, float], float] = {}

    def cut(self, kind: str, key: Key, density: float) -> float:
        """The threshold above which a share `density` of the calibration text's pairs lies; kind:
        "importance" or "score".
        """
        if (kind, key, density) not in self.cuts:  # sorting is what takes time
            self.cuts[kind, key, density] = quantile(self.seen[kind, *key], 1 - density)
        return self.cuts[kind, key, density]

    def rule(self, key: Key, mode: str, density: float) -> Rule:
        layer, block = key
        if mode == "random":
            return random_rule(layer, block, self.units[block], density, self.seed)
        if mode == "static":
            return static_rule(selection.static_units(self.often[key], density))
        if mode == "predictor":
            return gate_rule(self.predictors[key].at(self.cut("score", key, density)))
        cut = self.cut("importance", key, density)
        return (
            neuron_rule(self.fc2_norms[layer], cut) if block == "mlp" else head_rule(self.grams[layer], cut)
        )

    def own_rule(self, key: Key, mode: str) -> Rule:
        """What the serving model does in this mode."""
        layer, block = key
        spec, tensors = self.loaded.gate(layer, block)
        if mode == "predictor":
            return gate_rule(self.predictors[key].gate)
        if mode == "static":
            return static_rule(
                selection.static_units(tensors["activation_rate"], spec.density["mean"]).to(self.opt.device)
            )
        if mode == "random":
            ids = torch.arange(self.units[block], device=self.opt.device)
            return lambda batch, states, value: selection.random_mask(
                batch.positions, layer, ids, spec.density["mean"], self.seed
            )
        return (
            neuron_rule(torch.ones_like(self.fc2_norms[layer]), 0.0)
            if block == "mlp"
            else head_rule(self.grams[layer], spec.threshold)
        )

    def masks(self, point: Point) -> Masks:
        rules: dict[Key, Rule] = {}
        if point.mode != "dense":
            for key in ((i, b) for i in self.layers for b in BLOCK_SETS[point.blocks]):
                if point.density != OWN:
                    rules[key] = self.rule(key, point.mode, float(point.density))
                elif self.loaded.manifest.layers[key[0]][key[1]].sparse:
                    rules[key] = self.own_rule(key, point.mode)
        return Masks(self.units, len(self.layers), rules)

    def densities(self, point: Point, layers: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
        """Columns of a row: means over layers, a dense block counting 1, and the share of weight bytes not
        read at batch 1.
        """

        class Stored:  # what `_bytes_density` asks an artifact for
            @staticmethod
            def gate(layer: int, block: str) -> tuple[Any, dict[str, torch.Tensor]]:
                found = self.predictors[layer, block]
                return SimpleNamespace(dtype=found.dtype), found.gate.tensors

        neurons = [
            x["mlp"]["hit"] / (x["mlp"]["rows"] * x["mlp"]["units"]) if x["mlp"]["gated"] else 1.0
            for x in layers
        ]
        return {
            "mlp_density": sum(x["mlp"]["density"] for x in layers) / len(layers),
            "fc2_density": sum(neurons) / len(neurons),
            "head_density": sum(x["attention"]["density"] for x in layers) / len(layers),
            "total_sparsity": (
                1
                - evaluate._bytes_density(
                    layers, self.opt.geometry, Stored if point.mode == "predictor" else None
                )
            ),
        }
