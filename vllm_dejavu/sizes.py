"""Bytes that one token reads: of a layer's weights, and of its predictors. And the rank that a share of them
leaves an MLP predictor where none is named.

Weights count WEIGHT_BYTES each, whatever they are stored in. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_dejavu.families import Geometry

if TYPE_CHECKING:
    import torch

WEIGHT_BYTES = 2  # of a served weight and of a cached value
# Share of the MLP's bytes that its predictor may take where no rank is named and the hidden size is at least
# LARGE_HIDDEN; ranks are multiples of RANK_STEP (wide loads).
BYTE_BUDGET = 0.03
LARGE_HIDDEN = 2048
RANK_STEP = 16


def mlp_bytes(geometry: Geometry) -> int:
    """Of fc1 and fc2."""
    return 2 * geometry.hidden_size * geometry.ffn_dim * WEIGHT_BYTES


def query_bytes(geometry: Geometry) -> int:
    """Of Q and out_proj, which heads that are not selected leave unread."""
    return 2 * geometry.hidden_size * geometry.num_heads * geometry.head_size * WEIGHT_BYTES


def key_value_bytes(geometry: Geometry) -> int:
    """Of the projections of K and V, which are always read."""
    return 2 * geometry.hidden_size * geometry.num_kv_heads * geometry.head_size * WEIGHT_BYTES


def cache_bytes(geometry: Geometry) -> int:
    """Of a token's K and V in one layer."""
    return 2 * geometry.num_kv_heads * geometry.head_size * WEIGHT_BYTES


def predictor_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Of a gate's weights as stored; biases are left out, as they are of the layers."""
    weights = [tensor for name, tensor in tensors.items() if name in ("down", "up", "weight")]
    return sum(tensor.numel() * tensor.element_size() for tensor in weights)


def default_rank(hidden: int, ffn: int, itemsize: int) -> int:
    """Rank of an MLP predictor whose weights take `itemsize` bytes each: BYTE_BUDGET of an MLP in 16 bits, a
    multiple of RANK_STEP.

    Below LARGE_HIDDEN so small a rank would miss too much: a quarter of the hidden size, whatever it costs.
    """
    rank = hidden // 4
    if hidden >= LARGE_HIDDEN:
        rank = int(BYTE_BUDGET * 2 * hidden * ffn * WEIGHT_BYTES / ((hidden + ffn) * itemsize))
    return min(max(RANK_STEP, rank // RANK_STEP * RANK_STEP), hidden)
