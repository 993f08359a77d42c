"""What the Triton kernels' wrappers ask of their arguments, and how precisely a pair of types is
multiplied.
"""

from __future__ import annotations

import torch

from vllm_dejavu.kernels.interface import COUNTERS


def precision(*dtypes: torch.dtype) -> str:
    """How fp32 tiles are multiplied: exactly if an operand is fp32; else only fp16 and bf16 values meet in
    fp32, exact in tf32.
    """
    return "ieee" if torch.float32 in dtypes else "tf32"


def precision_of_projected(*dtypes: torch.dtype) -> str:
    """As `precision`, for the predictor's fp32 down-projection: three tf32 products keep what one would
    drop.
    """
    if torch.float32 in dtypes or torch.version.hip:  # AMD has no tf32x3
        return "ieee"
    return "tf32x3"


def check(condition: bool, what: str, got: object) -> None:
    if not condition:
        raise ValueError(f"expected {what}, got {got}")


def check_matrix(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> None:
    """Shape (None: any), dtype (None: any) and a contiguous last dimension."""
    good = tensor.dim() == len(shape) and all(
        s is None or s == t for s, t in zip(shape, tensor.shape, strict=True)
    )
    check(good, f"{name} of shape {list(shape)}", list(tensor.shape))
    check(dtype is None or tensor.dtype == dtype, f"{name} of dtype {dtype}", tensor.dtype)
    check(
        tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
        f"{name} contiguous in its last dimension",
        f"strides {tensor.stride()}",
    )


def check_counters(counters: torch.Tensor | None) -> None:
    if counters is not None:
        good = (
            counters.dtype == torch.int64
            and counters.dim() == 1
            and counters.numel() >= len(COUNTERS)
            and counters.is_contiguous()
        )
        check(
            good,
            f"counters int64, contiguous, at least {len(COUNTERS)}",
            (counters.dtype, list(counters.shape), counters.stride()),
        )


def check_bias(name: str, bias: torch.Tensor | None, size: int) -> None:
    if bias is not None:
        check_matrix(name, bias, (size,))
