"""Will contextual sparsity pay? Predicted gain and memory cost of one model on one GPU.

The gain is what the launch-and-bytes MODEL (`roofline`) makes of an artifact's densities, or of assumed ones.
Nothing here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_dejavu import artifact, locate, roofline
from vllm_dejavu.artifact import DTYPES
from vllm_dejavu.families import Geometry, geometry_of
from vllm_dejavu.manifest import (
    MANIFEST_FILE,
    ArtifactError,
    GateSpec,
    Manifest,
    ModelSpec,
    check_model,
    gate_tensors,
)
from vllm_dejavu.published import DEVICES, GEOMETRIES, preset_densities
from vllm_dejavu.roofline import DENSE_LAUNCHES, Account, Device, Workload, num_weights
from vllm_dejavu.sizes import WEIGHT_BYTES, default_rank

Layers = Sequence[dict[str, GateSpec]]

# Beside the dense layer's launches. A gated MLP: predictor down, predictor up + select, and no ReLU; gated
# heads: no merge of the splits; their scores take a launch unless they ride along (docs/kernels.md).
MLP_GATE_LAUNCHES, HEAD_GATE_LAUNCHES, HEAD_SCORE_LAUNCHES = 2 - 1, -1, 1
SMALLEST_MEASURED_HIDDEN = 2048
LARGEST_MODELLED_BATCH = 64

# What `vllm-dejavu train` makes where nothing else is named; a test compares.
PREDICTOR_DTYPE, HEAD_LOOKAHEAD = "int8", "previous"
FEWER_BITS = (8, 4)  # of the layers' weights, beside 16
SERVED = {8: "INT8 is served here on a CPU only", 4: "INT4 is served here on a CPU only"}


def plan(
    model: str,
    gpu: str,
    *,
    batch: int = 1,
    context: int = 256,
    predictor: str | None = None,
    tp: int = 1,
) -> dict[str, Any]:
    """Everything that `report` prints, as JSON values; units end the names.

    Args:
        model: directory, hub id, or a published size ("6.7b", "opt-6.7b").
        predictor: directory or hub id of an artifact; None looks in MODEL/dejavu and else assumes densities.

    Raises:
        ValueError: an unknown GPU or model, a model or artifact that would not be served, a point out of
        range.
    """
    device = find_device(gpu)
    if batch < 1 or context < 1 or tp < 1:
        raise ValueError(f"--batch {batch}, --context {context}, --tp {tp}: each must be at least 1.")
    geometry, spec = find_model(model)
    if context > geometry.max_positions:
        raise ValueError(
            f"--context {context} is beyond the {geometry.max_positions} positions of {model}; take fewer"
            " tokens."
        )
    manifest, source = find_artifact(model, predictor, spec)
    notes = []
    if manifest is None:
        layers, assumption = assumed_layers(geometry, batch)
        source = f"{source}; assumed: {assumption}"
        if geometry.hidden_size < SMALLEST_MEASURED_HIDDEN:
            source = f"{source}; assumed, unsupported by any measurement of a model this small"
    else:
        layers = manifest.layers
        largest = largest_calibrated_batch(layers)
        if batch > largest:
            notes.append(
                f"batch {batch} is beyond the largest calibrated ({largest}); taken as if the further rows"
                " chose independently, an upper bound"
            )
    if batch > LARGEST_MODELLED_BATCH:
        notes.append(f"batch {batch}: arithmetic, which the model leaves out, begins to matter")
    workloads = layer_workloads(layers, batch, context, tp)
    step = decode_step(geometry, device, workloads)
    fewer_bits = {}
    for bits in FEWER_BITS:
        small = [replace(w, dense_weight_bits=bits, sparse_weight_bits=bits) for w in workloads]
        quantized = decode_step(geometry, device, small)
        fewer_bits[f"int{bits}"] = {
            "dense_ms": quantized.dense_us / 1e3,
            "sparse_ms": quantized.sparse_us / 1e3,
            "assumptions": list(roofline.QUANTIZATION_ASSUMPTIONS),
        }
    dominant, dominant_us = max(step.sparse_terms_us.items(), key=lambda term: term[1])
    memory = memory_cost(geometry, spec, device, layers, step, tp)
    if not memory["fits"]:
        notes.append(
            f"DOES NOT FIT: {memory['needed_bytes'] / 1e9:.0f} of {device.memory_gb:.0f} GB on each GPU"
        )
    count = len(layers)
    return {
        "kind": "model",
        "banner": roofline.BANNER,
        "model": {
            "name": model,
            "hidden_size": geometry.hidden_size,
            "num_layers": count,
            "num_heads": geometry.num_heads,
        },
        "gpu": device.name,
        "batch": batch,
        "context": context,
        "tp": tp,
        "densities": {
            "from": source,
            "mlp_mean": sum(w.mlp_density for w in workloads) / count,
            "head_mean": sum(w.head_density for w in workloads) / count,
            "head_union_mean": sum(w.union_heads for w in workloads) / count,
            "mlp_gates": sum(layer["mlp"].sparse for layer in layers),
            "head_gates": sum(layer["attention"].sparse for layer in layers),
        },
        "step": {
            "dense_ms": step.dense_us / 1e3,
            "sparse_ms": step.sparse_us / 1e3,
            "speedup": step.speedup,
            "dominant": dominant,
            "dominant_share": dominant_us / step.sparse_us,
            "break_even_mlp_density": break_even(geometry, device, layers, workloads),
            **fewer_bits,
            "dense_launches_per_layer": len(DENSE_LAUNCHES),
            "sparse_launches_per_layer": sum(w.sparse_launches for w in workloads) / count,
        },
        "memory": memory,
        "notes": notes,
    }


# The model and its densities.


def find_device(gpu: str) -> Device:
    if gpu.lower() not in DEVICES:
        raise ValueError(f"--gpu {gpu!r} is unknown: expected one of {', '.join(DEVICES)}.")
    return DEVICES[gpu.lower()]


def find_model(model: str) -> tuple[Geometry, ModelSpec]:
    """Geometry of a model, from its config.json or of a published size, and the form artifacts know it by.

    Raises:
        ValueError: nothing is there, or it would not be served.
    """
    from transformers import AutoConfig, OPTConfig

    size, sizes = model.lower().removeprefix("opt-"), ", ".join(GEOMETRIES)
    if (Path(model) / "config.json").is_file():
        config = AutoConfig.from_pretrained(model)
    elif Path(model).is_dir():
        raise ValueError(f"Model {model} has no config.json; name the directory of a checkpoint.")
    elif size in GEOMETRIES:
        g = GEOMETRIES[size]
        config = OPTConfig(
            architectures=["OPTForCausalLM"],
            hidden_size=g.hidden_size,
            ffn_dim=g.ffn_dim,
            num_hidden_layers=g.num_layers,
            num_attention_heads=g.num_heads,
            vocab_size=g.vocab_size,
            max_position_embeddings=g.max_positions,
        )
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(
            f"Model {model}: no such directory, not a hub id (ORG/NAME), and none of the known sizes {sizes}."
        )
    else:
        try:
            config = AutoConfig.from_pretrained(model)
        except OSError as e:
            raise ValueError(
                f"Model {model}: no such directory, and the hub gave no config ({e}). Known without the hub:"
                f" {sizes}."
            ) from e
    return geometry_of(config), ModelSpec.from_hf_config(config, model)


def find_artifact(model: str, predictor: str | None, spec: ModelSpec) -> tuple[Manifest | None, str]:
    """The artifact's manifest, None where none was named and none is found, and in words which.

    Raises:
        ArtifactError: the one named is missing, damaged, or of another geometry.
    """
    if predictor is not None:
        directory = locate.resolve(predictor, model)
    elif Path(model).is_dir():
        directory = Path(model) / "dejavu"
    elif "/" in model:
        try:
            directory = locate.resolve(None, model)
        except ArtifactError:
            return None, f"no artifact found at {model}/dejavu"
    else:
        return None, "no artifact named"
    if predictor is None and not (directory / MANIFEST_FILE).is_file():
        return None, f"no artifact at {model}/dejavu"
    manifest, _ = artifact.load_manifest(directory)
    check_model(manifest, spec)
    return manifest, f"artifact {predictor or directory}, calibrated"


def assumed_layers(geometry: Geometry, batch: int) -> tuple[Layers, str]:
    """Gates as training makes them by default, with the densities of the nearest size that has any; and their
    source.
    """
    name = min(GEOMETRIES, key=lambda n: abs(math.log(GEOMETRIES[n].hidden_size / geometry.hidden_size)))
    alone, heads, _ = preset_densities(name, 1)
    union, _, source = preset_densities(name, batch)
    mlp = GateSpec(
        state="sparse",
        form="low_rank",
        rank=default_rank(geometry.hidden_size, geometry.ffn_dim, DTYPES[PREDICTOR_DTYPE].itemsize),
        dtype=PREDICTOR_DTYPE,
        density={"mean": alone, "upper": alone},
        union_density={str(batch): {"mean": union, "upper": union}},
    )
    attention = GateSpec(
        state="sparse",
        form="linear",
        lookahead=HEAD_LOOKAHEAD,
        dtype=PREDICTOR_DTYPE,
        density={"mean": heads, "upper": heads},
    )
    first = {"mlp": mlp, "attention": replace(attention, lookahead="self")}  # no layer lies before it
    nearest = "" if GEOMETRIES[name].hidden_size == geometry.hidden_size else f"nearest size {name}: "
    return [
        first,
        *[{"mlp": mlp, "attention": attention}] * (geometry.num_layers - 1),
    ], nearest + source.removeprefix("assumed: ")


def largest_calibrated_batch(layers: Layers) -> int:
    """Largest batch size that every gate has a density for."""
    gates = [gate for layer in layers for gate in layer.values() if gate.sparse]
    return min((max([1, *map(int, gate.union_density)]) for gate in gates), default=1)


# The gain.


@dataclass(frozen=True)
class Step:
    """A decode step summed over layers, each with its own account."""

    accounts: tuple[Account, ...]

    @property
    def outer_us(self) -> float:
        return self.accounts[0].outer_us

    @property
    def dense_us(self) -> float:
        return self.outer_us + sum(a.dense_us for a in self.accounts)

    @property
    def sparse_us(self) -> float:
        return sum(self.sparse_terms_us.values())

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us

    @property
    def sparse_terms_us(self) -> dict[str, float]:
        terms = {
            name: sum(a.sparse_terms_us[name] for a in self.accounts)
            for name in self.accounts[0].sparse_terms_us
        }
        return terms | {"embeddings, lm_head, sampling": self.outer_us}


def layer_workloads(layers: Layers, batch: int, context: int, tp: int) -> list[Workload]:
    """What each layer reads in a step; a dense block has density 1 and no predictor."""
    workloads = []
    for i, layer in enumerate(layers):
        mlp, heads = layer["mlp"], layer["attention"]
        before = layers[i - 1]["mlp"] if i else None
        rides = (
            heads.lookahead == "previous"
            and before is not None
            and before.sparse
            and before.lookahead == "self"
        )
        launches = len(DENSE_LAUNCHES) + mlp.sparse * MLP_GATE_LAUNCHES
        launches += heads.sparse * (HEAD_GATE_LAUNCHES + (0 if rides else HEAD_SCORE_LAUNCHES))
        head_density = _share(heads.density["mean"]) if heads.sparse else 1.0
        workloads.append(
            Workload(
                batch=batch,
                context=context,
                tp=tp,
                dtype_bytes=WEIGHT_BYTES,
                mlp_density=_share(mlp.density_at(batch)),
                head_density=head_density,
                # Both are means over samples: at small batches the union's may lie outside of what the other
                # allows.
                head_union_density=min(1.0, batch * head_density, max(head_density, heads.density_at(batch))),
                predictor_rank=mlp.rank if mlp.sparse else 0,
                predictor_dtype_bytes=DTYPES[(mlp if mlp.sparse else heads).dtype].itemsize,
                sparse_launches=launches,
            )
        )
    return workloads


def _share(density: float) -> float:
    return min(1.0, max(1e-6, density))


def decode_step(geometry: Geometry, device: Device, workloads: Sequence[Workload]) -> Step:
    made = {w: roofline.account(geometry, device, w) for w in dict.fromkeys(workloads)}
    return Step(tuple(made[w] for w in workloads))


def break_even(
    geometry: Geometry, device: Device, layers: Layers, workloads: Sequence[Workload]
) -> float | None:
    """MLP density of every gated MLP at which the sparse step takes as long as the dense one; heads stay as
    they are.

    Above 1 sparse is faster at any density, below 0 at none; None without a gated MLP.
    """
    if not any(layer["mlp"].sparse for layer in layers):
        return None

    def at(density: float) -> Step:
        return decode_step(
            geometry,
            device,
            [
                replace(w, mlp_density=density) if layer["mlp"].sparse else w
                for w, layer in zip(workloads, layers, strict=True)
            ],
        )

    half, full = at(0.5), at(1.0)  # the time is linear in the density
    return 1.0 + (full.dense_us - full.sparse_us) / (2 * (full.sparse_us - half.sparse_us))


# The memory.


def predictor_bytes(layers: Layers, spec: ModelSpec, tp: int = 1) -> int:
    """Of all predictors on one rank; ranks split neurons and heads, each has a whole down-projection."""
    total = 0
    for layer in layers:
        for block, gate in layer.items():
            for name, (dtype, shape) in gate_tensors(gate, block, spec).items():
                total += math.prod(shape) * DTYPES[dtype].itemsize // (1 if name == "down" else tp)
    return total


def memory_cost(
    geometry: Geometry, spec: ModelSpec, device: Device, layers: Layers, step: Step, tp: int
) -> dict[str, Any]:
    """Of predictors, on one rank. Workspaces are not counted."""
    predictors = predictor_bytes(layers, spec, tp)
    weights = num_weights(geometry) * WEIGHT_BYTES / tp
    token = geometry.num_layers * 2 * geometry.hidden_size * WEIGHT_BYTES / tp
    needed = step.accounts[0].need_gb * 1e9 + predictors
    return {
        "predictor_bytes": predictors,
        "weight_bytes": weights,
        "share_of_weights": predictors / weights,
        "kv_bytes_per_token": token,
        "kv_tokens_displaced": math.ceil(predictors / token),
        "needed_bytes": needed,
        "fits": needed <= device.memory_gb * 1e9,
    }


# The report.


def report(result: dict[str, Any]) -> str:
    model, notes = result["model"], [("note", note) for note in result["notes"]]
    point = (
        f"{model['name']} on {result['gpu']}, batch {result['batch']}, context {result['context']}, tp"
        f" {result['tp']}"
    )
    rows = [
        *_densities_rows(result["densities"], model["num_layers"]),
        *_gain_rows(result["step"]),
        ("memory cost", _memory_words(result["memory"], " a rank" if result["tp"] > 1 else "")),
        *notes,
    ]
    return "\n".join([result["banner"], point, "", *(f"{label:17}{text}" for label, text in rows)])


Row = tuple[str, str]  # label, empty where the row above goes on, and text


def _densities_rows(densities: dict[str, Any], num_layers: int) -> list[Row]:
    return [
        ("densities", densities["from"]),
        (
            "",
            f"means over layers: MLP {densities['mlp_mean']:.2f} (any row), heads"
            f" {densities['head_mean']:.2f} a row, {densities['head_union_mean']:.2f} any row;"
            f" {densities['mlp_gates']} MLPs and {densities['head_gates']} attentions of {num_layers} layers"
            " gated",
        ),
    ]


def _gain_rows(step: dict[str, Any]) -> list[Row]:
    speedup = step["speedup"]
    verdict = f"{speedup:.2f}x" if speedup > 1 else f"{speedup:.2f}x: slower than dense"
    return [
        (
            "predicted gain",
            f"{verdict} (decode step {step['dense_ms']:.2f} -> {step['sparse_ms']:.2f} ms; modelled, not"
            " measured)",
        ),
        (
            "",
            f"launches a layer: dense {step['dense_launches_per_layer']}, sparse"
            f" {step['sparse_launches_per_layer']:.3g}; most of the sparse step: {step['dominant']},"
            f" {step['dominant_share']:.0%}",
        ),
        ("break-even", _break_even_words(step["break_even_mlp_density"])),
        *(_fewer_bits_row(bits, step) for bits in FEWER_BITS),
    ]


def _fewer_bits_row(bits: int, step: dict[str, Any]) -> Row:
    small, name = step[f"int{bits}"], f"INT{bits}"
    return (
        f"beside {name}",
        f"dense {name} {small['dense_ms']:.2f} ms, {_beside(small['dense_ms'], step['sparse_ms'])} sparse"
        f" 16-bit; both together {small['sparse_ms']:.2f} ms; modelled, dequantization free;"
        f" {SERVED[bits]} (docs/plan.md)",
    )


def _memory_words(memory: dict[str, Any], a_rank: str) -> str:
    return (
        f"{_bytes(memory['predictor_bytes'])} of predictors{a_rank}, {memory['share_of_weights']:.1%} of the"
        f" weights ({_bytes(memory['weight_bytes'])}), in place of {memory['kv_tokens_displaced']:,} cached"
        " tokens; workspaces not counted"
    )


def _break_even_words(density: float | None) -> str:
    if density is None:
        return "no MLP is gated"
    if density > 1:
        return "none: faster at any MLP density"
    if density <= 0:
        return "none: no MLP density is small enough"
    return f"sparse is no faster above MLP density {density:.2f}"


def _beside(dense_ms: float, sparse_ms: float) -> str:
    return (
        f"{sparse_ms / dense_ms:.2f}x as fast as"
        if dense_ms < sparse_ms
        else f"{dense_ms / sparse_ms:.2f}x the time of"
    )


def _bytes(count: float) -> str:
    for unit in ("GB", "MB"):
        size = count / {"GB": 1e9, "MB": 1e6}[unit]
        if size >= 1:
            return f"{size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
