"""How a predictor of neurons is fitted: the forms, all giving the same scorer, `up(down(x)) + bias`.

What is served is the low-rank scorer, whichever form fitted it. A new form is one function (docs/extend.md).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vllm_dejavu.predictor_training.samples import Rows

# Ridge, relative to the mean variance of the input: keeps directions the text hardly visits from blowing up.
RIDGE = 1e-4
# Gradient training, by epochs, batch and learning rate; tried by hand on opt-books-7m (rank 24, 32,768
# tokens, held-out AUC), not by a script of the repository. More than 5 epochs hardly change `finetuned`.
# `paper` starts from nothing: its own batch and 20 epochs; its own learning rate, 1e-3, fell clearly short of
# 1e-2 there, which would have flattered our form.
FINETUNED = (5, 512, 1e-2)
PAPER = (20, 1024, 1e-2)
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class FittedMlp:
    """A scorer of neurons, before its operating point is chosen: selected are scores above a margin.

    Attributes:
        down: [rank, hidden]; up: [ffn, rank]; bias: [ffn]. Scores of different neurons must be comparable,
            because one margin serves all: in residual standard deviations, or log odds.
        activation_rate: [ffn], share of tokens in which the neuron is active.
        explained: share of the pre-activations' variance explained; None where the form does not say.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor
    activation_rate: torch.Tensor
    explained: float | None = None


@dataclass(frozen=True)
class MlpTask:
    """All that a form may use to fit the predictor of one layer.

    Attributes:
        rank: of the predictor. x_mean [hidden], x_cov [hidden, hidden]: of the gate's input x; m_mean, m_cov:
            of the MLP's own input m;
            xm_cov: [hidden, hidden], x by m; all fp64.
        weight, bias: of fc1, [ffn, hidden] and [ffn], fp64; z = weight @ m + bias. fc2_norms: [ffn], norms of
            fc2's rows.
        norm_weight, norm_bias: of the LayerNorm in front of fc1, None where there is none.
        activation_rate: [ffn], share of tokens in which a neuron is labelled active. energy: [ffn], its mean
            squared energy.
        samples: gives the stored tokens shard by shard, again at every call; None unless the form asks for
            them.
        seed: of anything random. device: to train on. energy_loss: weigh a missed neuron by what it would
            have added.
    """

    rank: int
    x_mean: torch.Tensor
    x_cov: torch.Tensor
    m_mean: torch.Tensor
    m_cov: torch.Tensor
    xm_cov: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    fc2_norms: torch.Tensor
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    activation_rate: torch.Tensor
    energy: torch.Tensor
    samples: Callable[[], Iterator[Rows]] | None = None
    seed: int = 0
    device: str = "cpu"
    energy_loss: bool = False


@dataclass(frozen=True)
class Form:
    """A named way of fitting. needs_samples: stored activations; own_input: only for lookahead `self`."""

    name: str
    fit: Callable[[MlpTask], FittedMlp]
    needs_samples: bool = False
    own_input: bool = False


def inverse_sqrt(covariance: torch.Tensor) -> torch.Tensor:
    """Symmetric inverse square root with the ridge added."""
    ridge = RIDGE * covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(
        covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    )
    return vectors @ torch.diag(values.clamp_min(1e-30).rsqrt()) @ vectors.T


def closed_form(task: MlpTask) -> FittedMlp:
    """Reduced-rank regression (whitened SVD) of the pre-activations z on the gate's input x; no gradient, no
    stored activation.

    The subspace is chosen with each neuron's error weighted by 1 / its own standard deviation and by how
    undecided it is, sqrt(p (1 - p)) with p its activation rate: a neuron that never (or always) fires needs
    no precision. With `energy_loss` the weight is the norm of its fc2 row instead of 1 / its standard
    deviation.
    """
    z_mean = task.weight @ task.m_mean + task.bias
    z_var = ((task.weight @ task.m_cov) * task.weight).sum(1).clamp_min(1e-12)
    whitener = inverse_sqrt(task.x_cov)
    whitened = task.weight @ task.xm_cov.T @ whitener  # [ffn, hidden]: regression of z on whitened x
    undecided = (task.activation_rate * (1 - task.activation_rate)).clamp_min(1e-4).sqrt()
    importance = undecided * (task.fc2_norms if task.energy_loss else z_var.rsqrt())
    weighted = importance[:, None] * whitened
    _, vectors = torch.linalg.eigh(weighted.T @ weighted)
    basis = vectors[:, -task.rank :]  # [hidden, rank]
    up, down = whitened @ basis, basis.T @ whitener
    residual_var = (z_var - (up * up).sum(1)).clamp_min(1e-3 * z_var)
    bias = z_mean - up @ (down @ task.x_mean)
    std = residual_var.sqrt()
    return FittedMlp(
        down=down,
        up=up / std[:, None],
        bias=bias / std,
        activation_rate=task.activation_rate,
        explained=float(1 - residual_var.sum() / z_var.sum()),
    )


def svd(task: MlpTask) -> FittedMlp:
    """SVD of fc1, whitened by what the LayerNorm in front of it says about its input: mean = its bias,
    variance = its scale squared, no correlations. Uses no data; a baseline for `closed_form`, which needs
    only a few thousand tokens to beat it.

    Raises:
        ValueError: there is no LayerNorm in front (post-LN models).
    """
    if task.norm_weight is None or task.norm_bias is None:
        raise ValueError(
            "form 'svd' needs a LayerNorm with scale and bias in front of fc1; take 'closed_form'."
        )
    prior = torch.diag(task.norm_weight**2)
    z_mean, z_std = (
        task.weight @ task.norm_bias + task.bias,
        ((task.weight**2) @ task.norm_weight**2).sqrt().clamp_min(1e-6),
    )
    rate = torch.special.ndtr(z_mean / z_std)
    guess = {
        "x_mean": task.norm_bias,
        "m_mean": task.norm_bias,
        "x_cov": prior,
        "m_cov": prior,
        "xm_cov": prior,
        "activation_rate": rate,
    }
    fitted = closed_form(MlpTask(**{**vars(task), **guess}))
    return FittedMlp(fitted.down, fitted.up, fitted.bias, task.activation_rate)


def finetuned(task: MlpTask) -> FittedMlp:
    """Gradient steps on the paper's loss, from the closed form."""
    start = closed_form(task)
    # A residual z / std becomes log odds: a logistic curve is close to a normal one that is 1.7 times as
    # narrow.
    up, bias = 1.7 * start.up, 1.7 * start.bias
    # Rows of `down` to the input's spread, because AdamW takes steps of one size in every parameter.
    spread = ((start.down @ task.x_cov) * start.down).sum(1).clamp_min(1e-12).sqrt()
    return _train(task, start.down / spread[:, None], up * spread, bias, *FINETUNED)


def paper(task: MlpTask) -> FittedMlp:
    """Deja Vu's recipe: two linear layers from scratch, BCE with negatives weighted by the batch's positive
    rate, AdamW.
    """
    generator = torch.Generator().manual_seed(task.seed)
    ffn, hidden = task.weight.shape

    def uniform(rows: int, columns: int) -> torch.Tensor:  # nn.Linear's own initialisation
        return (torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1) * columns**-0.5

    return _train(
        task,
        uniform(task.rank, hidden),
        uniform(ffn, task.rank),
        torch.zeros(ffn, dtype=torch.float64),
        *PAPER,
    )


def _train(
    task: MlpTask,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor,
    epochs: int,
    batch: int,
    learning_rate: float,
) -> FittedMlp:
    """AdamW over the stored tokens with a cosine schedule; shards are shuffled within and read in order.

    Positives weigh 1 (or what they would have added, with `energy_loss`), negatives the batch's positive
    rate: missing a neuron costs quality, selecting one too many costs only its bytes.
    """
    if task.samples is None:
        raise ValueError("this form trains on stored activations, and none were collected")
    generator = torch.Generator().manual_seed(task.seed)
    parameters = [t.float().to(task.device).requires_grad_(True) for t in (down, up, bias)]
    steps = epochs * sum(math.ceil(len(rows) / batch) for rows in task.samples())
    if not steps:
        raise ValueError("no activations were stored; allow more with --max-disk")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in task.samples():
                for index in torch.randperm(len(rows), generator=generator).split(batch):
                    x, active = (t[index].float().to(task.device) for t in (rows.mlp_x, rows.active))
                    positive: torch.Tensor | float = 1.0
                    if task.energy_loss:
                        energy = rows.energy[index].float().to(task.device)
                        # mean 1 over the active
                        positive = energy * (active.sum() / energy.sum().clamp_min(1e-6))
                    weight = torch.where(active > 0, positive, active.mean() + 0.005)
                    scores = torch.nn.functional.linear(x @ parameters[0].T, parameters[1], parameters[2])
                    # Summed over neurons: the mean over so many would leave steps without size.
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(
                        scores, active, weight, reduction="sum"
                    ) / len(x)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
    down, up, bias = (p.detach().double().cpu() for p in parameters)
    return FittedMlp(down=down, up=up, bias=bias, activation_rate=task.activation_rate)


FORMS = {
    f.name: f
    for f in (
        Form("closed_form", closed_form),
        Form("finetuned", finetuned, needs_samples=True),
        Form("paper", paper, needs_samples=True),
        Form("svd", svd, own_input=True),
    )
}


def get(name: str) -> Form:
    """A form by its name, or a `Form` of anyone's own as "module:attribute".

    Raises:
        ValueError: unknown name, or no `Form` there.
    """
    if ":" not in name:
        if name not in FORMS:
            raise ValueError(
                f"--form {name!r} is unknown: expected one of {sorted(FORMS)}, or module:attribute."
            )
        return FORMS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(
            f"--form {name}: {e}. Expected an importable module:attribute that is a forms.Form."
        ) from e
    if not isinstance(found, Form):
        raise ValueError(
            f"--form {name}: expected a vllm_dejavu.predictor_training.forms.Form, found"
            f" {type(found).__name__}."
        )
    return found
