"""One dense pass over the text -> the moments that the closed forms need. No activation is stored unless a
form asks.

Pre-activations are linear in the MLP's input, z = W m + b, so their covariance with any predictor input x
follows from cov(x, m): a few [hidden, hidden] matrices a layer hold everything, whatever the number of
neurons and tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vllm_dejavu.predictor import state_name
from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates
from vllm_dejavu.predictor_training.labels import Labels, neuron_energy
from vllm_dejavu.predictor_training.samples import Rows, SampleStore

# Layer 0 has no layer in front of it.
FIRST_LAYER_LOOKAHEAD = "self"


def layer_lookahead(lookahead: str, layer: int) -> str:
    """The lookahead a layer really uses: layer 0 cannot look at the layer before it."""
    return FIRST_LAYER_LOOKAHEAD if layer == 0 and lookahead == "previous" else lookahead


@dataclass(frozen=True)
class Request:
    """What a pass collects.

    Attributes:
        lookaheads: block -> the lookaheads to keep moments for, at least one each.
        layers: of the model, a contiguous range; layers behind it are not run.
        labels: what counts as active.
        sample_stride: keep every so many-th token's activations in the sample store, if there is one.
    """

    lookaheads: dict[str, tuple[str, ...]]
    layers: range
    labels: Labels = Labels()
    sample_stride: int = 1

    def states(self, block: str, layer: int) -> tuple[str, ...]:
        """Names of the hidden states that gates of a block of this layer may read, each once."""
        return tuple(
            dict.fromkeys(state_name(block, layer_lookahead(x, layer)) for x in self.lookaheads[block])
        )


@dataclass(frozen=True)
class Moments:
    """Raw moments as `layers.N.NAME` tensors, fp64, and how many tokens they hold.

    For every hidden state S that a gate reads, and for `mlp_input`: S.second [hidden, hidden] sum of x x^T;
    S.sum [hidden]. For every S of an MLP gate but `mlp_input`: S.mlp_input [hidden, hidden] sum of x m^T, m
    the MLP's own input. For every S of a head gate: S.heads [hidden, heads] sum of x y^T, y the heads'
    targets; `heads.sum`, `heads.square` [heads].
    active: [ffn] tokens in which a neuron is labelled active; energy: [ffn] sum of its squared energies.
    """

    tensors: dict[str, torch.Tensor]
    num_tokens: int

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        prefix = f"layers.{index}."
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def __add__(self, other: Moments) -> Moments:
        """Of both texts together."""
        tensors = (
            {k: v + other.tensors[k] for k, v in self.tensors.items()} if self.tensors else other.tensors
        )
        return Moments(tensors, self.num_tokens + other.num_tokens)


def layer_bytes(hidden: int, ffn: int, heads: int, lookaheads: dict[str, tuple[str, ...]]) -> int:
    """Bytes of the moments of one layer (not the first, which may need less)."""
    request = Request(lookaheads, range(1, 2))
    mlp, attention = request.states("mlp", 1), request.states("attention", 1)
    inputs, crossed = len({"mlp_input", *mlp, *attention}), sum(s != "mlp_input" for s in mlp)
    return 8 * (
        inputs * (hidden * hidden + hidden)
        + crossed * hidden * hidden
        + len(attention) * hidden * heads
        + 2 * heads
        + 2 * ffn
    )


def passes(num_layers: int, bytes_a_layer: int, limit: int | None) -> list[range]:
    """Ranges of layers whose moments fit into `limit` bytes together: one pass over the text each.

    Raises:
        ValueError: not even one layer fits.
    """
    at_once = num_layers if limit is None else min(num_layers, limit // bytes_a_layer)
    if at_once < 1:
        raise ValueError(
            f"--max-memory {limit} bytes cannot hold the moments of one layer, {bytes_a_layer} bytes. Allow"
            " more."
        )
    count = -(-num_layers // at_once)
    size = -(-num_layers // count)  # even passes
    return [range(start, min(start + size, num_layers)) for start in range(0, num_layers, size)]


def checkpoint_key(key: dict[str, Any] | None, layers: range) -> str:
    """Of a pass over these layers; key: everything else that decides the moments."""
    return json.dumps({**(key or {}), "layers": [layers.start, layers.stop]}, sort_keys=True)


def save_checkpoint(path: Path, key: str, sums: Moments, windows: int) -> None:
    """Keep the moments of the first `windows` windows."""
    metadata = {"key": key, "windows": str(windows), "num_tokens": str(sums.num_tokens)}
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in sums.tensors.items()}, partial, metadata=metadata)
    os.replace(partial, path)


def load_checkpoint(path: Path, key: str, device: str = "cpu") -> tuple[Moments, int] | None:
    """What `save_checkpoint` kept under the same key, and of how many windows."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as f:
        metadata = f.metadata() or {}
    if metadata.get("key") != key:
        return None
    return Moments(load_file(path, device=device), int(metadata["num_tokens"])), int(metadata["windows"])


class Collector:
    """Accumulates `Moments` batch by batch and checkpoints them, so that an interrupted run resumes.

    Args:
        checkpoint: file to keep the state in, or None. key: everything that decides the result; another key
            starts afresh.
        samples: where forms that train by gradient want activations stored.
        first_window: of the whole text, where another process collects what is in front of it: names shards
            and places the stride.
    """

    def __init__(
        self,
        model: HfModel,
        request: Request,
        checkpoint: Path | None = None,
        key: dict[str, Any] | None = None,
        samples: SampleStore | None = None,
        first_window: int = 0,
    ):
        self.model, self.request, self.checkpoint, self.samples = model, request, checkpoint, samples
        self.key = checkpoint_key(key, request.layers)
        self.first_window, self._first_token = first_window, 0
        self.sums: dict[str, torch.Tensor] = {}
        self.windows = self.num_tokens = 0
        self._head_norms: dict[int, torch.Tensor] = {}  # of the batch under way, for its samples
        self.grams = {i: model.head_grams(i) for i in request.layers}
        self.fc2_norms = {i: model.fc2_norms(i) for i in request.layers}

    def add(self, name: str, value: torch.Tensor) -> None:
        value = value.double()
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def _add_state(self, layer: int, name: str, x: torch.Tensor) -> None:
        self.add(f"layers.{layer}.{name}.second", x.T @ x)
        self.add(f"layers.{layer}.{name}.sum", x.sum(0))

    def on_attention(self, layer: int, states: LayerStates, attn: torch.Tensor) -> None:
        if layer not in self.request.layers:
            return
        p, y = f"layers.{layer}.", self.request.labels.head_targets(attn, self.grams[layer])
        for name in self.request.states("attention", layer):
            self.add(f"{p}{name}.heads", states.named(name).float().T @ y)
        self.add(p + "heads.sum", y.sum(0))
        self.add(p + "heads.square", (y * y).sum(0))
        if self.samples is not None:
            rows = self._sampled(len(attn))
            self._head_norms[layer] = self.request.labels.head_norms(attn[rows], self.grams[layer])

    def on_mlp(self, layer: int, states: LayerStates, z: torch.Tensor) -> None:
        if layer not in self.request.layers:
            return
        p, m, norms = f"layers.{layer}.", states.mlp_input.float(), self.fc2_norms[layer]
        mlp, attention = self.request.states("mlp", layer), self.request.states("attention", layer)
        for name in dict.fromkeys(("mlp_input", *mlp, *attention)):
            self._add_state(layer, name, states.named(name).float())
        for name in mlp:
            if name != "mlp_input":
                self.add(f"{p}{name}.mlp_input", states.named(name).float().T @ m)
        labels = self.request.labels
        active, energy = labels.active(z, norms), neuron_energy(z, norms, labels.activation)
        self.add(p + "active", active.sum(0))
        self.add(p + "energy", (energy * energy).sum(0))
        if self.samples is not None:
            rows = self._sampled(len(z))
            self.samples.write(
                layer,
                self.first_window + self.windows,
                Rows(
                    mlp_x=states.named(mlp[0])[rows],
                    active=active[rows],
                    energy=energy[rows],
                    attn_x=states.named(attention[0])[rows],
                    head_norms=self._head_norms[layer],
                ),
            )

    def _sampled(self, count: int) -> torch.Tensor:
        # Counted over the whole text, so that the choice does not depend on the batch size.
        stride = self.request.sample_stride
        first = -(self._first_token + self.num_tokens) % stride
        # none, if the next one lies behind this batch
        return torch.arange(min(first, count), count, stride, device=self.model.device)

    def run(
        self,
        tokens: torch.Tensor,
        batch: int,
        save_every: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> Moments:
        """tokens: [num_windows, seq_len]. Resumes behind the last checkpoint of the same key.

        Args:
            progress: called with the number of tokens done instead of showing a bar.
        """
        self.resume()
        self._first_token = self.first_window * tokens.shape[1]
        layers = self.request.layers
        what = (
            "collect"
            if len(layers) == len(self.model.layers)
            else f"collect layers {layers.start}-{layers.stop - 1}"
        )
        bar = tqdm(
            total=tokens.numel(),
            initial=self.windows * tokens.shape[1],
            unit="tok",
            unit_scale=True,
            desc=what,
            disable=progress is not None,
        )
        with self.model.observed(self.on_attention, self.on_mlp), bar:
            for count, start in enumerate(range(self.windows, len(tokens), batch), 1):
                part = tokens[start : start + batch]
                self.model.decoder(part, last_layer=layers.stop - 1)
                self.windows += len(part)
                self.num_tokens += part.numel()
                bar.update(part.numel())
                if progress is not None:
                    progress(part.numel())
                if count % save_every == 0:
                    self._save()
        self._save()
        return Moments({k: v.cpu() for k, v in self.sums.items()}, self.num_tokens)

    def resume(self) -> None:
        """Take up the checkpoint, if there is one of the same key."""
        found = (
            None
            if self.checkpoint is None
            else load_checkpoint(self.checkpoint, self.key, str(self.model.device))
        )
        if found is not None:
            sums, self.windows = found
            self.sums, self.num_tokens = sums.tensors, sums.num_tokens

    def _save(self) -> None:
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.key, Moments(self.sums, self.num_tokens), self.windows)
