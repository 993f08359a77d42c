"""Selective-head paged decode attention: one launch over (split, head, row).

A program whose head is not selected by its row leaves at once, so there is no head list. The pieces of a
sequence are merged, in order, by the program of that (row, head) that comes last: once each. Fusing the merge
with the output projection instead would repeat it in every one of that kernel's ~100-250 programs: at batch
8, 32 heads and 4 splits each would read half a megabyte of partials for 131 KB of weights.

Source: split-KV decoding as in FlashAttention's "flash-decoding"; selection by row as in Polar Sparsity,
whose kernel needs a contiguous cache and equal lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dejavu.kernels import primitives, tables
from vllm_dejavu.kernels.checks import check, check_matrix
from vllm_dejavu.kernels.interface import Cache, Call
from vllm_dejavu.kernels.workspace import workspace_for

# Finite, so that the difference of two untouched maxima is 0 and not NaN.
_LOWEST = tl.constexpr(-1e38)


@triton.jit
def _attention_kernel(
    q_ptr,
    stride_qt,
    stride_qh,
    kv_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    block_table_ptr,
    stride_bt,
    seq_lens_ptr,
    scores_ptr,
    out_ptr,
    partial_ptr,
    semaphore_ptr,
    scale,
    heads,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (SPLITS, heads, rows). partial: [rows, heads, SPLITS, HEAD_SIZE + 2]: sum, maximum, sum of
    weights.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HEAD_SIZE
    row_head = row.to(tl.int64) * heads + head
    out_row = out_ptr + row_head * HEAD_SIZE
    length = tl.load(seq_lens_ptr + row)
    score = tl.load(scores_ptr + row_head)
    if (score > 0) & (length > 0):
        # the live length, divided evenly in whole steps
        span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_S) * BLOCK_S
        live = tl.cdiv(length, span)
        if split < live:
            # scores in powers of two: exp2 is the hardware's own
            q = tl.load(
                q_ptr + row.to(tl.int64) * stride_qt + head * stride_qh + d, mask=d_mask, other=0.0
            ).to(tl.float32)
            q *= scale * 1.4426950408889634
            table = block_table_ptr + row.to(tl.int64) * stride_bt
            kv_head = kv_ptr + (head // GROUP).to(tl.int64) * stride_kh
            # Every lane of a step keeps its own softmax; they meet after the loop, which so needs no
            # exchange.
            lane_max = tl.full([BLOCK_S], _LOWEST, tl.float32)
            lane_sum = tl.zeros([BLOCK_S], tl.float32)
            acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
            end = tl.minimum((split + 1) * span, length)
            for start in tl.range(split * span, end, BLOCK_S, num_stages=STAGES):
                position = start + tl.arange(0, BLOCK_S)
                mask = position < end
                block = tl.load(table + position // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
                token = kv_head + block * stride_kb + (position % BLOCK_SIZE).to(tl.int64) * stride_ks
                kv_mask = mask[:, None] & d_mask[None, :]
                k = tl.load(token[:, None] + d[None, :], mask=kv_mask, other=0.0).to(tl.float32)
                v = tl.load(token[:, None] + HEAD_SIZE + d[None, :], mask=kv_mask, other=0.0).to(tl.float32)
                qk = tl.where(mask, tl.sum(q[None, :] * k, 1), float("-inf"))
                new_max = tl.maximum(lane_max, qk)
                weight = tl.exp2(qk - new_max)
                decay = tl.exp2(lane_max - new_max)
                lane_sum = lane_sum * decay + weight
                acc = acc * decay[:, None] + weight[:, None] * v
                lane_max = new_max
            maximum = tl.max(lane_max, 0)
            lane_weight = tl.exp2(lane_max - maximum)
            total = tl.sum(lane_sum * lane_weight, 0)
            result = tl.sum(acc * lane_weight[:, None], 0)  # [BLOCK_D]
            last = live == 1
            if live > 1:
                mine = partial_ptr + row_head * (SPLITS * (HEAD_SIZE + 2))
                tl.store(mine + split * (HEAD_SIZE + 2) + d, result, mask=d_mask)
                tl.store(mine + split * (HEAD_SIZE + 2) + HEAD_SIZE, maximum)
                tl.store(mine + split * (HEAD_SIZE + 2) + HEAD_SIZE + 1, total)
                last = primitives.arrive(semaphore_ptr + row_head, live)
                if last:
                    s = tl.arange(0, SPLITS_POW2)
                    parts = mine + s * (HEAD_SIZE + 2)
                    maxima = tl.load(parts + HEAD_SIZE, mask=s < live, other=_LOWEST, cache_modifier=".cg")
                    sums = tl.load(parts + HEAD_SIZE + 1, mask=s < live, other=0.0, cache_modifier=".cg")
                    share = tl.exp2(maxima - tl.max(maxima, 0))
                    sums_of = tl.load(
                        parts[:, None] + d[None, :],
                        mask=(s < live)[:, None] & d_mask[None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    result = tl.sum(sums_of * share[:, None], 0)
                    total = tl.sum(sums * share, 0)
            if last:
                tl.store(out_row + d, (result / total).to(out_ptr.dtype.element_ty), mask=d_mask)
    else:
        if split == 0:
            tl.store(out_row + d, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), mask=d_mask)


def paged_attention(
    query: torch.Tensor, cache: Cache, scale: float, head_scores: torch.Tensor, call: Call
) -> torch.Tensor:
    """See `reference.paged_attention`. One launch.

    Raises:
        ValueError: on shape, dtype or stride mismatch.
    """
    kv_cache, block_table, seq_lens, max_model_len = cache
    num_tokens, heads, head_size = query.shape
    kv_heads, block_size = kv_cache.shape[1:3]
    check(query.stride(2) == 1, "query contiguous in its last dimension", query.stride())
    check(kv_cache.dtype == query.dtype, f"kv_cache of dtype {query.dtype}", kv_cache.dtype)
    check(
        kv_cache.shape[3] == 2 * head_size and kv_cache.stride(3) == 1,
        f"kv_cache [..., {2 * head_size}], contiguous there",
        list(kv_cache.shape),
    )
    check(heads % kv_heads == 0, f"query heads a multiple of {kv_heads}", heads)
    check(
        block_table.dtype == torch.int32
        and block_table.shape[0] >= num_tokens
        and block_table.stride(1) == 1,
        f"block_table int32, {num_tokens} rows",
        (block_table.dtype, list(block_table.shape)),
    )
    check(
        seq_lens.dtype == torch.int32 and seq_lens.shape[0] >= num_tokens and seq_lens.is_contiguous(),
        f"seq_lens int32, contiguous, {num_tokens} rows",
        (seq_lens.dtype, list(seq_lens.shape)),
    )
    check_matrix("head_scores", head_scores, (num_tokens, heads), torch.float32)
    check(head_scores.is_contiguous(), "head_scores contiguous", head_scores.stride())
    workspace = workspace_for(call.workspace, query.device)
    longest = block_table.shape[1] * block_size
    splits = tables.attention_splits(
        num_tokens, heads, longest if max_model_len is None else min(max_model_len, longest), query.device
    )
    out = torch.empty(num_tokens, heads, head_size, dtype=query.dtype, device=query.device)
    partials = workspace.take("attention", num_tokens, heads, splits, head_size + 2) if splits > 1 else out
    t = tables.tile("attention", num_tokens)
    _attention_kernel[(splits, heads, num_tokens)](
        query,
        query.stride(0),
        query.stride(1),
        kv_cache,
        *kv_cache.stride()[:3],
        block_table,
        block_table.stride(0),
        seq_lens,
        head_scores,
        out,
        partials,
        workspace.semaphores("attention", num_tokens * heads) if splits > 1 else seq_lens,
        scale,
        heads,
        GROUP=heads // kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        SPLITS=splits,
        SPLITS_POW2=triton.next_power_of_2(splits),
        BLOCK_S=t.n,
        STAGES=t.stages,
        num_warps=t.warps,
    )
    return out
