"""Moments -> one predictor per gated block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_dejavu.predictor import state_name
from vllm_dejavu.predictor_training.collect import Moments, layer_lookahead
from vllm_dejavu.predictor_training.forms import RIDGE, FittedMlp, Form, MlpTask, get
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.labels import top_heads
from vllm_dejavu.predictor_training.samples import Rows, SampleStore


@dataclass(frozen=True)
class FittedHeads:
    """Linear regression of the heads' log norms: y ~ weight x + bias. weight: [heads, hidden]; bias, r2:
    [heads].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    r2: torch.Tensor


class FittedLayer(NamedTuple):
    """Both predictors of a layer, before their operating points are chosen."""

    mlp: FittedMlp
    heads: FittedHeads


@dataclass(frozen=True)
class LayerWeights:
    """What of a layer the fit reads: fc1 [ffn, hidden], its bias, norms of fc2's rows [ffn], the LayerNorm in
    front (None: post-LN, or without such parameters).
    """

    fc1: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_norms: torch.Tensor
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None

    @classmethod
    def of(cls, model: HfModel, layer: int) -> LayerWeights:
        def parameter(module: str, kind: str) -> torch.Tensor | None:
            value = model.weight(layer, module, kind)
            return None if value is None else value.double().cpu()

        names = model.names
        fc1, bias = parameter(names.up, "weight"), parameter(names.up, "bias")
        norm = (None, None)
        if model.geometry.norm == "pre":
            scale = parameter(names.mlp_norm, "weight")
            scale = None if scale is None else scale + names.norm_offset
            norm = (scale, parameter(names.mlp_norm, "bias"))
        return cls(
            fc1,
            torch.zeros(len(fc1), dtype=torch.float64) if bias is None else bias,
            model.fc2_norms(layer).double().cpu(),
            *norm,
        )


def covariance(second: torch.Tensor, a_sum: torch.Tensor, b_sum: torch.Tensor, n: int) -> torch.Tensor:
    return second / n - torch.outer(a_sum / n, b_sum / n)


def fit_mlp(
    moments: Moments,
    layer: int,
    weights: LayerWeights,
    lookahead: str,
    rank: int,
    form: Form,
    *,
    samples: Callable[[], Iterator[Rows]] | None = None,
    seed: int = 0,
    device: str = "cpu",
    energy_loss: bool = False,
) -> FittedMlp:
    """The MLP predictor of one layer.

    Args:
        lookahead: as asked for; layer 0 has no `previous`. rank: at most hidden. Others as in
            `forms.MlpTask`.
    """
    s, n = moments.layer(layer), moments.num_tokens
    name = state_name("mlp", layer_lookahead(lookahead, layer))
    m_sum, x_sum = s["mlp_input.sum"], s[f"{name}.sum"]
    cov_m = covariance(s["mlp_input.second"], m_sum, m_sum, n)
    cov_x, cov_xm = cov_m, cov_m
    if name != "mlp_input":
        cov_x = covariance(s[f"{name}.second"], x_sum, x_sum, n)
        cov_xm = covariance(s[f"{name}.mlp_input"], x_sum, m_sum, n)
        if form.own_input:
            raise ValueError(f"form {form.name!r} is for lookahead 'self' only, found {lookahead!r}.")
    task = MlpTask(
        rank=rank,
        x_mean=x_sum / n,
        x_cov=cov_x,
        m_mean=m_sum / n,
        m_cov=cov_m,
        xm_cov=cov_xm,
        weight=weights.fc1,
        bias=weights.fc1_bias,
        fc2_norms=weights.fc2_norms,
        norm_weight=weights.norm_weight,
        norm_bias=weights.norm_bias,
        activation_rate=s["active"] / n,
        energy=s["energy"] / n,
        samples=samples if form.needs_samples else None,
        seed=seed + layer,
        device=device,
        energy_loss=energy_loss,
    )
    return _unit_rows(form.fit(task))


def _unit_rows(fitted: FittedMlp) -> FittedMlp:
    """Rows of `down` of unit norm: both factors are stored in 16 bits or fewer."""
    scale = fitted.down.norm(dim=1).clamp_min(1e-12)
    return FittedMlp(
        fitted.down / scale[:, None], fitted.up * scale, fitted.bias, fitted.activation_rate, fitted.explained
    )


def fit_heads(moments: Moments, layer: int, lookahead: str) -> FittedHeads:
    """Ridge regression of each head's log norm on the gate's input."""
    s, n = moments.layer(layer), moments.num_tokens
    name = state_name("attention", layer_lookahead(lookahead, layer))
    x_sum, y_sum = s[f"{name}.sum"], s["heads.sum"]
    cov_x = covariance(s[f"{name}.second"], x_sum, x_sum, n)
    cov_xy = covariance(s[f"{name}.heads"], x_sum, y_sum, n)
    ridge = RIDGE * cov_x.diagonal().mean()
    weight = torch.linalg.solve(cov_x + ridge * torch.eye(len(cov_x), dtype=cov_x.dtype), cov_xy).T
    y_mean = y_sum / n
    y_var = (s["heads.square"] / n - y_mean**2).clamp_min(1e-12)
    return FittedHeads(
        weight=weight, bias=y_mean - weight @ (x_sum / n), r2=(weight * cov_xy.T).sum(1) / y_var
    )


def fit_heads_by_gradient(
    rows: list[Rows],
    start: FittedHeads,
    labels: torch.Tensor,
    seed: int,
    epochs: int = 3,
    learning_rate: float = 1e-3,
) -> FittedHeads:
    """Logistic regression of head labels by AdamW, the paper's way: one linear layer, since two without an
    activation between are one.

    Args:
        rows: stored tokens. start: gives shapes only; the fit starts from zeros. labels: [all rows, heads],
            bool.
    """
    x = torch.cat([r.attn_x for r in rows]).float()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(start.weight.shape, requires_grad=True)
    bias = torch.zeros(len(start.bias), requires_grad=True)
    steps = epochs * -(-len(x) // 1024)
    optimizer = torch.optim.AdamW([weight, bias], lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for index in torch.randperm(len(x), generator=generator).split(1024):
                scores = torch.nn.functional.linear(x[index], weight, bias)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    scores, labels[index].float(), reduction="sum"
                ) / len(index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return FittedHeads(
        weight.detach().double(), bias.detach().double(), torch.full_like(start.r2, float("nan"))
    )


@dataclass(frozen=True)
class FitSettings:
    """How layers are fitted; plain values, so that another process can do it.

    Attributes:
        form: of MLP predictors, by name (`forms.get`). head_form: "closed_form" or "paper". head_share: of
            heads that the paper's rule labels.
    """

    rank: int
    lookahead: dict[str, str]
    form: str = "closed_form"
    head_form: str = "closed_form"
    head_share: float = 0.3
    seed: int = 0
    device: str = "cpu"
    energy_loss: bool = False


def fit_layer(
    settings: FitSettings,
    moments: Moments,
    layer: int,
    weights: LayerWeights,
    store: SampleStore | None = None,
) -> FittedLayer:
    """Both predictors of a layer."""
    mlp = fit_mlp(
        moments,
        layer,
        weights,
        settings.lookahead["mlp"],
        settings.rank,
        get(settings.form),
        samples=None if store is None else lambda: store.read(layer),
        seed=settings.seed,
        device=settings.device,
        energy_loss=settings.energy_loss,
    )
    heads = fit_heads(moments, layer, settings.lookahead["attention"])
    if settings.head_form == "paper":
        rows = list(store.read(layer))
        chosen = top_heads(torch.cat([r.head_norms for r in rows]).float(), settings.head_share)
        heads = fit_heads_by_gradient(rows, heads, chosen, settings.seed + layer)
    return FittedLayer(mlp, heads)
