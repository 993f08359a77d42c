"""Predictor artifacts on disk: saved, loaded, and compared with the weights that they were made for.

What the manifest may say is in `manifest`. Nothing is unpickled and no remote code runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_dejavu.manifest import (
    MANIFEST_FILE,
    PREDICTOR_DTYPES,
    TENSORS_FILE,
    ArtifactError,
    GateSpec,
    Manifest,
    gate_tensors,
)

DTYPES = {name: getattr(torch, name) for name in PREDICTOR_DTYPES}


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: its manifest and its tensors, `layers.N.BLOCK.NAME` -> tensor on the CPU."""

    manifest: Manifest
    tensors: dict[str, torch.Tensor]
    digest: str

    def gate(self, layer: int, block: str) -> tuple[GateSpec, dict[str, torch.Tensor]]:
        """The gate of a block of a layer and its tensors by their short names."""
        spec = self.manifest.layers[layer][block]
        prefix = f"layers.{layer}.{block}."
        return spec, {
            name: self.tensors[prefix + name] for name in gate_tensors(spec, block, self.manifest.model)
        }


def save(
    directory: str | os.PathLike,
    manifest: Manifest,
    tensors: dict[str, torch.Tensor],
    *,
    overwrite: bool = False,
) -> Artifact:
    """Write an artifact, all or nothing.

    Everything is written to a temporary directory and renamed: a reader sees a whole artifact or none.

    Raises:
        ArtifactError: the directory holds an artifact (and `overwrite` is false), or the tensors do not fit
        the manifest. OSError: the place cannot be written.
    """
    directory = Path(directory)
    check_output(directory, overwrite=overwrite)
    # Inside a directory that exists: its parent may be read-only, or another file system, where no rename
    # reaches.
    place = directory if directory.is_dir() else directory.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=place))
    try:
        _check_tensors(directory, manifest, {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()})
        _check_finite(directory, tensors)
        save_file({k: v.contiguous() for k, v in sorted(tensors.items())}, staging / TENSORS_FILE)
        text = json.dumps(manifest.to_json(_sha256(staging / TENSORS_FILE)), indent=1, ensure_ascii=False)
        (staging / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
        # mkdtemp and safetensors make what they write private to the user who trained.
        os.chmod(staging, 0o755)
        os.chmod(staging / TENSORS_FILE, 0o644)
        artifact = load(staging)
        if directory.is_dir():
            # A model card or plots beside the artifact stay; only our two files are replaced, the manifest
            # last: between the two renames its sha256 does not fit, which `load` refuses.
            os.replace(staging / TENSORS_FILE, directory / TENSORS_FILE)
            os.replace(staging / MANIFEST_FILE, directory / MANIFEST_FILE)
        else:
            os.rename(staging, directory)
        return artifact
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(directory: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Refuse a place that `save` could not write, before hours of work are spent.

    Raises:
        ArtifactError: as `save`. OSError: the place cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ArtifactError(f"Output {directory} is a file; name a directory.")
    if (directory / MANIFEST_FILE).exists() and not overwrite:
        raise ArtifactError(
            f"{directory} already holds a predictor artifact. Name another --output or pass --overwrite."
        )
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as e:
        raise PermissionError(
            f"Output {directory} cannot be written ({e.strerror}: {place}). Name another --output."
        ) from e


def load(directory: str | os.PathLike) -> Artifact:
    """Read and verify an artifact.

    Raises:
        ArtifactError: missing, truncated, of another format version, with missing or extra tensors, wrong
            shapes or values that are not finite; the message says what was expected, found, and what to do.
    """
    directory = Path(directory)
    manifest, recorded_sha256 = load_manifest(directory)
    path = directory / TENSORS_FILE
    if not path.is_file():
        raise ArtifactError(
            f"Predictor artifact {directory} has no {TENSORS_FILE}. Copy it there or train again."
        )
    try:
        sha256 = _sha256(path)
        with safe_open(path, "pt") as f:
            names = list(f.keys())
            tensors = {name: f.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as e:
        raise ArtifactError(
            f"{path} cannot be read as safetensors ({e}); it is damaged or cut short. Copy it again or train"
            " again."
        ) from e
    _check_tensors(directory, manifest, {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()})
    _check_finite(directory, tensors)
    if sha256 != recorded_sha256:
        raise ArtifactError(
            f"{path}: the manifest expects sha256 {recorded_sha256}, found {sha256}. "
            "The two files are not of the same artifact; copy both again or train again."
        )
    manifest_bytes = (directory / MANIFEST_FILE).read_bytes()
    digest = hashlib.sha256(manifest_bytes + sha256.encode()).hexdigest()
    return Artifact(manifest, tensors, digest)


def load_manifest(directory: str | os.PathLike) -> tuple[Manifest, str]:
    """Read and verify `dejavu.json` alone. Returns the manifest and the recorded sha256 of the tensors' file.

    Raises:
        ArtifactError: as `load`.
    """
    path = Path(directory) / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(
            f"No predictor artifact at {directory}: expected {MANIFEST_FILE} there. "
            'Point additional_config["dejavu"]["predictor"] at an artifact, or make one: '
            "vllm-dejavu train --model MODEL --data FILE --output DIR"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError(f"{path} cannot be read as JSON ({e}). Copy it again or train again.") from e
    return Manifest.from_json(raw, str(path))


class WeightsFingerprint:
    """A digest of a checkpoint, from samples of every tensor, whatever the order and file format.

    Feed each checkpoint tensor once through `add` (or a loader's stream through `tee`). Values enter as
    float32, so a 16-bit checkpoint read in 16 or 32 bits gives the same digest. Tied output embeddings are
    left out, because some checkpoints store them and some do not. 512 evenly spaced values of each tensor
    keep it fast at any size; an edit that misses all of them is not seen.
    """

    SAMPLES = 512

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        name = name.removeprefix("model.").removeprefix("decoder.")
        if name.startswith("lm_head."):
            return
        flat = tensor.detach().reshape(-1)
        # In integers: rounding of a floating-point spacing would depend on who computes it.
        count = min(self.SAMPLES, flat.numel())
        index = torch.arange(count, device="cpu") * (flat.numel() - 1) // max(count - 1, 1)
        values = flat[index.to(flat.device)].to("cpu", torch.float32).contiguous()
        head = f"{name}|{tuple(tensor.shape)}|".encode()
        self._digests[name] = hashlib.sha256(head + values.numpy().tobytes()).digest()

    def tee(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.add(name, tensor)
            yield name, tensor

    @property
    def names(self) -> set[str]:
        return set(self._digests)

    def hexdigest(self) -> str:
        total = hashlib.sha256()
        for name in sorted(self._digests):
            total.update(name.encode() + b"\0" + self._digests[name])
        return "sha256:" + total.hexdigest()


def _check_tensors(
    place: Path, manifest: Manifest, found: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    expected = {
        f"layers.{i}.{block}.{name}": (DTYPES[dtype], shape)
        for i, layer in enumerate(manifest.layers)
        for block, spec in layer.items()
        for name, (dtype, shape) in gate_tensors(spec, block, manifest.model).items()
    }
    for what, names in (
        ("misses", expected.keys() - found.keys()),
        ("has unexpected", found.keys() - expected.keys()),
    ):
        if names:
            raise ArtifactError(
                f"Predictor artifact {place} {what} {len(names)} tensor(s), first {sorted(names)[0]!r}:"
                f" expected {len(expected)} tensors, found {len(found)}. Copy it again or train again."
            )
    for name, form in expected.items():
        if found[name] != form:
            raise ArtifactError(
                f"Predictor artifact {place}: tensor {name!r} should be {form[0]} {list(form[1])}, "
                f"found {found[name][0]} {list(found[name][1])}. Copy it again or train again."
            )


def _check_finite(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ArtifactError(
                f"Predictor artifact {place}: {bad} values of {name!r} are not finite. Train again."
            )


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
