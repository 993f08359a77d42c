"""What the chosen gates select on a text: the densities, unions and recalls that an artifact records."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from vllm_dejavu.config import BLOCKS
from vllm_dejavu.manifest import GateSpec
from vllm_dejavu.predictor_training.calibrate import quantile
from vllm_dejavu.predictor_training.gates import Gate, Key
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.masked import Masked

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
UPPER_QUANTILE = 0.95


class Description(NamedTuple):
    """specs: of every block of every layer, dense ones too. run: what they were counted in."""

    specs: dict[Key, GateSpec]
    run: Masked


def describe(
    model: HfModel, gates: dict[Key, Gate], tokens: torch.Tensor, batch: int, seed: int
) -> Description:
    """Run the chosen gates over the text and write down what they select.

    A head gate's `activation_rate` becomes that of this text.
    """
    run = Masked(model, gates, measure=True, seed=seed)
    run.nll(tokens, batch)
    generator = torch.Generator().manual_seed(seed)
    specs: dict[Key, GateSpec] = {}
    for layer in range(len(model.layers)):
        for block in BLOCKS:
            key = (layer, block)
            gate = gates.get(key)
            units = model.geometry.units(block)
            if gate is None:
                natural = run.active[key] / (run.tokens * units) if block == "mlp" else None
                specs[key] = GateSpec(state="dense", oracle_density=natural)
                continue
            if block == "attention":
                gate.tensors["activation_rate"] = (run.rate[key] / run.tokens).float().cpu()
            specs[key] = replace(
                gate.spec,
                density=_summary(torch.cat(run.counts[key]).float() / units),
                union_density=_unions(torch.cat(run.rows[key]).cpu(), generator),
                oracle_density=run.active[key] / (run.tokens * units),
                recall=run.hit[key] / run.active[key] if run.active[key] else 1.0,
            )
    return Description(specs, run)


def _summary(values: torch.Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "upper": quantile(values, UPPER_QUANTILE)}


def _unions(rows: torch.Tensor, generator: torch.Generator, draws: int = 200) -> dict[str, dict[str, float]]:
    """Share of units selected by any of B random rows, by B."""
    out = {}
    for batch in BATCH_SIZES:
        picks = torch.randint(len(rows), (draws, batch), generator=generator)
        out[str(batch)] = _summary(torch.stack([rows[p].any(0).float().mean() for p in picks]))
    return out
