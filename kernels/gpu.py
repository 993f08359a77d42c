"""The Triton implementation of what runs on every sparse step, on NVIDIA and AMD."""

from __future__ import annotations

from vllm_dejavu.kernels import reference
from vllm_dejavu.kernels.interface import Kernels
from vllm_dejavu.kernels.predict import score_heads, select_neurons
from vllm_dejavu.kernels.projections import sparse_out_proj, sparse_qkv
from vllm_dejavu.kernels.sparse_attention import paged_attention
from vllm_dejavu.kernels.sparse_mlp import sparse_mlp


class TritonKernels(Kernels):
    """Dense passes are PyTorch's own business; what only controls and measurements need runs with graphs
    off.
    """

    name = "Triton kernels"
    # The largest tile (`tables`) takes 64 tokens. With more it is repeated, and every repeat reads the
    # selected weights again, where a dense layer reads its own once. Not measured: `tune` on a GPU replaces
    # it.
    largest_batch = 64
    score_heads = staticmethod(score_heads)
    select_neurons = staticmethod(select_neurons)
    sparse_mlp = staticmethod(sparse_mlp)
    linear = staticmethod(reference.linear)
    sparse_qkv = staticmethod(sparse_qkv)
    mask_heads = staticmethod(reference.mask_heads)
    sparse_out_proj = staticmethod(sparse_out_proj)
    paged_attention = staticmethod(paged_attention)
    count_dense = staticmethod(reference.count_dense)


KERNELS = TritonKernels()
