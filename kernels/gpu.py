"""The Triton implementation of what runs on every sparse step, on NVIDIA and AMD."""

from __future__ import annotations

import torch

from vllm_dejavu.kernels import reference
from vllm_dejavu.kernels.interface import Call, Kernels, Rows
from vllm_dejavu.kernels.predict import score_heads, select_neurons
from vllm_dejavu.kernels.projections import sparse_out_proj, sparse_qkv
from vllm_dejavu.kernels.sparse_attention import paged_attention
from vllm_dejavu.kernels.sparse_mlp import ACTIVATIONS, exact_down, sparse_mlp


class TritonKernels(Kernels):
    """Dense passes are PyTorch's own business; what only controls and measurements need runs with graphs
    off.
    """

    name = "Triton kernels"
    # The largest tile (`tables`) takes 64 tokens. With more it is repeated, and every repeat reads the
    # selected weights again, where a dense layer reads its own once. Not measured: `tune` on a GPU replaces
    # it.
    largest_batch = 64
    activations = ACTIVATIONS
    score_heads = staticmethod(score_heads)
    select_neurons = staticmethod(select_neurons)
    sparse_mlp = staticmethod(sparse_mlp)
    linear = staticmethod(reference.linear)
    sparse_qkv = staticmethod(sparse_qkv)
    mask_heads = staticmethod(reference.mask_heads)
    sparse_out_proj = staticmethod(sparse_out_proj)
    paged_attention = staticmethod(paged_attention)
    count_dense = staticmethod(reference.count_dense)

    def exact_down(
        self, h: torch.Tensor, down: Rows, activation: str, crossover: float, call: Call
    ) -> torch.Tensor:
        """By the number of rows, which a captured graph cannot change: few ones skip."""
        if h.shape[0] <= self.largest_batch:
            return exact_down(h, down, activation, crossover, call)
        ffn, valid = down.weight.shape[0], (call.row_lens > 0).sum()
        reference.count(call.counters, steps=1, rows=valid, selected=valid * ffn, read=ffn, survived=ffn)
        return reference.linear(reference.ACTIVATIONS[activation](h), down)


KERNELS = TritonKernels()
