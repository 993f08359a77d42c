"""Gathered MLP: fc1 rows of the selected neurons, ReLU or relu2, fc2-transposed rows of those that came out
positive. Two launches; three where fc1 is computed already and nothing was selected (`exact_down`).

1. `_fc1_kernel`: a fixed grid divides the device-side number of neurons evenly, whatever it is: in blocks of
   16 a few hundred neurons would leave most multiprocessors idle. It also closes the gaps between the list's
   segments. Of an fc1 that is computed already it takes the values instead.
2. `_fc2_kernel`: the same over (columns, share of the neurons); fp32 partials, summed in order by the program
   that comes last, so no launch is spent on the sum and no float is added atomically.

`_positive_kernel` in front of these makes the list, where no predictor did.

The square of what is more than 255 does not fit into fp16: there squares are kept as sixteenths.

Source: Deja Vu (2023), whose kernels take a k fixed in advance; the even division and the skip of fc2 rows
are ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dejavu.kernels import checks, primitives, reference, tables
from vllm_dejavu.kernels.checks import check, check_matrix
from vllm_dejavu.kernels.interface import SEGMENT, Call, Mlp, Rows, Selection
from vllm_dejavu.kernels.workspace import workspace_for


@triton.jit
def _positive_kernel(
    h_ptr,
    stride_h,
    row_lens_ptr,
    ids_ptr,
    counts_ptr,
    counters_ptr,
    num_tokens,
    ffn,
    SEGMENT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (segments). h: [num_tokens, ffn], what fc1 gave. ids and counts as in `Selection`: neurons that
    are positive, or not a number, for some row.
    """
    segment = tl.program_id(0)
    neurons = segment * SEGMENT + tl.arange(0, SEGMENT)
    neuron_mask = neurons < ffn
    needed = tl.zeros([SEGMENT], tl.int32)
    positive = tl.zeros([SEGMENT], tl.int32)
    for first in range(0, num_tokens, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        token_mask = tokens < num_tokens
        valid = tl.load(row_lens_ptr + tokens, mask=token_mask, other=0) > 0
        offsets = tokens.to(tl.int64)[:, None] * stride_h + neurons[None, :]
        h = tl.load(h_ptr + offsets, mask=valid[:, None] & neuron_mask[None, :], other=0.0).to(tl.float32)
        alive = ((h > 0) | (h != h)).to(tl.int32)
        needed |= tl.max(alive, 0)
        positive += tl.sum(alive, 0)
    total = tl.sum(needed, 0)
    place = tl.cumsum(needed, 0) - 1
    tl.store(ids_ptr + segment * SEGMENT + place, neurons, mask=needed > 0)
    tl.store(counts_ptr + segment, total)
    if COUNT:
        primitives.count(counters_ptr, primitives.SELECTED, tl.sum(positive, 0))
        primitives.count(counters_ptr, primitives.READ, total)
        primitives.count(counters_ptr, primitives.SURVIVED, total)
        if segment == 0:
            primitives.count_rows(counters_ptr, row_lens_ptr, num_tokens, BLOCK_T)


@triton.jit
def _fc1_kernel(
    x_ptr,
    stride_x,
    w_ptr,
    bias_ptr,
    ids_ptr,
    counts_ptr,
    row_lens_ptr,
    row_mask_ptr,
    list_ptr,
    total_ptr,
    h_ptr,
    stride_h,
    num_tokens,
    hidden,
    ffn,
    num_segments,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BIAS: tl.constexpr,
    ROW_MASK: tl.constexpr,
    GIVEN: tl.constexpr,
    SQUARE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (programs, token blocks). x: [num_tokens, hidden]; with GIVEN what fc1 gave, [num_tokens, ffn].
    h: [neurons of the list, stride_h], 0 beyond num_tokens; list: [ffn], ascending; total: [1].
    """
    program, token_block = tl.program_id(0), tl.program_id(1)
    segment = tl.arange(0, SEGMENTS)
    counts = tl.load(counts_ptr + segment, mask=segment < num_segments, other=0)
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    if (program == 0) & (token_block == 0):
        tl.store(total_ptr, total)
    start = (total * program) // tl.num_programs(0)
    end = (total * (program + 1)) // tl.num_programs(0)
    tokens = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    valid = tl.load(row_lens_ptr + tokens, mask=token_mask, other=0) > 0
    for first in range(start, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        mask = position < end
        # [BLOCK_N, SEGMENTS]: segments that end before this position
        before = ends[None, :] <= position[:, None]
        place = position - tl.max(tl.where(before, ends[None, :], 0), 1)
        neurons = tl.load(ids_ptr + tl.sum(before.to(tl.int32), 1) * SEGMENT + place, mask=mask, other=0)
        if GIVEN:
            offsets = tokens.to(tl.int64)[None, :] * stride_x + neurons[:, None]
            h = tl.load(x_ptr + offsets, mask=mask[:, None] & token_mask[None, :], other=0.0).to(tl.float32)
        else:
            h = primitives.row_products(
                w_ptr,
                hidden,
                neurons,
                mask,
                x_ptr,
                stride_x,
                tokens,
                token_mask,
                0,
                hidden,
                BLOCK_N,
                BLOCK_T,
                BLOCK_K,
                DOT,
                PRECISION,
                STAGES,
            )
        if BIAS:
            h += tl.load(bias_ptr + neurons, mask=mask, other=0.0).to(tl.float32)[:, None]
        keep = ((h > 0) | (h != h)) & valid[None, :]
        if ROW_MASK:
            offsets = tokens.to(tl.int64)[None, :] * ffn + neurons[:, None]
            keep &= tl.load(row_mask_ptr + offsets, mask=mask[:, None] & token_mask[None, :], other=0) > 0
        h = tl.where(keep, h, 0.0)
        if SQUARE:
            h = h * h * SCALE
        offsets = position.to(tl.int64)[:, None] * stride_h + tokens[None, :]
        tl.store(
            h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask[:, None] & (tokens < stride_h)[None, :]
        )
        if token_block == 0:
            tl.store(list_ptr + position, neurons, mask=mask)


@triton.jit
def _fc2_kernel(
    h_ptr,
    stride_h,
    list_ptr,
    total_ptr,
    w_ptr,
    out_ptr,
    partial_ptr,
    semaphore_ptr,
    counters_ptr,
    num_tokens,
    hidden,
    SPLITS: tl.constexpr,
    COUNT: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (column tiles, SPLITS, token blocks)."""
    tile, split, token_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    column_mask = columns < hidden
    tokens = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = tokens < num_tokens
    total = tl.load(total_ptr)
    start = (total * split) // SPLITS
    end = (total * (split + 1)) // SPLITS
    if DOT:
        acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_T, BLOCK_H], tl.float32)
    for first in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        position = first + tl.arange(0, BLOCK_N)
        mask = position < end
        neurons = tl.load(list_ptr + position, mask=mask, other=0)
        offsets = position.to(tl.int64)[:, None] * stride_h + tokens[None, :]
        # [BLOCK_N, BLOCK_T]
        h = tl.load(h_ptr + offsets, mask=mask[:, None] & (tokens < stride_h)[None, :], other=0.0)
        alive = tl.max((h != 0).to(tl.int32), 1) > 0
        # [BLOCK_N, BLOCK_H]
        w = tl.load(
            w_ptr + neurons.to(tl.int64)[:, None] * hidden + columns[None, :],
            mask=alive[:, None] & column_mask[None, :],
            other=0.0,
        )
        if DOT:
            acc = primitives.dot(tl.trans(h), w, acc, PRECISION)
        else:
            acc += h.to(tl.float32)[:, :, None] * w.to(tl.float32)[:, None, :]
    if DOT:
        result = acc
    else:
        result = tl.sum(acc, 0)
    if COUNT:
        if (tile == 0) & (token_block == 0):
            # a row is read once for the whole batch, so every token block's activations count
            survived = tl.zeros([BLOCK_N], tl.int32)
            for first in range(start, end, BLOCK_N):
                position = first + tl.arange(0, BLOCK_N)
                alive = tl.zeros([BLOCK_N], tl.int32)
                for t in range(0, num_tokens, BLOCK_T):
                    others = t + tl.arange(0, BLOCK_T)
                    offsets = position.to(tl.int64)[:, None] * stride_h + others[None, :]
                    h = tl.load(
                        h_ptr + offsets,
                        mask=(position < end)[:, None] & (others < stride_h)[None, :],
                        other=0.0,
                    )
                    alive |= tl.max((h != 0).to(tl.int32), 1)
                survived += alive
            primitives.count(counters_ptr, primitives.SURVIVED, tl.sum(survived, 0))
    offsets = tokens.to(tl.int64)[:, None] * hidden + columns[None, :]
    mask = token_mask[:, None] & column_mask[None, :]
    last = True
    if SPLITS > 1:
        size = tl.full([], 1, tl.int64) * num_tokens * hidden
        tl.store(partial_ptr + split * size + offsets, result, mask=mask)
        last = primitives.arrive(semaphore_ptr + tile * tl.num_programs(2) + token_block, SPLITS)
        if last:
            result = tl.load(partial_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            for s in range(1, SPLITS):
                result += tl.load(
                    partial_ptr + s * size + offsets, mask=mask, other=0.0, cache_modifier=".cg"
                )
    if last:
        result = result / SCALE
        tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=mask)


ACTIVATIONS = ("relu", "relu2")


def sparse_mlp(
    x: torch.Tensor, mlp: Mlp, selection: Selection | None = None, call: Call | None = None
) -> torch.Tensor:
    """See `reference.sparse_mlp`; without a selection, PyTorch's own products. Activations are rounded to the
    dtype of x between fc1 and fc2. Two launches.

    Raises:
        ValueError: on shape, dtype or stride mismatch, or another activation.
    """
    if selection is None:
        return reference.sparse_mlp(x, mlp)
    (num_tokens, hidden), ffn = x.shape, mlp.up.weight.shape[0]
    check_matrix("x", x, (None, None))
    check_matrix("fc1_weight", mlp.up.weight, (ffn, hidden), x.dtype)
    check_matrix("fc2_weight_t", mlp.down.weight, (ffn, hidden), x.dtype)
    check(mlp.up.weight.is_contiguous(), "fc1_weight contiguous", mlp.up.weight.stride())
    checks.check_bias("fc1_bias", mlp.up.bias, ffn)
    check_matrix("neuron_ids", selection.ids, (ffn,), torch.int32)
    check_matrix("counts", selection.counts, (-(-ffn // SEGMENT),), torch.int32)
    if selection.mask is not None:
        check_matrix("row_mask", selection.mask, (num_tokens, ffn), torch.bool)
        check(selection.mask.is_contiguous(), "row_mask contiguous", selection.mask.stride())
    return _products(x, mlp.up, mlp.down, mlp.activation, selection, call, counted=False)


def exact_down(h: torch.Tensor, down: Rows, activation: str, crossover: float, call: Call) -> torch.Tensor:
    """See `reference.exact_down`; all rows share their neurons, whatever the crossover. Three launches.

    Raises:
        ValueError: on shape, dtype or stride mismatch, or another activation.
    """
    num_tokens, ffn = h.shape
    check_matrix("h", h, (None, None))
    check_matrix("fc2_weight_t", down.weight, (ffn, None), h.dtype)
    segments = -(-ffn // SEGMENT)
    ids = torch.empty(ffn, dtype=torch.int32, device=h.device)
    counts = torch.empty(segments, dtype=torch.int32, device=h.device)
    check_matrix("row_lens", call.row_lens, (num_tokens,), torch.int32)
    checks.check_counters(call.counters)
    _positive_kernel[(segments,)](
        h,
        h.stride(0),
        call.row_lens,
        ids,
        counts,
        counts if call.counters is None else call.counters,
        num_tokens,
        ffn,
        SEGMENT=SEGMENT,
        COUNT=call.counters is not None,
        BLOCK_T=16,
        num_warps=4,
    )
    return _products(h, None, down, activation, Selection(ids, counts), call, counted=True)


def _products(
    x: torch.Tensor,
    up: Rows | None,
    down: Rows,
    activation: str,
    selection: Selection,
    call: Call,
    *,
    counted: bool,
) -> torch.Tensor:
    """Both launches of a list. up: None: x is what it gave. counted: whether `survived` is already."""
    (neuron_ids, counts, row_mask), (row_lens, counters, workspace) = selection, call
    fc2_weight_t, num_tokens = down.weight, x.shape[0]
    ffn, hidden = fc2_weight_t.shape
    segments = -(-ffn // SEGMENT)
    check(activation in ACTIVATIONS, f"activation out of {list(ACTIVATIONS)}", activation)
    check(fc2_weight_t.is_contiguous(), "fc2_weight_t contiguous", fc2_weight_t.stride())
    checks.check_counters(counters)
    check_matrix("row_lens", row_lens, (num_tokens,), torch.int32)
    square = activation == "relu2"
    scale = 1 / 16 if square and x.dtype == torch.float16 else 1.0
    workspace = workspace_for(workspace, x.device)
    t = tables.tile("fc1", num_tokens, x.dtype)
    stride_h = tables.padded_tokens(num_tokens)
    h = workspace.take("activations", ffn, stride_h, dtype=x.dtype)
    end = -(-ffn // 16) * 16  # aligned for wide loads; the entry after the list is its length
    neuron_list = torch.empty(end + 1, dtype=torch.int32, device=x.device)
    total = neuron_list[end:]
    fc1_weight, fc1_bias = (x, None) if up is None else (up.weight, up.bias)
    _fc1_kernel[(t.per_sm * tables.num_sms(x.device), -(-num_tokens // t.tokens))](
        x,
        x.stride(0),
        fc1_weight,
        fc1_weight if fc1_bias is None else fc1_bias,
        neuron_ids,
        counts,
        row_lens,
        row_lens if row_mask is None else row_mask.view(torch.int8),
        neuron_list,
        total,
        h,
        stride_h,
        num_tokens,
        hidden,
        ffn,
        segments,
        SEGMENT=SEGMENT,
        SEGMENTS=triton.next_power_of_2(segments),
        BIAS=fc1_bias is not None,
        ROW_MASK=row_mask is not None,
        GIVEN=up is None,
        SQUARE=square,
        SCALE=scale,
        BLOCK_N=t.n,
        BLOCK_T=t.tokens,
        BLOCK_K=t.k,
        DOT=t.dot,
        PRECISION=checks.precision(x.dtype),
        STAGES=t.stages,
        num_warps=t.warps,
    )
    t = tables.tile("fc2", num_tokens, x.dtype)
    splits, token_blocks = tables.fc2_grid(num_tokens, hidden, x.device), -(-num_tokens // t.tokens)
    out = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device)
    partials = workspace.take("fc2_partials", splits, num_tokens, hidden) if splits > 1 else out
    column_tiles = -(-hidden // t.k)
    _fc2_kernel[(column_tiles, splits, token_blocks)](
        h,
        stride_h,
        neuron_list,
        total,
        fc2_weight_t,
        out,
        partials,
        workspace.semaphores("fc2", column_tiles * token_blocks) if splits > 1 else total,
        neuron_list if counters is None else counters,
        num_tokens,
        hidden,
        SPLITS=splits,
        COUNT=counters is not None and not counted,
        SCALE=scale,
        BLOCK_N=t.n,
        BLOCK_T=t.tokens,
        BLOCK_H=t.k,
        DOT=t.dot,
        PRECISION=checks.precision(x.dtype),
        STAGES=t.stages,
        num_warps=t.warps,
    )
    return out
