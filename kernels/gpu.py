"""The Triton implementation: the functions of `reference` that run on every sparse step, with the same
signatures.
"""

from __future__ import annotations

from vllm_dejavu.kernels.predict import score_heads, select_neurons
from vllm_dejavu.kernels.projections import sparse_out_proj, sparse_qkv
from vllm_dejavu.kernels.sparse_attention import paged_attention
from vllm_dejavu.kernels.sparse_mlp import sparse_mlp

# Dense blocks are PyTorch's own business; what only controls and measurements need runs with graphs off.
from vllm_dejavu.kernels.reference import (  # isort: skip
    ACTIVATIONS,
    CROSSOVERS,
    compact_union,
    count_dense,
    dense_mlp,
    linear,
    mask_heads,
    mlp_activations,
    prepare_weight,
    select,
)

# The largest tile (`launch.py`) takes 64 tokens. With more it is repeated, and every repeat reads the
# selected weights again, where a dense layer reads its own once. Not measured: `tune` on a GPU replaces it.
LARGEST_BATCH = 64


def describe() -> str:
    return "Triton kernels"


__all__ = [
    "ACTIVATIONS",
    "CROSSOVERS",
    "LARGEST_BATCH",
    "compact_union",
    "count_dense",
    "dense_mlp",
    "describe",
    "linear",
    "mask_heads",
    "mlp_activations",
    "paged_attention",
    "prepare_weight",
    "score_heads",
    "select",
    "select_neurons",
    "sparse_mlp",
    "sparse_out_proj",
    "sparse_qkv",
]
