"""The Triton implementation: the functions of `reference` that run on every sparse step, with the same signatures."""
from __future__ import annotations

from vllm_dejavu.kernels.predict import score_heads, select_neurons
from vllm_dejavu.kernels.projections import sparse_out_proj, sparse_qkv
from vllm_dejavu.kernels.sparse_attention import paged_attention
from vllm_dejavu.kernels.sparse_mlp import sparse_mlp

# What only controls and measurements need runs with graphs off, in PyTorch on the GPU.
from vllm_dejavu.kernels.reference import ACTIVATIONS, compact_union, mask_heads, mlp_activations, select  # isort: skip

__all__ = [
    "ACTIVATIONS",
    "compact_union",
    "mask_heads",
    "mlp_activations",
    "paged_attention",
    "score_heads",
    "select",
    "select_neurons",
    "sparse_mlp",
    "sparse_out_proj",
    "sparse_qkv",
]
