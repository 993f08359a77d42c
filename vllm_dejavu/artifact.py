"""The predictor artifact: `dejavu.json` + `predictors.safetensors`, saved, loaded and verified here only.

The format is documented in docs/artifact.md. Nothing is unpickled and no remote code runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_dejavu import auto
from vllm_dejavu.config import LOOKAHEADS
from vllm_dejavu.families import family_of

FORMAT = "vllm-dejavu-predictor"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 2 added int8 predictors
MANIFEST_FILE = "dejavu.json"
TENSORS_FILE = "predictors.safetensors"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
FORMS = {"mlp": "low_rank", "attention": "linear"}
# Objects of the manifest that say how an artifact came about; nothing is computed from them.
RECORDS = ("training", "calibration", "versions")


class ArtifactError(ValueError):
    """An artifact is missing, damaged, or made for another model."""


@dataclass(frozen=True)
class ModelSpec:
    """What an artifact was made for.

    Attributes:
        fingerprint: "sha256:..." over samples of every weight (`WeightsFingerprint`).
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    ffn_dim: int
    num_heads: int
    activation: str
    layer_norm: str  # "pre" or "post"
    fingerprint: str

    @classmethod
    def from_hf_config(cls, config: Any, name: str, fingerprint: str = "") -> ModelSpec:
        """Of a transformers configuration.

        Raises:
            ValueError: its architecture is not supported.
        """
        family = family_of(config.architectures)
        geometry = family.geometry(config)
        return cls(
            name=name,
            architecture=family.architecture,
            num_layers=geometry.num_layers,
            hidden_size=geometry.hidden_size,
            ffn_dim=geometry.ffn_dim,
            num_heads=geometry.num_heads,
            activation=geometry.activation,
            layer_norm=geometry.norm,
            fingerprint=fingerprint,
        )


@dataclass(frozen=True)
class GateSpec:
    """One gate: the predictor and threshold of one block (mlp, attention) of one layer.

    Attributes:
        state: "sparse", or "dense": the layer's block is read whole and no predictor is kept for it.
        lookahead: hidden state that feeds the predictor (`predictor.gate_input`).
        rank: of the low-rank scorer; 0 for a linear one.
        density: calibrated share selected per token: {"mean", "upper"} (upper: 0.95 quantile over tokens).
        union_density: batch size (as a string) -> {"mean", "upper"} of the share selected by any row.
        oracle_density: share of truly active neurons or heads on the calibration text.
        recall: share of the truly active that the gate selects, on the calibration text.
        margin: MLP: added to the scores before they were scaled to integers; a record.
        threshold: attention: contribution norm above which a head counts as active.
    """

    state: str
    form: str = ""
    lookahead: str = "self"
    rank: int = 0
    dtype: str = "float16"
    density: dict[str, float] = field(default_factory=lambda: {"mean": 1.0, "upper": 1.0})
    union_density: dict[str, dict[str, float]] = field(default_factory=dict)
    oracle_density: float | None = None
    recall: float | None = None
    margin: float | None = None
    threshold: float | None = None

    @property
    def sparse(self) -> bool:
        return self.state == "sparse"

    def density_at(self, batch: int) -> float:
        """Share of units that any of `batch` rows selects; 1 for a dense gate.

        Between calibrated sizes: linear in log(batch). Beyond the largest: as if groups of that many rows
        chose independently.
        """
        if not self.sparse:
            return 1.0
        table = {int(size): density["mean"] for size, density in self.union_density.items()} | {
            1: self.density["mean"]
        }
        below = max(size for size in table if size <= batch)
        above = min((size for size in table if size > batch), default=None)
        if above is None:
            return 1 - (1 - table[below]) ** (batch / below)
        share = math.log(batch / below) / math.log(above / below)
        return table[below] + share * (table[above] - table[below])


@dataclass(frozen=True)
class Manifest:
    """`dejavu.json`. `layers[l][block]` is the gate of a block; `training`, `calibration`, `versions` are
    records.
    """

    model: ModelSpec
    layers: tuple[dict[str, GateSpec], ...]
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self, tensors_sha256: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": dataclasses.asdict(self.model),
            "tensors": {"file": TENSORS_FILE, "sha256": tensors_sha256},
            "layers": [{b: dataclasses.asdict(g) for b, g in layer.items()} for layer in self.layers],
            "training": self.training,
            "calibration": self.calibration,
            "versions": self.versions,
        }


def gate_tensors(
    spec: GateSpec, block: str, model: ModelSpec
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names (below `layers.N.BLOCK.`), dtypes and shapes of a gate's tensors; a dense gate has none."""
    if not spec.sparse:
        return {}
    units = model.ffn_dim if block == "mlp" else model.num_heads
    weights = DTYPES[spec.dtype]
    tensors = {"bias": (torch.float32, (units,)), "activation_rate": (torch.float32, (units,))}
    if block == "mlp":
        tensors |= {"down": (weights, (spec.rank, model.hidden_size)), "up": (weights, (units, spec.rank))}
    else:
        tensors |= {"weight": (weights, (units, model.hidden_size))}
    return tensors


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
    reader = _Reader(path)
    top = reader.object(raw, "the manifest")
    if top.get("format") != FORMAT:
        raise reader.error("format", top.get("format"), repr(FORMAT))
    version = top.get("format_version")
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise ArtifactError(
            f"{path}: expected format_version {' or '.join(map(str, READABLE_VERSIONS))}, found {version!r}. "
            "Install the vllm-dejavu version that wrote it, or train again."
        )
    reader.keys(
        top,
        "the manifest",
        required=("format", "format_version", "model", "tensors", "layers"),
        optional=RECORDS,
    )
    model = reader.model(top["model"])
    layers = reader.layers(top["layers"], model)
    tensors = reader.object(top["tensors"], "tensors")
    reader.keys(tensors, "tensors", required=("file", "sha256"))
    sha256 = tensors["sha256"]
    if tensors["file"] != TENSORS_FILE:
        raise reader.error("tensors.file", tensors["file"], repr(TENSORS_FILE))
    if not isinstance(sha256, str):
        raise reader.error("tensors.sha256", sha256, "a string")
    records = {k: reader.object(top.get(k, {}), k) for k in RECORDS}
    return Manifest(model=model, layers=layers, **records), sha256


def check_model(manifest: Manifest, expected: ModelSpec) -> None:
    """Refuse an artifact of another geometry; `expected` comes from the model about to be served.

    Raises:
        ArtifactError: naming the first field that differs.
    """
    for key in (
        "architecture",
        "num_layers",
        "hidden_size",
        "ffn_dim",
        "num_heads",
        "activation",
        "layer_norm",
    ):
        have, want = getattr(manifest.model, key), getattr(expected, key)
        if have != want:
            raise ArtifactError(
                f"Predictor artifact was made for {manifest.model.name} with {key}={have!r}; model"
                f" {expected.name} has "
                f'{key}={want!r}. Retrain it, or point additional_config["dejavu"]["predictor"] at this'
                " model's artifact."
            )


def check_fingerprint(manifest: Manifest, found: str, name: str) -> None:
    """Refuse an artifact trained on other weights of the same geometry.

    Raises:
        ArtifactError: with both fingerprints.
    """
    if manifest.model.fingerprint != found:
        raise ArtifactError(
            f"Predictor artifact was trained on the weights of {manifest.model.name}"
            f" ({manifest.model.fingerprint}); the weights of {name} have {found}. Predictors of other"
            " weights select the wrong neurons: retrain it with vllm-dejavu train, or point the predictor"
            " setting at this model's artifact."
        )


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
            f"No predictor artifact: looked for {directory / MANIFEST_FILE}. Make one (vllm-dejavu train"
            f" --model {model} --data FILE --output {directory}), or name one with"
            ' additional_config={"dejavu": {"predictor": PATH_OR_HUB_ID}}; "auto" there makes one'
            " without data."
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


def _check_tensors(
    place: Path, manifest: Manifest, found: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    expected = {
        f"layers.{i}.{block}.{name}": form
        for i, layer in enumerate(manifest.layers)
        for block, spec in layer.items()
        for name, form in gate_tensors(spec, block, manifest.model).items()
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


class _Reader:
    """Checks of a manifest's values; every error names file, key, value and what is allowed."""

    def __init__(self, path: Path):
        self.path = path

    def error(self, key: str, value: Any, allowed: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: {key} should be {allowed}, found {value!r}. Copy the artifact again or train"
            " again."
        )

    def object(self, value: Any, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return value

    def number(
        self, value: Any, key: str, low: float, high: float, *, optional: bool = False
    ) -> float | None:
        if value is None and optional:
            return None
        if (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high
        ):  # false for NaN
            raise self.error(key, value, f"a number in [{low}, {high}]")
        return float(value)

    def integer(self, value: Any, key: str, low: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.error(key, value, f"an integer >= {low}")
        return value

    def choice(self, value: Any, key: str, choices: Iterable[str]) -> str:
        if not isinstance(value, str) or value not in choices:
            raise self.error(key, value, f"one of {sorted(choices)}")
        return value

    def keys(
        self, raw: dict[str, Any], key: str, required: Iterable[str], optional: Iterable[str] = ()
    ) -> None:
        known = {*required, *optional}
        for name in sorted(raw.keys() - known):
            raise self.error(f"{key}.{name}", raw[name], f"absent (allowed keys: {sorted(known)})")
        for name in sorted(set(required) - raw.keys()):
            raise self.error(f"{key}.{name}", None, "present")

    def fields(self, cls: type, raw: dict[str, Any], key: str) -> None:
        fields = dataclasses.fields(cls)
        required = [
            f.name
            for f in fields
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        self.keys(raw, key, required, [f.name for f in fields])

    def model(self, value: Any) -> ModelSpec:
        raw = self.object(value, "model")
        self.fields(ModelSpec, raw, "model")
        for name in ("num_layers", "hidden_size", "ffn_dim", "num_heads"):
            self.integer(raw[name], f"model.{name}", 1)
        for name in ("name", "architecture", "activation", "fingerprint"):
            if not isinstance(raw[name], str):
                raise self.error(f"model.{name}", raw[name], "a string")
        self.choice(raw["layer_norm"], "model.layer_norm", ("pre", "post"))
        return ModelSpec(**raw)

    def layers(self, value: Any, model: ModelSpec) -> tuple[dict[str, GateSpec], ...]:
        if not isinstance(value, list) or len(value) != model.num_layers:
            found = f"a list of {len(value)}" if isinstance(value, list) else value
            raise self.error("layers", found, f"a list of {model.num_layers} layers")
        out = []
        for i, layer in enumerate(value):
            raw = self.object(layer, f"layers[{i}]")
            if set(raw) != set(FORMS):
                raise self.error(f"layers[{i}]", sorted(raw), f"an object with the keys {sorted(FORMS)}")
            out.append(
                {block: self.gate(raw[block], f"layers[{i}].{block}", block, i, model) for block in FORMS}
            )
        return tuple(out)

    def gate(self, value: Any, key: str, block: str, layer: int, model: ModelSpec) -> GateSpec:
        raw = self.object(value, key)
        self.fields(GateSpec, raw, key)
        self.choice(raw["state"], f"{key}.state", ("sparse", "dense"))
        for name in ("oracle_density", "recall"):
            self.number(raw.get(name), f"{key}.{name}", 0, 1, optional=True)
        if raw["state"] == "dense":
            return GateSpec(state="dense", oracle_density=raw.get("oracle_density"))
        self.choice(raw.get("form"), f"{key}.form", (FORMS[block],))
        self.choice(raw.get("lookahead"), f"{key}.lookahead", LOOKAHEADS[block])
        if raw["lookahead"] == "previous" and layer == 0:
            raise self.error(f"{key}.lookahead", "previous", "'self' (no layer lies before layer 0)")
        self.choice(raw.get("dtype"), f"{key}.dtype", DTYPES)
        if block == "mlp":
            self.integer(raw.get("rank"), f"{key}.rank", 1)
        elif raw.get("rank", 0) != 0:
            raise self.error(f"{key}.rank", raw["rank"], "0 (a linear scorer has no rank)")
        self.densities(raw.get("density"), f"{key}.density")
        union = self.object(raw.get("union_density", {}), f"{key}.union_density")
        for batch, densities in union.items():
            if not re.fullmatch("[1-9][0-9]{0,3}", batch):  # every size up to it is tried at start-up
                raise self.error(f"{key}.union_density", batch, "an object keyed by batch sizes below 10000")
            self.densities(densities, f"{key}.union_density[{batch}]")
        for name in ("margin", "threshold"):
            self.number(
                raw.get(name), f"{key}.{name}", -1e30, 1e30, optional=block == "mlp" or name == "margin"
            )
        return GateSpec(**raw)

    def densities(self, value: Any, key: str) -> None:
        raw = self.object(value, key)
        if set(raw) != {"mean", "upper"}:
            raise self.error(key, raw, "an object with the keys ['mean', 'upper']")
        for name in raw:
            self.number(raw[name], f"{key}.{name}", 0, 1)
