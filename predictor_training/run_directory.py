"""The run directory: what a training run resumes from, removed once the artifact is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_dejavu.predictor_training.forms import FittedMlp
from vllm_dejavu.predictor_training.samples import SampleStore
from vllm_dejavu.predictor_training.train import FittedHeads, FittedLayer


class RunDirectory:
    """What a run keeps while it is under way: state to resume from, metrics, plots.

    Attributes:
        path: of the directory. moments, calibration: files in it; samples: a directory, of stored
            activations; offload: one, of weights that fit nowhere else.
    """

    KEPT = ("metrics.jsonl", "plots")

    def __init__(self, path: Path):
        self.path, self._settings = path, path / "settings.json"
        self.moments, self.calibration = path / "moments.safetensors", path / "calibration.json"
        self.samples, self.offload = path / "samples", path / "offload"

    def open(self, key: dict[str, Any], *, restart: bool, resume: bool) -> None:
        """Make the directory, or take up an interrupted run in it.

        Raises:
            ValueError: with `resume`, nothing was interrupted here, or under other settings.
        """
        found = json.loads(self._settings.read_text(encoding="utf-8")) if self._settings.is_file() else None
        current = json.loads(json.dumps(key))
        if resume and found is None:
            raise ValueError(
                f"--resume: {self.path} holds no interrupted run. Leave the flag out to begin one."
            )
        if resume and found != current:
            differing = sorted(k for k in {*found, *current} if found.get(k) != current.get(k))
            raise ValueError(
                f"--resume: the interrupted run in {self.path} has other settings ({', '.join(differing)})."
                " Repeat its command, or pass --restart."
            )
        if restart or found != current:
            self._clear()
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        self._settings.write_text(json.dumps(key), encoding="utf-8")

    def discard_if_empty(self) -> None:
        """Leave nothing behind when no work was done yet."""
        if not any(p.name not in ("settings.json", "offload", *self.KEPT) for p in self.path.iterdir()):
            self.close()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def close(self) -> None:
        """Remove what only serves resuming."""
        self._clear()
        shutil.rmtree(self.offload, ignore_errors=True)

    def _clear(self) -> None:
        # By name: the directory may be the user's own, with other things in it. Not `offload`, which the
        # model may be using.
        for pattern in ("moments.*", "fitted-*", "calibration.*", "sampled.*", "settings.json"):
            for path in self.path.glob(pattern):
                path.unlink()
        SampleStore(self.samples, 0, False, False).clear()

    def _fitted(self, layers: range) -> Path:
        return self.path / f"fitted-{layers.start}-{layers.stop}.safetensors"

    def save_fitted(self, layers: range, key: dict[str, Any], fitted: dict[int, FittedLayer]) -> None:
        """The predictors of a pass; its moments are no longer needed."""
        tensors, explained = {}, {}
        for i, (mlp, heads) in fitted.items():
            tensors |= {f"{i}.mlp.{k}": getattr(mlp, k) for k in ("down", "up", "bias", "activation_rate")}
            tensors |= {f"{i}.heads.{k}": getattr(heads, k) for k in ("weight", "bias", "r2")}
            explained[i] = mlp.explained
        metadata = {"key": json.dumps(key, sort_keys=True), "explained": json.dumps(explained)}
        partial = self._fitted(layers).with_suffix(".partial")
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, partial, metadata=metadata)
        partial.replace(self._fitted(layers))
        self.moments.unlink(missing_ok=True)

    def load_fitted(self, layers: range, key: dict[str, Any]) -> dict[int, FittedLayer] | None:
        """What `save_fitted` kept under the same key."""
        path = self._fitted(layers)
        if not path.is_file():
            return None
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
        if metadata["key"] != json.dumps(key, sort_keys=True):
            return None
        tensors, explained = load_file(path), json.loads(metadata["explained"])

        def part(i: int, name: str) -> dict[str, torch.Tensor]:
            prefix = f"{i}.{name}."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        return {
            i: FittedLayer(
                FittedMlp(**part(i, "mlp"), explained=explained[str(i)]), FittedHeads(**part(i, "heads"))
            )
            for i in layers
        }
