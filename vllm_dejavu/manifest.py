"""The manifest of a predictor artifact: what `dejavu.json` may say, and every check of it. Reads no file.

The format is documented in docs/artifact.md. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm_dejavu.config import BLOCKS, LOOKAHEADS
from vllm_dejavu.families import family_of

FORMAT = "vllm-dejavu-predictor"
FORMAT_VERSION = 3
# 2 added int8 predictors; 3 the sizes of grouped-query attention, gated MLPs and layers that lack a block.
READABLE_VERSIONS = (1, 2, 3)
MANIFEST_FILE = "dejavu.json"
TENSORS_FILE = "predictors.safetensors"
PREDICTOR_DTYPES = ("bfloat16", "float16", "float32", "int8")  # torch's names
FORMS = {"mlp": "low_rank", "attention": "linear"}
# Objects of the manifest that say how an artifact came about; nothing is computed from them.
RECORDS = ("training", "calibration", "versions")
# What two models must have in common for one's predictors to fit the other.
GEOMETRY = (
    "architecture",
    "num_layers",
    "hidden_size",
    "ffn_dim",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "activation",
    "gated",
    "layer_norm",
)
NEW_IN_3 = ("num_kv_heads", "head_size", "gated")


class ArtifactError(ValueError):
    """An artifact is missing, damaged, or made for another model."""


@dataclass(frozen=True)
class ModelSpec:
    """What an artifact was made for.

    Attributes:
        gated: whether the MLP multiplies two projections. layer_norm: "pre" or "post".
        fingerprint: "sha256:..." over samples of every weight (`artifact.WeightsFingerprint`).
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    activation: str
    gated: bool
    layer_norm: str
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
            num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size,
            activation=geometry.activation,
            gated=geometry.gated,
            layer_norm=geometry.norm,
            fingerprint=fingerprint,
        )

    def units(self, block: str) -> int:
        """What a gate of a block selects among in a layer: neurons or query heads."""
        return self.ffn_dim if block == "mlp" else self.num_heads


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
    """`dejavu.json`.

    Attributes:
        layers: of each layer, the gates of the blocks that it has: {"mlp" or "attention": gate}.
        training, calibration, versions: records, of which nothing is computed.
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

    @classmethod
    def from_json(cls, raw: Any, source: str) -> tuple[Manifest, str]:
        """Verify what `dejavu.json` holds. Returns the manifest and the recorded sha256 of the tensors' file.

        Args:
            source: the file's path, for messages.

        Raises:
            ArtifactError: of another format version, or anything in it is not as it should be.
        """
        reader = _Reader(source)
        top = reader.object(raw, "the manifest")
        if top.get("format") != FORMAT:
            raise reader.error("format", top.get("format"), repr(FORMAT))
        version = top.get("format_version")
        if type(version) is not int or version not in READABLE_VERSIONS:
            readable = f"{', '.join(map(str, READABLE_VERSIONS[:-1]))} or {READABLE_VERSIONS[-1]}"
            raise ArtifactError(
                f"{source}: expected format_version {readable}, found {version!r}. Install the vllm-dejavu"
                " version that wrote it, or train again."
            )
        reader.keys(
            top,
            "the manifest",
            required=("format", "format_version", "model", "tensors", "layers"),
            optional=RECORDS,
        )
        model = reader.model(top["model"], version)
        layers = reader.layers(top["layers"], model, version)
        tensors = reader.object(top["tensors"], "tensors")
        reader.keys(tensors, "tensors", required=("file", "sha256"))
        sha256 = tensors["sha256"]
        if tensors["file"] != TENSORS_FILE:
            raise reader.error("tensors.file", tensors["file"], repr(TENSORS_FILE))
        if not isinstance(sha256, str):
            raise reader.error("tensors.sha256", sha256, "a string")
        records = {k: reader.object(top.get(k, {}), k) for k in RECORDS}
        return cls(model=model, layers=layers, **records), sha256


def gate_tensors(spec: GateSpec, block: str, model: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names (below `layers.N.BLOCK.`), dtypes and shapes of a gate's tensors; a dense gate has none."""
    if not spec.sparse:
        return {}
    units = model.units(block)
    tensors = {"bias": ("float32", (units,)), "activation_rate": ("float32", (units,))}
    if block == "mlp":
        return tensors | {
            "down": (spec.dtype, (spec.rank, model.hidden_size)),
            "up": (spec.dtype, (units, spec.rank)),
        }
    return tensors | {"weight": (spec.dtype, (units, model.hidden_size))}


def check_model(manifest: Manifest, expected: ModelSpec) -> None:
    """Refuse an artifact of another geometry; `expected` comes from the model about to be served.

    Raises:
        ArtifactError: naming the first field that differs.
    """
    for key in GEOMETRY:
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


class _Reader:
    """Checks of a manifest's values; every error names file, key, value and what is allowed."""

    def __init__(self, source: str):
        self.source = source

    def error(self, key: str, value: Any, allowed: str) -> ArtifactError:
        return ArtifactError(
            f"{self.source}: {key} should be {allowed}, found {value!r}. Copy the artifact again or train"
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

    def model(self, value: Any, version: int) -> ModelSpec:
        raw = self.object(value, "model")
        if version < 3:  # every model had as many KV heads as heads, and one projection in front of its ReLU
            self.keys(raw, "model", [f.name for f in dataclasses.fields(ModelSpec) if f.name not in NEW_IN_3])
            for name in ("hidden_size", "num_heads"):
                self.integer(raw[name], f"model.{name}", 1)
            head_size = raw["hidden_size"] // raw["num_heads"]
            raw = {**raw, "num_kv_heads": raw["num_heads"], "head_size": head_size, "gated": False}
        self.fields(ModelSpec, raw, "model")
        for name in ("num_layers", "hidden_size", "ffn_dim", "num_heads", "num_kv_heads", "head_size"):
            self.integer(raw[name], f"model.{name}", 1)
        if raw["num_heads"] % raw["num_kv_heads"]:
            raise self.error("model.num_kv_heads", raw["num_kv_heads"], f"a divisor of {raw['num_heads']}")
        for name in ("name", "architecture", "activation", "fingerprint"):
            if not isinstance(raw[name], str):
                raise self.error(f"model.{name}", raw[name], "a string")
        if not isinstance(raw["gated"], bool):
            raise self.error("model.gated", raw["gated"], "true or false")
        self.choice(raw["layer_norm"], "model.layer_norm", ("pre", "post"))
        return ModelSpec(**raw)

    def layers(self, value: Any, model: ModelSpec, version: int) -> tuple[dict[str, GateSpec], ...]:
        if not isinstance(value, list) or len(value) != model.num_layers:
            found = f"a list of {len(value)}" if isinstance(value, list) else value
            raise self.error("layers", found, f"a list of {model.num_layers} layers")
        out = []
        for i, layer in enumerate(value):
            raw = self.object(layer, f"layers[{i}]")
            if not set(raw) <= set(BLOCKS) or (version < 3 and set(raw) != set(BLOCKS)):
                allowed = f"keys {sorted(BLOCKS)}" if version < 3 else f"keys out of {sorted(BLOCKS)}"
                raise self.error(f"layers[{i}]", sorted(raw), f"an object with the {allowed}")
            out.append({b: self.gate(raw[b], f"layers[{i}].{b}", b, i, model) for b in BLOCKS if b in raw})
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
        self.choice(raw.get("dtype"), f"{key}.dtype", PREDICTOR_DTYPES)
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
