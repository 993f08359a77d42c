"""How far two computations of the same thing may be apart: one table by dtype, the same in every test.

The measure is the relative root-mean-square error ||actual - expected|| / ||expected||, so inputs must be
scaled such that no part of the result drowns in the rest (weights by 1/sqrt(fan-in)).
"""

from __future__ import annotations

import torch

# The references, which accumulate in fp32 and round once, were measured at no more than 2.5e-7, 3e-4 and
# 2.5e-3 in tests/test_kernel_reference.py; the rest is room for a kernel that sums in another order or also
# rounds activations.
RELATIVE_RMS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# For parametrize(..., DTYPES, ids=DTYPE_IDS).
DTYPES = list(RELATIVE_RMS)
DTYPE_IDS = ["fp32", "fp16", "bf16"]


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in fp64; 0 where both are all zero."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, scale = (actual - expected).norm().item(), expected.norm().item()
    return error / scale if scale else error


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype | None = None,
    allowed: float | None = None,
) -> None:
    """Same shape, and apart by no more than `allowed`, or the tolerance of `dtype` (that of `actual` unless
    given); NaN never passes.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = relative_rms(actual, expected)
    allowed = RELATIVE_RMS[dtype or actual.dtype] if allowed is None else allowed
    assert error <= allowed, (
        f"relative RMS error {error:.2e}, allowed {allowed:.0e} ({dtype or actual.dtype})"
    )
