"""Runs of the dense model with a set of gates as masks: what they cost, and what they select."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from vllm_dejavu.kernels import reference
from vllm_dejavu.predictor_training.gates import Gate, Key
from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates, Resumable
from vllm_dejavu.predictor_training.labels import active_neurons, head_contributions

# Edges of the histograms of scores: low, high, number of bins.
SCORE_BINS = (-8.0, 8.0, 64)


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
        model: HfModel,
        gates: dict[Key, Gate],
        *,
        measure: bool = False,
        keep_rows: int = 4096,
        seed: int = 0,
    ):
        self.model, self.gates, self.measure, self.keep_rows = model, gates, measure, keep_rows
        self.counts: dict[Key, list[torch.Tensor]] = {}
        self.active: dict[Key, int] = {}
        self.hit: dict[Key, int] = {}
        self.rate: dict[Key, torch.Tensor] = {}
        self.rows: dict[Key, list[torch.Tensor]] = {}
        self.histograms: dict[Key, torch.Tensor] = {}
        self.tokens = 0
        self._drawn = torch.zeros(0, dtype=torch.long)
        self._generator = torch.Generator().manual_seed(seed)
        self.grams = {i: model.head_grams(i) for i, b in gates if b == "attention"} if measure else {}

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
            lambda gate: head_contributions(attn, self.grams[layer]) > gate.spec.threshold,
        )

    def nll(self, tokens: torch.Tensor, batch: int) -> float:
        """Mean negative log-likelihood, nats a token. tokens: [num_windows, seq_len]."""
        total, count = 0.0, 0
        share = min(1.0, self.keep_rows / max(1, tokens[:, 1:].numel()))
        with self.model.observed(self.on_attention, self.on_mlp):
            for part in tokens.split(batch):
                if self.measure:
                    later = torch.arange(part.numel()).view(part.shape)[:, 1:].flatten()
                    chosen = torch.randperm(len(later), generator=self._generator)[
                        : math.ceil(share * len(later))
                    ]
                    self._drawn = later[chosen]
                values = self.model.nll(part)
                total, count = total + float(values.double().sum()), count + values.numel()
                self.tokens += part.numel()
        return total / count

    def nll_from(self, runs: list[Resumable]) -> float:
        """As `nll`, of batches that stand in front of the first layer with a gate."""
        with self.model.observed(self.on_attention, self.on_mlp):
            return float(torch.cat([self.model.nll_from(run) for run in runs]).double().mean())
