"""Masks of the quality study: rules that select units of a batch, and counts of what they select."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_dejavu.config import BLOCKS
from vllm_dejavu.kernels import reference
from vllm_dejavu.predictor_training.calibrate import Gate, Key
from vllm_dejavu.predictor_training.hf_model import LayerStates
from vllm_dejavu.predictor_training.labels import active_neurons, head_contributions, neuron_energy

# Padded tokens of a forward pass: activations of a layer still lie in a cache.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Batch:
    """A right-padded batch, flattened to T tokens. valid [T], bool: no padding; positions [T]; shape: (texts,
    length);
    texts: their tokens."""

    valid: torch.Tensor
    positions: torch.Tensor
    shape: tuple[int, int]
    texts: list[tuple[int, ...]]


# (batch, states, value) -> mask [T, units]; value: pre-activations [T, ffn], or attention output [T, heads,
# head_size].
Rule = Callable[[Batch, LayerStates, torch.Tensor], torch.Tensor]


class Masks:
    """Rules applied to the blocks of a model, and counts of what they select on valid tokens (`rows` of
    them).
    """

    def __init__(self, units: dict[str, int], layers: int, rules: dict[Key, Rule]):
        self.units, self.layers, self.rules = units, layers, rules
        self.batch: Batch | None = None
        self.counts: dict[Key, torch.Tensor] = {}

    def on_mlp(self, layer: int, states: LayerStates, z: torch.Tensor) -> torch.Tensor | None:
        return self._mask((layer, "mlp"), states, z)

    def on_attention(self, layer: int, states: LayerStates, attn: torch.Tensor) -> torch.Tensor | None:
        return self._mask((layer, "attention"), states, attn)

    def _mask(self, key: Key, states: LayerStates, value: torch.Tensor) -> torch.Tensor | None:
        if key not in self.rules:
            return None
        valid = self.batch.valid
        mask = self.rules[key](self.batch, states, value)
        seen = [valid, mask.sum(1) * valid]
        if key[1] == "mlp":
            active = active_neurons(value)
            seen += [active.sum(1) * valid, (active & mask).sum(1) * valid]
        self.counts[key] = self.counts.get(key, 0) + torch.stack([s.sum() for s in seen])
        return mask

    def read_out(self) -> list[dict[str, dict[str, Any]]]:
        """Counts since the last read-out, by layer and block as `metrics.summarize` gives them."""
        layers = []
        for layer in range(self.layers):
            entry = {}
            for block in BLOCKS:
                if (found := self.counts.get((layer, block))) is None:
                    entry[block] = {"gated": False, "density": 1.0}
                    continue
                rows, selected, *neurons = found.tolist()
                units = self.units[block]
                entry[block] = {
                    "gated": True,
                    "rows": rows,
                    "units": units,
                    "density": selected / (rows * units),
                }
                if neurons:
                    active, hit = neurons
                    entry[block] |= {"active_density": active / (rows * units), "hit": hit}
            layers.append(entry)
        self.counts = {}
        return layers


def exact_random(generator: np.random.Generator, rows: int, units: int, count: int) -> np.ndarray:
    """[rows, units], bool: in each row `count` units, drawn without preference."""
    if count in (0, units):
        return np.full((rows, units), count > 0)
    bits = max(1, (units - 1).bit_length())
    # The unit's number in the low bits: no two are equal, so the cut leaves exactly `count`.
    keys = (
        generator.integers(0, 1 << (64 - bits), (rows, units), dtype=np.uint64) << np.uint64(bits)
    ) | np.arange(units, dtype=np.uint64)
    return keys <= np.partition(keys, count - 1, axis=1)[:, count - 1 : count]


def random_rule(layer: int, block: str, units: int, density: float, seed: int) -> Rule:
    """round(density * units) units, drawn afresh for every token; what a text gets does not depend on its
    neighbours in a batch.
    """
    count = round(density * units)

    def rule(batch: Batch, states: LayerStates, value: torch.Tensor) -> torch.Tensor:
        mask = np.zeros((*batch.shape, units), dtype=bool)
        for row, tokens in zip(mask, batch.texts, strict=True):
            own = zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes())
            generator = np.random.default_rng([seed, layer, BLOCKS.index(block), own])
            row[: len(tokens)] = exact_random(generator, len(tokens), units, count)
        return torch.from_numpy(mask).flatten(0, 1).to(value.device)

    return rule


def static_rule(chosen: torch.Tensor) -> Rule:
    """The same units for every token; chosen: [units], bool."""
    return lambda batch, states, value: chosen[None, :].expand(len(value), -1)


def gate_rule(gate: Gate) -> Rule:
    return lambda batch, states, value: reference.select(gate.scores(states, value), batch.valid.int())


def neuron_rule(norms: torch.Tensor, cut: float) -> Rule:
    """Oracle: neurons whose energy is above `cut` (at least 0: no neuron that ReLU stops). norms: of fc2's
    columns, [ffn].
    """
    return lambda batch, states, z: neuron_energy(z, norms) > max(cut, 0.0)


def head_rule(grams: torch.Tensor, cut: float) -> Rule:
    """Oracle: heads whose contribution is above `cut`."""
    return lambda batch, states, attn: head_contributions(attn, grams) > cut
