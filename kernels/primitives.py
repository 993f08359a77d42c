"""Device functions shared by the Triton kernels."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bf16 tiles, and makes bf16 of integers by their bit patterns;
# there fp32 stands in between.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b on tensor cores, fp32 accumulation. a: [M, K], b: [K, N], of one type."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:  # not just a further line: Triton compiles what follows a return in a static `if`
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def multiply_add(acc, w, x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc += w @ x^T. w: [N, K], x: [T, K].

    Args:
        acc: fp32, [N, T] with DOT (tensor cores), else [N, T, K]: products are kept apart until the end, so
            that the loop needs no exchange between threads; `finish` sums them.
        PRECISION: of an fp32 dot. Operands of different types (predictors are fp16, activations may be bf16)
            meet in fp32, where tf32 still holds either exactly.
    """
    if w.dtype == tl.int8:
        if _INTERPRETED:
            w = w.to(tl.float32)
        w = w.to(x.dtype)  # exact: 16-bit floats hold every int8
    if w.dtype != x.dtype:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    if DOT:
        return dot(w, tl.trans(x), acc, PRECISION)
    else:
        return acc + w.to(tl.float32)[:, None, :] * x.to(tl.float32)[None, :, :]


@triton.jit
def finish(acc, DOT: tl.constexpr):
    """The [N, T] result of `multiply_add` steps."""
    if DOT:
        return acc
    else:
        return tl.sum(acc, 2)


@triton.jit
def row_products(
    w_ptr,
    stride_w,
    rows,
    row_mask,
    x_ptr,
    stride_x,
    tokens,
    token_mask,
    k_start,
    k_end,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """weight[rows, k_start:k_end] @ x[tokens, k_start:k_end]^T: [BLOCK_N, BLOCK_T], fp32. Masked rows are not
    read.
    """
    k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * stride_w
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * stride_x
    if DOT:
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_T, BLOCK_K], tl.float32)
    for start in tl.range(k_start, k_end, BLOCK_K, num_stages=STAGES):
        kk = start + k
        w = tl.load(w_rows + kk[None, :], mask=row_mask[:, None] & (kk < k_end)[None, :], other=0.0)
        x = tl.load(x_rows + kk[None, :], mask=token_mask[:, None] & (kk < k_end)[None, :], other=0.0)
        acc = multiply_add(acc, w, x, DOT, PRECISION)
    return finish(acc, DOT)


@triton.jit
def arrive(counter_ptr, total):
    """True in the last of `total` programs to come here; all that the others stored before is visible to it.

    The counter must start at 0 and is 0 again afterwards, so that graphs can be replayed.
    """
    tl.debug_barrier()  # every thread's stores come before the one thread's release below
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


# Places of a gate's counters: `interface.COUNTERS`, which a test compares.
STEPS, ROWS, SELECTED, READ, SURVIVED = (tl.constexpr(place) for place in range(5))


@triton.jit
def count(counters_ptr, index: tl.constexpr, amount):
    """Add to one of a gate's int64 counters (`interface.COUNTERS`); integers, so the order does not
    matter.
    """
    tl.atomic_add(counters_ptr + index, amount.to(tl.int64), sem="relaxed")


@triton.jit
def count_rows(counters_ptr, row_lens_ptr, num_tokens, BLOCK_T: tl.constexpr):
    """One step, and its rows that hold a token; one program of a launch calls it."""
    rows = 0
    for start in range(0, num_tokens, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        rows += tl.sum(
            (tl.load(row_lens_ptr + tokens, mask=tokens < num_tokens, other=0) > 0).to(tl.int32), 0
        )
    count(counters_ptr, STEPS, tl.full([], 1, tl.int32))
    count(counters_ptr, ROWS, rows)
