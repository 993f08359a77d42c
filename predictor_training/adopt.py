"""Predictors of one checkpoint taken over by another with nearly the same weights, such as a quantized one.

Nothing is trained: recall and perplexity are measured with the other weights, in the serving path, and if the
rise of perplexity is within the budget a copy of the artifact is written that names both checkpoints.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_dejavu import artifact
from vllm_dejavu.artifact import Artifact
from vllm_dejavu.manifest import ArtifactError, ModelSpec, check_model
from vllm_dejavu.predictor_training import evaluate, hf_model
from vllm_dejavu.predictor_training.report import say

PROMPTS = 8  # continuations of `evaluate`; text is what decides


@dataclass(frozen=True)
class AdoptConfig:
    """What to take over, for what.

    Attributes:
        artifact: directory. model: directory or hub id of the other checkpoint. output: a new directory.
        data, field, max_tokens, dtype, seed: as of `evaluate`.
        max_ppl_increase: sparse over dense with the other checkpoint's weights; 0.01 for 1%.
    """

    artifact: str
    model: str
    data: tuple[str, ...]
    output: str
    field: str = "text"
    max_tokens: int | None = 32_768
    max_ppl_increase: float = 0.01
    dtype: str = "auto"
    seed: int = 0


def run(config: AdoptConfig) -> Artifact:
    """Measure, and write the copy.

    Raises:
        ArtifactError: the artifact fits another geometry, is this checkpoint's already, or costs more
            perplexity than the budget; nothing is written then.
    """
    from transformers import AutoConfig

    artifact.check_output(Path(config.output), overwrite=False)
    loaded = artifact.load(config.artifact)
    spec = ModelSpec.from_hf_config(AutoConfig.from_pretrained(config.model), config.model)
    check_model(loaded.manifest, spec)
    found, before = hf_model.fingerprint(config.model), loaded.manifest.model
    if found == before.fingerprint:
        raise ArtifactError(
            f"{config.artifact} was made for the weights of {config.model} ({found}): serve it as it is."
        )
    manifest = replace(loaded.manifest, model=replace(spec, fingerprint=found))
    with tempfile.TemporaryDirectory(prefix="dejavu-adopt-") as directory:
        artifact.save(Path(directory) / "dejavu", manifest, loaded.tensors)
        say(f"predictors of {before.fingerprint} with the weights of {config.model}, {found}")
        result = measured(config, Path(directory) / "dejavu")
    rise = result["ppl_increase"]
    if not rise <= config.max_ppl_increase:  # also NaN
        raise ArtifactError(
            f"With the weights of {config.model} the predictors of {before.name} raise perplexity by"
            f" {rise:+.2%} ({result['dense_ppl']:.2f} dense, {result['sparse_ppl']:.2f} sparse), more than"
            f" {config.max_ppl_increase:.2%}: nothing was written. Train predictors for it (vllm-dejavu train"
            " --model), or raise --max-ppl-increase."
        )
    record = {
        "model": before.name,
        "fingerprint": before.fingerprint,
        "digest": loaded.digest,
        **{k: result[k] for k in ("data", "num_tokens", "dense_ppl", "sparse_ppl", "ppl_increase")},
        **{k: result[k] for k in ("mlp_recall", "head_recall", "mlp_density", "head_density")},
    }
    kept = replace(manifest, calibration=manifest.calibration | {"adopted_from": record})
    return artifact.save(Path(config.output), kept, loaded.tensors)


def measured(config: AdoptConfig, predictor: Path) -> dict[str, Any]:
    """`evaluate`'s result for the model with the artifact."""
    return evaluate.run(
        evaluate.EvaluateConfig(
            model=config.model,
            data=config.data,
            predictor=str(predictor),
            field=config.field,
            max_tokens=config.max_tokens,
            prompts=PROMPTS,
            new_tokens=8,
            dtype=config.dtype,
            seed=config.seed,
        )
    )
