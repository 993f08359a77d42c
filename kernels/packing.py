"""Weights in 4 bits: two in a byte, each group of WEIGHT_GROUP columns with a scale."""

from __future__ import annotations

import torch

PIECE = 64  # columns; as in csrc/isa.h, which says how their bytes lie
WEIGHT_GROUP = 128


def pack(integers: torch.Tensor) -> torch.Tensor:
    """[rows, columns] from -8 to 7 -> [rows, columns / 2], uint8: of each PIECE columns the first half in the
    lower halves of bytes, the second in the upper ones.

    Raises:
        ValueError: columns are no multiple of PIECE.
    """
    rows, columns = integers.shape
    if columns % PIECE:
        raise ValueError(f"4-bit weights must have a multiple of {PIECE} columns, got {columns}")
    first, second = (integers + 8).to(torch.uint8).view(rows, -1, 2, PIECE // 2).unbind(2)
    return (first | second << 4).view(rows, columns // 2)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """[rows, columns / 2], uint8 -> [rows, columns], int8."""
    rows = packed.shape[0]
    pieces = packed.view(rows, -1, PIECE // 2)
    return torch.stack((pieces & 15, pieces >> 4), 2).view(rows, -1).to(torch.int8) - 8


def expand(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Scales [rows, columns / WEIGHT_GROUP], or [a divisor of rows, columns], for each weight: fp32."""
    scale = scale.float().repeat_interleave(rows // scale.shape[0], 0)
    return scale.repeat_interleave(columns // scale.shape[1], 1)
