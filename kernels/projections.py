"""Head-sparse projections: Q, K, V and the output projection. One launch each.

Reads the Q rows and the output columns of heads that some row of the batch selected; K and V always, so that
the cache stays complete. Without skipping these, they bound the gain on large models to about 2x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dejavu.kernels import checks, primitives, tables
from vllm_dejavu.kernels.checks import check, check_matrix
from vllm_dejavu.kernels.interface import Call, Rows


@triton.jit
def _qkv_kernel(
    x_ptr,
    stride_x,
    w_ptr,
    bias_ptr,
    scores_ptr,
    row_lens_ptr,
    out_ptr,
    counters_ptr,
    num_tokens,
    hidden,
    heads,
    out_size,
    HEAD_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BIAS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid ((heads + 2 * kv_heads) * BLOCKS, token blocks); BLOCKS blocks of rows a head."""
    head, block, token_block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS, tl.program_id(1)
    within = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = within < HEAD_SIZE
    rows = head * HEAD_SIZE + within
    tokens = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    needed = tl.full([], 1, tl.int32)
    if head < heads:
        selected = tl.zeros([BLOCK_T], tl.int32)
        for start in range(0, num_tokens, BLOCK_T):
            others = start + tl.arange(0, BLOCK_T)
            score = tl.load(
                scores_ptr + others.to(tl.int64) * heads + head, mask=others < num_tokens, other=-1.0
            )
            selected += (score > 0).to(tl.int32)
        number = tl.sum(selected, 0)
        needed = (number > 0).to(tl.int32)
        if COUNT:
            if (block == 0) & (token_block == 0):
                primitives.count(counters_ptr, primitives.SELECTED, number)
                primitives.count(counters_ptr, primitives.READ, needed)
                if head == 0:
                    primitives.count_rows(counters_ptr, row_lens_ptr, num_tokens, BLOCK_T)
    # an unselected head's loop has no iterations: its weights are not read, its Q is 0
    result = primitives.row_products(
        w_ptr,
        hidden,
        rows,
        row_mask,
        x_ptr,
        stride_x,
        tokens,
        token_mask,
        0,
        hidden * needed,
        BLOCK_N,
        BLOCK_T,
        BLOCK_K,
        DOT,
        PRECISION,
        STAGES,
    )
    if BIAS:
        result += tl.load(bias_ptr + rows, mask=within < HEAD_SIZE * needed, other=0.0).to(tl.float32)[
            :, None
        ]
    offsets = tokens.to(tl.int64)[None, :] * out_size + rows[:, None]
    tl.store(
        out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :]
    )


@triton.jit
def _out_proj_kernel(
    attn_ptr,
    stride_attn,
    w_ptr,
    scores_ptr,
    out_ptr,
    num_tokens,
    hidden,
    heads,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (blocks of output rows, token blocks). Row-major weights: a head's columns are >= 64 contiguous
    bytes.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < hidden
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    d = tl.arange(0, BLOCK_D)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * (heads * HEAD_SIZE)
    attn_rows = attn_ptr + tokens.to(tl.int64)[:, None] * stride_attn
    if DOT:
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_T, BLOCK_D], tl.float32)
    # A masked load costs no bytes and keeps the loop free of branches, so that loads of later heads can start
    # early.
    for head in tl.range(0, heads, num_stages=STAGES):
        score = tl.load(scores_ptr + tokens.to(tl.int64) * heads + head, mask=token_mask, other=-1.0)
        needed = tl.max((score > 0).to(tl.int32), 0)  # 0 or 1
        columns = head * HEAD_SIZE + d
        inside = d < HEAD_SIZE
        w = tl.load(
            w_rows + columns[None, :], mask=row_mask[:, None] & (d < HEAD_SIZE * needed)[None, :], other=0.0
        )
        a = tl.load(attn_rows + columns[None, :], mask=(score > 0)[:, None] & inside[None, :], other=0.0)
        acc = primitives.multiply_add(acc, w, a, DOT, PRECISION)
    result = primitives.finish(acc, DOT)
    offsets = tokens.to(tl.int64)[None, :] * hidden + rows[:, None]
    tl.store(
        out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :]
    )


def sparse_qkv(
    x: torch.Tensor, qkv: Rows, head_scores: torch.Tensor, head_size: int, call: Call
) -> torch.Tensor:
    """See `reference.sparse_qkv`.

    Raises:
        ValueError: on shape, dtype or stride mismatch.
    """
    (weight, bias), (row_lens, counters, _) = qkv[:2], call
    (num_tokens, hidden), out_size = x.shape, weight.shape[0]
    check_matrix("x", x, (None, None))
    check_matrix("weight", weight, (None, hidden), x.dtype)
    check(
        weight.is_contiguous() and out_size % head_size == 0,
        f"weight contiguous, rows a multiple of {head_size}",
        list(weight.shape),
    )
    heads = head_scores.shape[1]
    kv_heads = out_size // head_size - heads
    check(
        kv_heads >= 2 and kv_heads % 2 == 0,
        f"weight with rows for Q of {heads} heads, and as many for K as for V",
        list(weight.shape),
    )
    checks.check_bias("bias", bias, out_size)
    checks.check_counters(counters)
    _check_scores(head_scores, num_tokens, heads)
    check_matrix("row_lens", row_lens, (num_tokens,), torch.int32)
    t = tables.tile("qkv", num_tokens, x.dtype)
    blocks = -(-head_size // t.n)
    out = torch.empty(num_tokens, out_size, dtype=x.dtype, device=x.device)
    _qkv_kernel[(out_size // head_size * blocks, -(-num_tokens // t.tokens))](
        x,
        x.stride(0),
        weight,
        weight if bias is None else bias,
        head_scores,
        row_lens,
        out,
        row_lens if counters is None else counters,
        num_tokens,
        hidden,
        heads,
        out_size,
        HEAD_SIZE=head_size,
        BLOCKS=blocks,
        BIAS=bias is not None,
        COUNT=counters is not None,
        BLOCK_N=t.n,
        BLOCK_T=t.tokens,
        BLOCK_K=t.k,
        DOT=t.dot,
        PRECISION=checks.precision(x.dtype),
        STAGES=t.stages,
        num_warps=t.warps,
    )
    return out


def sparse_out_proj(
    attn: torch.Tensor, out: Rows, head_scores: torch.Tensor, output: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.sparse_out_proj`.

    Raises:
        ValueError: on shape, dtype or stride mismatch.
    """
    num_tokens, heads, head_size = attn.shape
    weight, hidden = out.weight, out.weight.shape[0]
    check(attn.stride(2) == 1 and attn.stride(1) == head_size, "attn with heads side by side", attn.stride())
    check_matrix("weight", weight, (None, heads * head_size), attn.dtype)
    check(weight.is_contiguous(), "weight contiguous", weight.stride())
    _check_scores(head_scores, num_tokens, heads)
    if output is None:
        output = torch.empty(num_tokens, hidden, dtype=attn.dtype, device=attn.device)
    check_matrix("output", output, (num_tokens, hidden), attn.dtype)
    check(output.is_contiguous(), "output contiguous", output.stride())
    t = tables.tile("out_proj", num_tokens, attn.dtype)
    _out_proj_kernel[(-(-hidden // t.n), -(-num_tokens // t.tokens))](
        attn,
        attn.stride(0),
        weight,
        head_scores,
        output,
        num_tokens,
        hidden,
        heads,
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_N=t.n,
        BLOCK_T=t.tokens,
        DOT=t.dot,
        PRECISION=checks.precision(attn.dtype),
        STAGES=t.stages,
        num_warps=t.warps,
    )
    return output


def _check_scores(head_scores: torch.Tensor, num_tokens: int, heads: int) -> None:
    check_matrix("head_scores", head_scores, (num_tokens, heads), torch.float32)
    check(head_scores.is_contiguous(), "head_scores contiguous", head_scores.stride())
