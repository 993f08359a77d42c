"""A CPU attention backend whose cache has the layout of the GPU backends, so that the paged kernels meet the
real engine.

`get_name` says TRITON_ATTN: that is the layout, and vLLM knows no other name for it. The metadata is the CPU
backend's.
"""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl


class PagedCpuBackend(CPUAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"

    @staticmethod
    def get_impl_cls():
        return PagedCpuImpl


class PagedCpuImpl(CPUAttentionBackendImpl):
    """kv_cache: [num_blocks, kv_heads, block_size, 2 * head_size]; a token's K, then its V."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        block_size = kv_cache.shape[2]
        slots = slot_mapping[: key.shape[0]]
        keep = slots >= 0
        block, offset = slots[keep] // block_size, slots[keep] % block_size
        kv_cache[block, :, offset] = torch.cat([key, value], -1)[: len(slots)][keep]

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ):
        if attn_metadata is None:
            return output
        block_size = kv_cache.shape[2]
        starts = attn_metadata.query_start_loc.tolist()
        for row, length in enumerate(attn_metadata.seq_lens.tolist()):
            begin, end = starts[row], starts[row + 1]
            blocks = attn_metadata.block_table[row, : -(-length // block_size)].long()
            # [kv_heads, length, 2 * head_size]
            kv = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()
            k, v = kv.chunk(2, -1)
            q = query[begin:end].transpose(0, 1).float()
            mask = torch.arange(length) <= torch.arange(length - (end - begin), length)[:, None]
            attn = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
            output[begin:end] = attn.transpose(0, 1).to(output.dtype)
        return output
