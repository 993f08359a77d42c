"""Scores from hidden states: what a predictor reads and computes. Training, evaluation and serving all use
this.
"""

from __future__ import annotations

import functools

import torch

from vllm_dejavu.kernels import reference
from vllm_dejavu.kernels.interface import Linear, LowRank

# The meaning of a lookahead (config.LOOKAHEADS): the argument of `gate_input` that feeds the gate.
STATES = {"self": "block_input", "attn_input": "attn_input", "previous": "previous"}
BLOCK_INPUTS = {"mlp": "mlp_input", "attention": "attn_input"}


def _state(lookahead: str) -> str:
    if lookahead not in STATES:
        raise ValueError(f"lookahead {lookahead!r} is unknown; expected 'self', 'attn_input' or 'previous'")
    return STATES[lookahead]


def state_name(block: str, lookahead: str) -> str:
    """Name of the hidden state that feeds a gate: `mlp_input`, `attn_input` or `previous`.

    Raises:
        ValueError: unknown lookahead.
    """
    state = _state(lookahead)
    return BLOCK_INPUTS[block] if state == "block_input" else state


def gate_input(
    lookahead: str,
    *,
    block_input: torch.Tensor,
    attn_input: torch.Tensor,
    previous: torch.Tensor | None,
) -> torch.Tensor:
    """The hidden state that feeds a gate.

    Args:
        lookahead: `self`, `attn_input` or `previous` (config.LOOKAHEADS).
        block_input: input of the gated block's first projection (fc1 or qkv) in this layer.
        attn_input: input of this layer's qkv projection.
        previous: residual stream in front of the MLP block of the layer before (before its LayerNorm when
            pre-LN); None in the first layer and in the first layer of a pipeline stage.

    Returns:
        One of the tensors, as it is: [num_tokens, hidden].

    Raises:
        ValueError: unknown lookahead, or `previous` where there is none.
    """
    state = _state(lookahead)
    if state == "previous" and previous is None:
        raise ValueError(
            "lookahead 'previous' needs a layer in front; use 'self' in the first layer of a model or stage"
        )
    return {"block_input": block_input, "attn_input": attn_input, "previous": previous}[state]


def quantize(tensors: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Weights of a predictor as integers of `bits` bits, in int8: `down` and `up`, or `weight`; the others as
    they are.

    A unit is selected when its score is positive, so a score may be scaled: the step of each unit's row of
    `up` (or `weight`) divides its bias instead of being stored; the step of each row of `down` multiplies a
    column of `up` beforehand. So integers need no further tensor, and no kernel multiplies by a scale.

    Args:
        tensors: in floating point; `bias` [units] fp32.
    """
    largest = 2 ** (bits - 1) - 1
    out = dict(tensors)

    def integers(rows: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return (rows / step[:, None]).round().clamp(-largest, largest).to(torch.int8)

    name = "weight"
    if "down" in tensors:
        name, down = "up", tensors["down"].double()
        step = down.abs().amax(1).clamp_min(1e-12) / largest
        out["down"] = integers(down, step)
        rows = tensors["up"].double() * step
    else:
        rows = tensors["weight"].double()
    step = rows.abs().amax(1).clamp_min(1e-12) / largest
    out[name] = integers(rows, step)
    out["bias"] = (tensors["bias"].double() / step).float()
    return out


class Predictor(torch.nn.Module):
    """Scorer of one gate; a unit (neuron or head) is selected when its score is positive.

    MLP: `score = up(down(x)) + bias`; attention: `score = weight(x) + bias`. The calibrated threshold is in
    the bias. In int8 the tensors are the stored integers, multiplied as they are: scales change no score's
    sign (`quantize`). The rank is padded with zeros to a multiple of 16, so that kernels can read rows of
    `up` in 16-byte pieces. Tensors are non-persistent buffers: no loader of model weights can overwrite them,
    whatever the load format.

    Args:
        tensors: as in the artifact: `bias`, `activation_rate` [units] fp32, and `down` [rank, hidden] and
            `up` [units, rank], or `weight` [units, hidden].
        start, size: this tensor-parallel rank's units; None takes all.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        start: int = 0,
        size: int | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.low_rank = "down" in tensors
        self.hidden = tensors["down" if self.low_rank else "weight"].shape[1]
        for name, tensor in tensors.items():
            if name != "down" and size is not None:
                tensor = tensor.narrow(0, start, size)
            if name in ("down", "up"):
                missing = -tensor.shape[0 if name == "down" else 1] % 16
                tensor = torch.nn.functional.pad(
                    tensor, (0, 0, 0, missing) if name == "down" else (0, missing)
                )
            self.register_buffer(name, tensor.to(device=device, copy=True).contiguous(), persistent=False)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] -> [num_tokens, units], fp32."""
        return reference.scores(x, self.weights)

    @functools.cached_property
    def weights(self) -> LowRank | Linear:
        """As kernels take them."""
        if self.low_rank:
            return LowRank(self.down, self.up, self.bias)
        return Linear(self.weight, self.bias)
