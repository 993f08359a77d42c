"""Predict and select: low-rank scores, threshold, union over the batch's rows, neuron list. Two launches.

1. `_down_kernel`: the predictor's down-projection; head scores ride along as further rows.
2. `_up_select_kernel`: up-projection, bias, threshold and union. One program a segment of the neuron list,
   which it writes alone: nothing waits for other programs, so selections are deterministic and there is
   nothing to reset.

Source: Deja Vu (2023) ranks scores and takes the top k; here a calibrated threshold is in the bias, so no
sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dejavu.kernels import checks, primitives, tables
from vllm_dejavu.kernels.checks import check, check_matrix
from vllm_dejavu.kernels.interface import SEGMENT, Call, Linear, LowRank, Rider, Selection
from vllm_dejavu.kernels.workspace import Workspace, workspace_for


@triton.jit
def _score_block(
    x_ptr,
    stride_x,
    w_ptr,
    bias_ptr,
    row_lens_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    block,
    blocks_before,
    units,
    num_tokens,
    hidden,
    span,
    IS_HEAD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[t, u] = w[u] @ x[t] for one block of units, all or one split of the hidden size; heads: plus bias,
    padding -1.
    """
    split, token_block = tl.program_id(1), tl.program_id(2)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask, token_mask = rows < units, tokens < num_tokens
    k_start = split * span
    result = primitives.row_products(
        w_ptr,
        hidden,
        rows,
        row_mask,
        x_ptr,
        stride_x,
        tokens,
        token_mask,
        k_start,
        tl.minimum(k_start + span, hidden),
        BLOCK_N,
        BLOCK_T,
        BLOCK_K,
        DOT,
        PRECISION,
        STAGES,
    )
    offsets = tokens.to(tl.int64)[None, :] * units + rows[:, None]  # [BLOCK_N, BLOCK_T]
    mask = row_mask[:, None] & token_mask[None, :]
    last = True
    if SPLITS > 1:
        size = tl.full([], 1, tl.int64) * num_tokens * units
        tl.store(partial_ptr + split * size + offsets, result, mask=mask)
        last = primitives.arrive(
            counter_ptr + (blocks_before + block) * tl.num_programs(2) + token_block, SPLITS
        )
        if last:
            # in the order of the splits, whoever came last: the sum is the same every time
            result = tl.load(partial_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            for s in range(1, SPLITS):
                result += tl.load(
                    partial_ptr + s * size + offsets, mask=mask, other=0.0, cache_modifier=".cg"
                )
    if last:
        if IS_HEAD:
            result += tl.load(bias_ptr + rows, mask=row_mask, other=0.0)[:, None]
            valid = tl.load(row_lens_ptr + tokens, mask=token_mask, other=0) > 0
            result = tl.where(valid[None, :], result, -1.0)
        tl.store(out_ptr + offsets, result, mask=mask)


@triton.jit
def _down_kernel(
    x_ptr,
    stride_x,
    down_ptr,
    out_ptr,
    rank,
    head_x_ptr,
    stride_head_x,
    head_w_ptr,
    head_bias_ptr,
    head_scores_ptr,
    heads,
    row_lens_ptr,
    partial_ptr,
    counter_ptr,
    num_tokens,
    hidden,
    span,
    rank_blocks,
    RANK: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (rank_blocks + head blocks, SPLITS, token blocks)."""
    block = tl.program_id(0)
    if RANK:
        if block < rank_blocks:
            _score_block(
                x_ptr,
                stride_x,
                down_ptr,
                head_bias_ptr,
                row_lens_ptr,
                out_ptr,
                partial_ptr,
                counter_ptr,
                block,
                0,
                rank,
                num_tokens,
                hidden,
                span,
                False,
                SPLITS,
                BLOCK_N,
                BLOCK_T,
                BLOCK_K,
                DOT,
                PRECISION,
                STAGES,
            )
    if HEADS:
        if block >= rank_blocks:
            _score_block(
                head_x_ptr,
                stride_head_x,
                head_w_ptr,
                head_bias_ptr,
                row_lens_ptr,
                head_scores_ptr,
                partial_ptr + tl.full([], SPLITS, tl.int64) * num_tokens * rank,
                counter_ptr,
                block - rank_blocks,
                rank_blocks,
                heads,
                num_tokens,
                hidden,
                span,
                True,
                SPLITS,
                BLOCK_N,
                BLOCK_T,
                BLOCK_K,
                DOT,
                HEAD_PRECISION,
                STAGES,
            )


@triton.jit
def _up_select_kernel(
    hidden_ptr,
    up_ptr,
    bias_ptr,
    row_lens_ptr,
    ids_ptr,
    counts_ptr,
    row_mask_ptr,
    counters_ptr,
    ffn,
    rank,
    num_tokens,
    SEGMENT: tl.constexpr,
    ROW_MASK: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (segments,)."""
    segment = tl.program_id(0)
    place = tl.arange(0, SEGMENT)
    neurons = segment * SEGMENT + place
    inside = neurons < ffn
    bias = tl.load(bias_ptr + neurons, mask=inside, other=0.0)
    union = tl.zeros([SEGMENT], tl.int32)
    selected = tl.zeros([SEGMENT], tl.int32)
    for start in range(0, num_tokens, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        token_mask = tokens < num_tokens
        scores = primitives.row_products(
            up_ptr,
            rank,
            neurons,
            inside,
            hidden_ptr,
            rank,
            tokens,
            token_mask,
            0,
            rank,
            SEGMENT,
            BLOCK_T,
            BLOCK_K,
            DOT,
            PRECISION,
            STAGES,
        )
        scores += bias[:, None]
        valid = tl.load(row_lens_ptr + tokens, mask=token_mask, other=0) > 0
        chosen = (scores > 0) & inside[:, None] & valid[None, :]  # [SEGMENT, BLOCK_T]
        if ROW_MASK:
            offsets = tokens.to(tl.int64)[None, :] * ffn + neurons[:, None]
            tl.store(row_mask_ptr + offsets, chosen.to(tl.int8), mask=inside[:, None] & token_mask[None, :])
        per_neuron = tl.sum(chosen.to(tl.int32), 1)
        selected += per_neuron
        union |= (per_neuron > 0).to(tl.int32)
    number = tl.sum(union, 0)
    tl.store(ids_ptr + segment * SEGMENT + tl.cumsum(union, 0) - 1, neurons, mask=union > 0)
    tl.store(ids_ptr + neurons, tl.zeros([SEGMENT], tl.int32) + ffn, mask=inside & (place >= number))
    tl.store(counts_ptr + segment, number)
    if COUNT:
        primitives.count(counters_ptr, primitives.SELECTED, tl.sum(selected, 0))
        primitives.count(counters_ptr, primitives.READ, number)
        if segment == 0:
            primitives.count_rows(counters_ptr, row_lens_ptr, num_tokens, BLOCK_T)


def _launch_down(
    x: torch.Tensor,
    down: torch.Tensor | None,
    rider: Rider | None,
    row_lens: torch.Tensor,
    workspace: Workspace,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(down-projection [num_tokens, rank] fp32 in scratch memory or None, head scores [num_tokens, heads] or
    None).
    """
    num_tokens, hidden = x.shape
    rank = 0 if down is None else down.shape[0]
    head_x, (head_weight, head_bias) = (x, (x, row_lens)) if rider is None else rider
    units = 0 if rider is None else head_weight.shape[0]
    t = tables.tile("down", num_tokens, x.dtype)
    splits = tables.down_grid(num_tokens, rank, units, hidden, x.device)
    span = triton.cdiv(triton.cdiv(hidden, splits), t.k) * t.k
    splits = -(-hidden // span)
    rank_blocks, token_blocks = -(-rank // t.n), -(-num_tokens // t.tokens)
    projected = workspace.take("down", num_tokens, rank) if rank else x
    scores = torch.empty(num_tokens, units, dtype=torch.float32, device=x.device) if units else x
    # Heads scored on their own may run beside a predictor on the side stream: they share nothing with it.
    name = "down" if rank else "heads"
    partials = workspace.take(f"{name}_partials", splits, num_tokens, rank + units) if splits > 1 else x
    _down_kernel[(rank_blocks + -(-units // t.n), splits, token_blocks)](
        x,
        x.stride(0),
        x if down is None else down,
        projected,
        rank,
        head_x,
        head_x.stride(0),
        head_weight,
        head_bias,
        scores,
        units,
        row_lens,
        partials,
        workspace.semaphores(name, (rank_blocks + -(-units // t.n)) * token_blocks)
        if splits > 1
        else row_lens,
        num_tokens,
        hidden,
        span,
        rank_blocks,
        RANK=rank > 0,
        HEADS=units > 0,
        SPLITS=splits,
        BLOCK_N=t.n,
        BLOCK_T=t.tokens,
        BLOCK_K=t.k,
        DOT=t.dot,
        PRECISION=checks.precision(x.dtype, x.dtype if down is None else down.dtype),
        HEAD_PRECISION=checks.precision(x.dtype, head_weight.dtype),
        STAGES=t.stages,
        num_warps=t.warps,
    )
    return projected if rank else None, scores if units else None


def _check_scored(x: torch.Tensor, weight: torch.Tensor, name: str, row_lens: torch.Tensor) -> None:
    check_matrix("x", x, (None, None))
    check_matrix(name, weight, (None, x.shape[1]))
    check(weight.is_contiguous(), f"{name} contiguous", weight.stride())
    check_matrix("row_lens", row_lens, (x.shape[0],), torch.int32)


def score_heads(x: torch.Tensor, predictor: Linear, call: Call) -> torch.Tensor:
    """See `reference.score_heads`. One launch.

    Raises:
        ValueError: on shape, dtype or stride mismatch.
    """
    _check_scored(x, predictor.weight, "weight", call.row_lens)
    check_matrix("bias", predictor.bias, (predictor.weight.shape[0],), torch.float32)
    workspace = workspace_for(call.workspace, x.device)
    return _launch_down(x, None, Rider(x, predictor), call.row_lens, workspace)[1]


def select_neurons(
    x: torch.Tensor, predictor: LowRank, call: Call, with_mask: bool = False, rider: Rider | None = None
) -> tuple[Selection, torch.Tensor | None]:
    """See `reference.select_neurons`. Two launches.

    Raises:
        ValueError: on shape, dtype or stride mismatch.
    """
    (down, up, bias), (row_lens, counters, workspace) = predictor, call
    _check_scored(x, down, "down", row_lens)
    (num_tokens, _), (ffn, rank) = x.shape, up.shape
    check_matrix("up", up, (None, down.shape[0]))
    check(up.is_contiguous(), "up contiguous", up.stride())
    check_matrix("bias", bias, (ffn,), torch.float32)
    if rider is not None:
        _check_scored(rider.x, rider.predictor.weight, "head weight", row_lens)
        check_matrix("head bias", rider.predictor.bias, (rider.predictor.weight.shape[0],), torch.float32)
        check(
            rider.x.shape == x.shape and rider.x.dtype == x.dtype,
            f"head input like x {list(x.shape)}",
            list(rider.x.shape),
        )
    checks.check_counters(counters)
    projected, head_scores = _launch_down(x, down, rider, row_lens, workspace_for(workspace, x.device))
    segments = -(-ffn // SEGMENT)
    ids = torch.empty(ffn, dtype=torch.int32, device=x.device)
    counts = torch.empty(segments, dtype=torch.int32, device=x.device)
    mask = torch.empty(num_tokens, ffn, dtype=torch.bool, device=x.device) if with_mask else None
    t = tables.tile("up", num_tokens)
    _up_select_kernel[(segments,)](
        projected,
        up,
        bias,
        row_lens,
        ids,
        counts,
        ids if mask is None else mask.view(torch.int8),
        ids if counters is None else counters,
        ffn,
        rank,
        num_tokens,
        SEGMENT=SEGMENT,
        ROW_MASK=with_mask,
        COUNT=counters is not None,
        BLOCK_T=t.tokens,
        BLOCK_K=t.k,
        DOT=t.dot,
        PRECISION=checks.precision_of_projected(x.dtype, up.dtype),
        STAGES=t.stages,
        num_warps=t.warps,
    )
    return Selection(ids, counts, mask), head_scores
