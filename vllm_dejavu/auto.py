"""`predictor: auto`: an artifact for a model that nobody has trained predictors for, made when it is first
served.

The model writes a little text itself, and the closed form is fitted and calibrated on that, in a process of
its own (so that this one stays free of models and of GPU contexts). DESIGN.md asked for an SVD of fc1
whitened by the LayerNorm, without data; since thresholds need a dense run over some text anyway, the
covariances of that text come for free, and they are worth far more (docs/training.md).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from vllm_dejavu.manifest import MANIFEST_FILE

logger = logging.getLogger("vllm.dejavu")

AUTO = "auto"
CACHE_VARIABLE = "VLLM_DEJAVU_CACHE"
# Whatever changes the artifact is in its cache key.
RECIPE = {
    "data": "self",
    "max-tokens": 16_384,
    "valid-tokens": 8_192,
    "seq-len": 512,
    "valid-share": 0.3,
    "form": "closed_form",
    "loss": "bce",
    "seed": 0,
}
RECIPE_VERSION = 1


def resolve(model: str, revision: str | None = None) -> Path:
    """Directory of the model's automatic artifact; builds it where it is missing.

    Args:
        model: directory or hub id.

    Raises:
        RuntimeError: building failed; its output has gone to stderr.
    """
    from filelock import FileLock

    source = _model_directory(model, revision)
    target = cache_directory() / _key(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Workers of one host may all come here first.
    with FileLock(f"{target}.lock"):
        if not (target / MANIFEST_FILE).is_file():
            _build(source, target)
        else:
            logger.info("dejavu: predictor 'auto' for %s, made earlier: %s", model, target)
    return target


def cache_directory() -> Path:
    """Where automatic artifacts are kept: $VLLM_DEJAVU_CACHE, else ~/.cache/vllm-dejavu. Several hosts may
    share it.
    """
    named = os.environ.get(CACHE_VARIABLE)
    return (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-dejavu"
    )


def _model_directory(model: str, revision: str | None) -> Path:
    if os.path.isdir(model):
        return Path(model).resolve()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, ignore_patterns=["*.msgpack", "*.h5", "*.ot"]))


def _key(source: Path) -> str:
    """Names the weights by their files. Not by their values, which would have to be read; the artifact holds
    those' fingerprint, and serving compares it."""
    files = sorted(p for pattern in ("*.safetensors", "*.bin", "config.json") for p in source.glob(pattern))
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest = hashlib.sha256(json.dumps([str(source), stats, RECIPE, RECIPE_VERSION]).encode()).hexdigest()
    return f"{source.name}-{digest[:16]}"


def _build(source: Path, target: Path) -> None:
    import torch

    device = "cuda" if torch.cuda.device_count() else "cpu"  # counting makes no context
    options = [v for name, value in RECIPE.items() for v in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "vllm_dejavu.cli",
        "train",
        "--model",
        str(source),
        "--output",
        str(target),
        "--device",
        device,
        *options,
    ]
    if device == "cuda":
        # every GPU has it, and OPT was trained in it; sums are in fp32 and fp64
        command += [
            "--model-dtype",
            "float16",
        ]
    logger.info(
        "dejavu: predictor 'auto': making predictors for %s from text that it writes itself; once, a few"
        " minutes",
        source.name,
    )
    logger.info("dejavu: %s", " ".join(command))
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(
            f"predictor='auto': making predictors for {source} failed (exit status {done.returncode}); the"
            f" reason is above. The command was: {' '.join(command)}"
        )
