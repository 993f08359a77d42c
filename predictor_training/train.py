"""Moments -> one predictor per gated block, in closed form: no gradient, no stored activations."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_dejavu.predictor_training.collect import Moments

# Ridge, relative to the mean variance of the input: keeps directions the text hardly visits from blowing up.
RIDGE = 1e-4


@dataclass(frozen=True)
class FittedMlp:
    """Low-rank regression of the pre-activations: z ~ up(down(x)) + bias.

    Attributes:
        down: [rank, hidden]; up: [ffn, rank]; bias: [ffn]; all fp64.
        residual_std: [ffn], what the regression leaves unexplained; margins are multiples of it.
        activation_rate: [ffn], share of tokens in which the neuron fires.
        explained: share of the pre-activations' variance explained.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    residual_std: torch.Tensor
    activation_rate: torch.Tensor
    explained: float


@dataclass(frozen=True)
class FittedHeads:
    """Linear regression of the heads' log contribution norms: y ~ weight x + bias. weight: [heads, hidden]; bias: [heads]."""

    weight: torch.Tensor
    bias: torch.Tensor
    r2: torch.Tensor


def _covariance(second: torch.Tensor, a_sum: torch.Tensor, b_sum: torch.Tensor, n: int) -> torch.Tensor:
    return second / n - torch.outer(a_sum / n, b_sum / n)


def _inverse_sqrt(covariance: torch.Tensor) -> torch.Tensor:
    """Symmetric inverse square root with the ridge added."""
    ridge = RIDGE * covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype))
    return vectors @ torch.diag(values.clamp_min(1e-30).rsqrt()) @ vectors.T


def fit_mlp(moments: Moments, layer: int, fc1_weight: torch.Tensor, fc1_bias: torch.Tensor | None, rank: int) -> FittedMlp:
    """Reduced-rank regression (whitened SVD) of z = fc1(m) on the gate's input x.

    The subspace is chosen with each neuron's error weighted by 1 / its own standard deviation and by how undecided it is,
    sqrt(p (1 - p)) with p its activation rate: a neuron that never (or always) fires needs no precision.

    Args:
        fc1_weight: [ffn, hidden]; fc1_bias: [ffn] or None. rank: of the predictor, at most hidden.
    """
    s, n = moments.layer(layer), moments.num_tokens
    weight = fc1_weight.double().cpu()
    m_mean = s["mlp_m_sum"] / n
    cov_m = _covariance(s["mlp_m"], s["mlp_m_sum"], s["mlp_m_sum"], n)
    if "mlp_x" in s:
        x_mean = s["mlp_x_sum"] / n
        cov_x = _covariance(s["mlp_x"], s["mlp_x_sum"], s["mlp_x_sum"], n)
        cov_xm = _covariance(s["mlp_xm"], s["mlp_x_sum"], s["mlp_m_sum"], n)
    else:
        x_mean, cov_x, cov_xm = m_mean, cov_m, cov_m
    z_mean = weight @ m_mean + (0 if fc1_bias is None else fc1_bias.double().cpu())
    z_var = ((weight @ cov_m) * weight).sum(1).clamp_min(1e-12)

    whitener = _inverse_sqrt(cov_x)
    whitened = weight @ cov_xm.T @ whitener  # [ffn, hidden]: regression of z on whitened x
    rate = s["active"] / n
    importance = (rate * (1 - rate)).clamp_min(1e-4).sqrt() / z_var.sqrt()
    weighted = importance[:, None] * whitened
    _, vectors = torch.linalg.eigh(weighted.T @ weighted)
    basis = vectors[:, -rank:]  # [hidden, rank]
    up, down = whitened @ basis, basis.T @ whitener
    # Both factors are stored in 16 bits: give every row of `down` unit norm.
    scale = down.norm(dim=1).clamp_min(1e-12)
    residual = (z_var - (up * up).sum(1)).clamp_min(0)
    up, down = up * scale, down / scale[:, None]
    return FittedMlp(
        down=down, up=up, bias=z_mean - up @ (down @ x_mean), residual_std=residual.sqrt(),
        activation_rate=rate, explained=float(1 - residual.sum() / z_var.sum()),
    )  # fmt: skip


def fit_heads(moments: Moments, layer: int) -> FittedHeads:
    """Ridge regression of each head's log contribution norm on the gate's input."""
    s, n = moments.layer(layer), moments.num_tokens
    cov_x = _covariance(s["attn_x"], s["attn_x_sum"], s["attn_x_sum"], n)
    cov_xy = _covariance(s["attn_xy"], s["attn_x_sum"], s["attn_y_sum"], n)
    ridge = RIDGE * cov_x.diagonal().mean()
    weight = torch.linalg.solve(cov_x + ridge * torch.eye(len(cov_x), dtype=cov_x.dtype), cov_xy).T
    x_mean, y_mean = s["attn_x_sum"] / n, s["attn_y_sum"] / n
    y_var = (s["attn_yy"] / n - y_mean**2).clamp_min(1e-12)
    r2 = (weight * cov_xy.T).sum(1) / y_var
    return FittedHeads(weight=weight, bias=y_mean - weight @ x_mean, r2=r2)
