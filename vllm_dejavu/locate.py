"""Where a model's predictor artifact lies: a directory, the hub, or made on first use (`auto`)."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_dejavu import auto
from vllm_dejavu.manifest import MANIFEST_FILE, TENSORS_FILE, ArtifactError


def resolve(predictor: str | None, model: str, revision: str | None = None) -> Path:
    """Directory of the artifact named by the setting `predictor`: a directory, a hub id, `auto`, or None for
    `MODEL/dejavu/`.

    Raises:
        ArtifactError: nothing is there.
    """
    if predictor == auto.AUTO:
        return auto.resolve(model, revision)
    # os.path, because Path.is_dir raises on names no file system takes.
    if predictor is not None and os.path.isdir(predictor):
        return Path(predictor)
    if predictor is None and os.path.isdir(model):
        directory = Path(model) / "dejavu"
        if directory.is_dir():
            return directory
        raise ArtifactError(
            f"No predictor artifact: looked for {directory / MANIFEST_FILE}. Three ways on:"
            ' additional_config={"dejavu": {"mode": "exact"}} needs none and loses nothing;'
            ' {"predictor": "auto"} makes one without data, and {"predictor": PATH_OR_HUB_ID} names one;'
            f" vllm-dejavu train --model {model} --data FILE --output {directory} makes a better one."
        )
    repo, subdirectory = (predictor, ".") if predictor is not None else (model, "dejavu")
    if predictor is not None and (repo.startswith((".", "/", "~")) or repo.count("/") != 1):
        raise ArtifactError(
            f"No predictor artifact at {predictor}: no such directory, and not a hub id (ORG/NAME)."
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = [str(Path(subdirectory) / f) for f in (MANIFEST_FILE, TENSORS_FILE)]
        root = snapshot_download(
            repo, revision=revision if predictor is None else None, allow_patterns=patterns
        )
    except Exception as e:  # the hub's client raises many kinds; all mean the same to the user
        raise ArtifactError(
            f"No predictor artifact at {repo}: no such directory, and the hub gave none ({type(e).__name__}:"
            f" {e}). Make one with vllm-dejavu train, or name a directory."
        ) from e
    return Path(root) / subdirectory
