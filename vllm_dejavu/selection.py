"""Selections: the rule that turns scores into units, and the controls that replace the predictors.

All functions give bool masks [num_tokens, units]; `kernels.reference` turns masks into lists.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF


def random_mask(
    positions: torch.Tensor, layer: int, unit_ids: torch.Tensor, density: float, seed: int
) -> torch.Tensor:
    """Each unit with probability `density`, by a hash of (seed, position, layer, global unit id).

    The same on every device and tensor-parallel rank. positions: [num_tokens], int64; unit_ids: [units],
    int64.
    """
    h = (positions.long()[:, None] * 0x9E3779B1 + unit_ids.long()[None, :] * 0x85EBCA77) & _MASK32
    h = (h + ((layer + 1) * 0xC2B2AE3D & _MASK32) + (seed * 0x27D4EB2F & _MASK32)) & _MASK32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 0x27D4EB2F), (15, 0x165667B1)):
        h = ((h ^ (h >> shift)) * factor) & _MASK32
    return (h ^ (h >> 16)) < int(density * 2**32)


def static_units(activation_rate: torch.Tensor, density: float) -> torch.Tensor:
    """The same units for every token: the round(density * units) most often active ones. Returns [units],
    bool.
    """
    mask = torch.zeros_like(activation_rate, dtype=torch.bool)
    count = round(density * activation_rate.numel())
    mask[torch.argsort(activation_rate, descending=True, stable=True)[:count]] = True
    return mask


def contributions(attn: torch.Tensor, out_proj_weight: torch.Tensor) -> torch.Tensor:
    """As `head_contributions`, from the weights themselves: for a few rows, without memory for grams."""
    per_head = out_proj_weight.unflatten(1, attn.shape[1:]).permute(1, 2, 0)  # [heads, head_size, hidden]
    return torch.bmm(attn.transpose(0, 1), per_head).float().norm(dim=-1).t()


def head_grams(out_proj_weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Per head W_h^T W_h of out_proj's columns [hidden, heads * head_size]: [heads, head_size, head_size],
    fp32.
    """
    per_head = out_proj_weight.float().unflatten(1, (num_heads, -1)).permute(1, 0, 2)
    return per_head.transpose(1, 2) @ per_head


def head_contributions(attn: torch.Tensor, grams: torch.Tensor) -> torch.Tensor:
    """Norm of what each head adds to the residual stream, ||W_h o_h||.

    Args:
        attn: [num_tokens, heads, head_size], attention output before out_proj. grams: from `head_grams`.

    Returns:
        [num_tokens, heads], fp32.
    """
    o = attn.float()
    return torch.einsum("thd,hde,the->th", o, grams, o).clamp_min(0).sqrt()
