"""One dense pass over the text -> the moments that the closed form needs. No activation is ever stored.

Pre-activations are linear in the MLP's input, z = W m + b, so their covariance with any predictor input x follows from
cov(x, m): three [hidden, hidden] matrices a layer hold everything, whatever the number of neurons.
"""
from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vllm_dejavu.predictor_training.hf_opt import LayerStates, OptModel
from vllm_dejavu.predictor_training.labels import active_neurons, head_grams, log_contributions

# Layer 0 has no layer in front of it.
FIRST_LAYER_LOOKAHEAD = "self"


def layer_lookahead(lookahead: str, layer: int) -> str:
    """The lookahead a layer really uses: layer 0 cannot look at the layer before it."""
    return FIRST_LAYER_LOOKAHEAD if layer == 0 and lookahead == "previous" else lookahead


@dataclass(frozen=True)
class Moments:
    """Raw moments of one layer as `layers.N.NAME` tensors, fp64, and how many tokens they hold.

    mlp_x: [h, h] sum of x x^T of the MLP gate's input; mlp_xm: [h, h] sum of x m^T; mlp_m: [h, h] sum of m m^T, m the MLP's own
    input; mlp_x_sum, mlp_m_sum: [h]; active: [ffn] tokens in which a neuron fired; attn_x: [h, h]; attn_xy: [h, heads], y the
    logarithm of the heads' contribution norms; attn_x_sum: [h]; attn_y_sum, attn_yy: [heads].
    With lookahead `self` x is m, and mlp_x, mlp_xm, mlp_x_sum are not kept.
    """

    tensors: dict[str, torch.Tensor]
    num_tokens: int

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        prefix = f"layers.{index}."
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


class Collector:
    """Accumulates `Moments` batch by batch and checkpoints them, so that an interrupted run resumes.

    Args:
        checkpoint: file to keep the state in. key: everything that decides the result; another key starts afresh.
    """

    def __init__(self, opt: OptModel, lookahead: dict[str, str], checkpoint: Path, key: dict[str, Any]):
        self.opt, self.lookahead, self.checkpoint = opt, lookahead, checkpoint
        self.key = json.dumps(key, sort_keys=True)
        self.sums: dict[str, torch.Tensor] = {}
        self.windows = self.num_tokens = 0
        self.grams = [head_grams(layer.self_attn.out_proj.weight, opt.config.num_attention_heads) for layer in opt.layers]

    def add(self, name: str, value: torch.Tensor) -> None:
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def on_mlp(self, layer: int, states: LayerStates, z: torch.Tensor) -> None:
        p, m = f"layers.{layer}.", states.mlp_input.float()
        self.add(p + "mlp_m", m.T @ m)
        self.add(p + "mlp_m_sum", m.sum(0))
        self.add(p + "active", active_neurons(z).sum(0))
        lookahead = layer_lookahead(self.lookahead["mlp"], layer)
        if lookahead != "self":
            x = states.gate_input("mlp", lookahead).float()
            self.add(p + "mlp_x", x.T @ x)
            self.add(p + "mlp_xm", x.T @ m)
            self.add(p + "mlp_x_sum", x.sum(0))

    def on_attention(self, layer: int, states: LayerStates, attn: torch.Tensor) -> None:
        p, y = f"layers.{layer}.", log_contributions(attn, self.grams[layer])
        x = states.gate_input("attention", layer_lookahead(self.lookahead["attention"], layer)).float()
        self.add(p + "attn_x", x.T @ x)
        self.add(p + "attn_xy", x.T @ y)
        self.add(p + "attn_x_sum", x.sum(0))
        self.add(p + "attn_y_sum", y.sum(0))
        self.add(p + "attn_yy", (y * y).sum(0))

    def run(self, tokens: torch.Tensor, batch: int, save_every: int = 64) -> Moments:
        """tokens: [num_windows, seq_len]. Resumes behind the last checkpoint of the same key."""
        self._resume()
        bar = tqdm(total=tokens.numel(), initial=self.windows * tokens.shape[1], unit="tok", unit_scale=True, desc="collect")
        with self.opt.observed(self.on_attention, self.on_mlp), bar:
            for count, start in enumerate(range(self.windows, len(tokens), batch), 1):
                part = tokens[start : start + batch]
                self.opt.decoder(part)
                self.windows += len(part)
                self.num_tokens += part.numel()
                bar.update(part.numel())
                if count % save_every == 0:
                    self._save()
        self._save()
        return Moments({k: v.cpu() for k, v in self.sums.items()}, self.num_tokens)

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        from safetensors import safe_open

        with safe_open(self.checkpoint, "pt") as f:
            metadata = f.metadata() or {}
        if metadata.get("key") != self.key:
            return
        self.sums = load_file(self.checkpoint, device=str(self.opt.device))
        self.windows, self.num_tokens = int(metadata["windows"]), int(metadata["num_tokens"])

    def _save(self) -> None:
        metadata = {"key": self.key, "windows": str(self.windows), "num_tokens": str(self.num_tokens)}
        partial = self.checkpoint.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in self.sums.items()}, partial, metadata=metadata)
        os.replace(partial, self.checkpoint)
