"""Will contextual sparsity pay? Predicted gain, memory cost and training time of one model on one GPU.

The gain is what the launch-and-bytes MODEL (`roofline`) makes of an artifact's densities, or of assumed ones;
the training time is counted FLOPs over a stated rate. Nothing here is measured but the speed of a matrix
product on this CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_dejavu import artifact, locate, roofline
from vllm_dejavu.artifact import DTYPES
from vllm_dejavu.families import geometry_of
from vllm_dejavu.manifest import (
    MANIFEST_FILE,
    ArtifactError,
    GateSpec,
    Manifest,
    ModelSpec,
    check_model,
    gate_tensors,
)
from vllm_dejavu.roofline import DENSE_LAUNCHES, DEVICES, GEOMETRIES, Account, Device, Geometry, Workload

Layers = Sequence[dict[str, GateSpec]]

# Beside the dense layer's launches. A gated MLP: predictor down, predictor up + select, and no ReLU; gated
# heads: no merge of the splits; their scores take a launch unless they ride along (docs/kernels.md).
MLP_GATE_LAUNCHES, HEAD_GATE_LAUNCHES, HEAD_SCORE_LAUNCHES = 2 - 1, -1, 1
SERVED_BYTES = 2  # of a weight and of a cached value
SMALLEST_MEASURED_HIDDEN = 2048
LARGEST_MODELLED_BATCH = 64

# What `vllm-dejavu train` does (predictor_training/), counted; a test compares. The paper's text: 500
# documents of the model's context, at most 2,048 tokens each.
TRAIN_DOCUMENTS, TRAIN_SEQ_LEN, VALID_TOKENS = 500, 2048, 32_768
PROBE_TOKENS, MLP_CANDIDATES, HEAD_CANDIDATES = 4096, 9, 14
PROBE_RUNS = 2 + 8  # dense, all layers' statistics, and the density-quality curve
# Over all calibration text: dense, bisection of at most 201 joint choices, single steps, the final
# description.
VALID_RUNS = 1 + math.ceil(math.log2(201 + 1)) + 6 + 1
PREDICTOR_DTYPE, HEAD_LOOKAHEAD = "int8", "previous"
MOMENTS_PER_LAYER = 2  # [hidden, hidden], of the MLP's input and of what feeds the heads' gate
MOMENT_BYTES, TRAINED_WEIGHT_BYTES = 8, 4
RANK_STEP = 16  # ranks are multiples of it
LARGE_HIDDEN = 2048  # from here on a rank follows from the MLP's bytes
# Fit of one layer. A symmetric eigendecomposition with vectors takes about 10 hidden^3, at about the speed of
# a product of the same type (seen once, at hidden 2048 on two cores).
EIGENDECOMPOSITIONS, EIGEN_CUBES = 2, 10
# Gradient passes over stored tokens; forward and backward take six operations a weight and token.
GRADIENT_TOKENS, GRADIENT_EPOCHS, GRADIENT_OPERATIONS = 32_768, 5, 6
STORED_DENSITY = 0.1  # of neurons whose energies are stored; assumed
FFN_PRODUCTS, SQUARE_PRODUCTS = 4, 2  # [ffn, hidden] x [hidden, hidden], and hidden^3

# Datasheets of the modules in roofline.DEVICES: dense fp16 on tensor (matrix) cores, and fp32 without them.
# TFLOP/s.
TFLOPS = {
    "a100": (312, 19.5),
    "h100": (989, 67),
    "h200": (989, 67),
    "b200": (2250, 75),
    "mi300x": (1307, 163.4),
}
UTILISATION = 0.4  # of a datasheet rate; assumed
FP64_SHARE = 0.5  # of the CPU's fp32 rate; assumed


def plan(
    model: str,
    gpu: str,
    *,
    batch: int = 1,
    context: int = 256,
    predictor: str | None = None,
    tp: int = 1,
    cpu_tflops: float | None = None,
) -> dict[str, Any]:
    """Everything that `report` prints, as JSON values; units end the names.

    Args:
        model: directory, hub id, or a size of the roofline table ("6.7b", "opt-6.7b").
        predictor: directory or hub id of an artifact; None looks in MODEL/dejavu and else assumes densities.
        cpu_tflops: fp32 rate of this machine; None measures it.

    Raises:
        ValueError: an unknown GPU or model, a model or artifact that would not be served, a point out of
        range.
    """
    device = find_device(gpu)
    if batch < 1 or context < 1 or tp < 1:
        raise ValueError(f"--batch {batch}, --context {context}, --tp {tp}: each must be at least 1.")
    geometry, spec = find_model(model)
    if context > geometry.positions - 2:
        raise ValueError(
            f"--context {context} is beyond the {geometry.positions - 2} positions of {model}; take fewer"
            " tokens."
        )
    manifest, source = find_artifact(model, predictor, spec)
    notes = []
    if manifest is None:
        layers, assumption = assumed_layers(geometry, batch)
        source = f"{source}; assumed: {assumption}"
        if geometry.hidden < SMALLEST_MEASURED_HIDDEN:
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
    int4 = decode_step(
        geometry, device, [replace(w, dense_weight_bits=4, sparse_weight_bits=4) for w in workloads]
    )
    dominant, dominant_us = max(step.sparse_terms_us.items(), key=lambda term: term[1])
    memory = memory_cost(geometry, spec, device, layers, step, tp)
    if not memory["fits"]:
        notes.append(
            f"DOES NOT FIT: {memory['needed_bytes'] / 1e9:.0f} of {device.memory_gb:.0f} GB on each GPU"
        )
    training = training_cost(
        geometry, gpu.lower(), measured_cpu_tflops() if cpu_tflops is None else cpu_tflops
    )
    if training["memory_bytes"] > device.memory_gb * 1e9:
        notes.append(
            f"training on one {device.name} does not fit: {training['memory_bytes'] / 1e9:.0f} of"
            f" {device.memory_gb:.0f} GB"
        )
    count = len(layers)
    return {
        "kind": "model",
        "banner": roofline.BANNER,
        "model": {
            "name": model,
            "hidden_size": geometry.hidden,
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
            "int4": {
                "dense_ms": int4.dense_us / 1e3,
                "sparse_ms": int4.sparse_us / 1e3,
                "assumptions": list(roofline.QUANTIZATION_ASSUMPTIONS),
            },
            "dense_launches_per_layer": len(DENSE_LAUNCHES),
            "sparse_launches_per_layer": sum(w.sparse_launches for w in workloads) / count,
        },
        "memory": memory,
        "training": training,
        "notes": notes,
    }


# The model and its densities.


def find_device(gpu: str) -> Device:
    if gpu.lower() not in DEVICES:
        raise ValueError(f"--gpu {gpu!r} is unknown: expected one of {', '.join(DEVICES)}.")
    return DEVICES[gpu.lower()]


def find_model(model: str) -> tuple[Geometry, ModelSpec]:
    """Geometry of a model, from its config.json or from the table, and the form artifacts know it by.

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
            hidden_size=g.hidden,
            ffn_dim=g.ffn,
            num_hidden_layers=g.num_layers,
            num_attention_heads=g.num_heads,
            vocab_size=g.vocab,
            max_position_embeddings=g.positions - 2,
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
    geometry_of(config)
    if config.ffn_dim != 4 * config.hidden_size:
        raise ValueError(
            f"Model {model} has ffn_dim {config.ffn_dim} and hidden_size {config.hidden_size}; the roofline"
            " model knows only ffn_dim = 4 x hidden_size, which every published OPT has."
        )
    geometry = Geometry(
        model,
        config.hidden_size,
        config.num_attention_heads,
        config.num_hidden_layers,
        config.vocab_size,
        config.max_position_embeddings + 2,
    )
    return geometry, ModelSpec.from_hf_config(config, model)


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
    name = min(GEOMETRIES, key=lambda n: abs(math.log(GEOMETRIES[n].hidden / geometry.hidden)))
    alone, heads, _ = roofline.preset_densities(name, 1)
    union, _, source = roofline.preset_densities(name, batch)
    mlp = GateSpec(
        state="sparse",
        form="low_rank",
        rank=default_rank(geometry),
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
    nearest = "" if GEOMETRIES[name].hidden == geometry.hidden else f"nearest size {name}: "
    return [
        first,
        *[{"mlp": mlp, "attention": attention}] * (geometry.num_layers - 1),
    ], nearest + source.removeprefix("assumed: ")


def default_rank(geometry: Geometry) -> int:
    """Rank that training takes where none is named: what PREDICTOR_DTYPE gets of 3% of the MLP's bytes, a
    multiple of 16, at least 16; a quarter of hidden sizes below LARGE_HIDDEN."""
    hidden, ffn = geometry.hidden, geometry.ffn
    rank = hidden // 4
    if hidden >= LARGE_HIDDEN:
        rank = int(
            roofline.MLP_BYTE_BUDGET
            * 2
            * hidden
            * ffn
            * SERVED_BYTES
            / ((hidden + ffn) * DTYPES[PREDICTOR_DTYPE].itemsize)
        )
    return min(max(RANK_STEP, rank // RANK_STEP * RANK_STEP), hidden)


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
                dtype_bytes=SERVED_BYTES,
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
                total += math.prod(shape) * dtype.itemsize // (1 if name == "down" else tp)
    return total


def memory_cost(
    geometry: Geometry, spec: ModelSpec, device: Device, layers: Layers, step: Step, tp: int
) -> dict[str, Any]:
    """Of predictors, on one rank. Workspaces are not counted."""
    predictors = predictor_bytes(layers, spec, tp)
    weights = geometry.num_weights * SERVED_BYTES / tp
    token = geometry.num_layers * 2 * geometry.hidden * SERVED_BYTES / tp
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


# The training.


def forward_flops(geometry: Geometry, tokens: int, seq_len: int, *, logits: bool) -> float:
    """Of dense forward passes: two a weight, and QK^T and its product with V over whole windows, causal or
    not.
    """
    per_layer = 2 * 12 * geometry.hidden**2 + 2 * 2 * seq_len * geometry.hidden
    return tokens * (geometry.num_layers * per_layer + logits * 2 * geometry.vocab * geometry.hidden)


def moment_flops(geometry: Geometry, tokens: int) -> float:
    return tokens * geometry.num_layers * MOMENTS_PER_LAYER * 2 * geometry.hidden**2


def fit_flops(geometry: Geometry) -> float:
    cube = geometry.hidden**3
    products = FFN_PRODUCTS * 2 * geometry.ffn * geometry.hidden**2 + SQUARE_PRODUCTS * 2 * cube
    return geometry.num_layers * (EIGENDECOMPOSITIONS * EIGEN_CUBES * cube + products)


def calibration_flops(geometry: Geometry, seq_len: int) -> float:
    """At most: a gate's candidates end where the perplexity budget does. Each runs its own layer and those
    behind it.
    """
    whole = forward_flops(
        geometry, PROBE_RUNS * PROBE_TOKENS + VALID_RUNS * VALID_TOKENS, seq_len, logits=True
    )
    candidates = (MLP_CANDIDATES + HEAD_CANDIDATES) * PROBE_TOKENS
    return whole + sum(
        forward_flops(replace(geometry, num_layers=remaining), candidates, seq_len, logits=True)
        for remaining in range(1, geometry.num_layers + 1)
    )


def calibration_runs(geometry: Geometry) -> int:
    """Forward passes of the calibration, over the probe or over all of its text, at most."""
    return PROBE_RUNS + geometry.num_layers * (MLP_CANDIDATES + HEAD_CANDIDATES) + VALID_RUNS


def train_tokens(geometry: Geometry) -> int:
    """What is trained on where --max-tokens is not given."""
    return TRAIN_DOCUMENTS * train_seq_len(geometry)


def train_seq_len(geometry: Geometry) -> int:
    return min(TRAIN_SEQ_LEN, geometry.positions - 2)


def moments_bytes(geometry: Geometry) -> int:
    return geometry.num_layers * MOMENTS_PER_LAYER * geometry.hidden**2 * MOMENT_BYTES


def measured_cpu_tflops(seconds: float = 0.5, size: int = 1024) -> float:
    """fp32 matrix products on this machine's CPU; the fastest counts, since other programs only slow them
    down.
    """
    import torch

    a = torch.ones(size, size)
    fastest, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        a @ a
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest / 1e12


def gradient_flops(geometry: Geometry) -> float:
    """Of fine-tuning every layer's predictor."""
    weights = default_rank(geometry) * (geometry.hidden + geometry.ffn)
    return (
        geometry.num_layers
        * GRADIENT_EPOCHS
        * min(GRADIENT_TOKENS, train_tokens(geometry))
        * GRADIENT_OPERATIONS
        * weights
    )


def sample_bytes(geometry: Geometry) -> int:
    """Stored activations, a token and layer: the gate's input in 16 bits, two bits a neuron, and the energies
    of positive ones.
    """
    row_bytes = 2 * geometry.hidden + 2 * (geometry.ffn // 8) + int(2 * STORED_DENSITY * geometry.ffn)
    return geometry.num_layers * min(GRADIENT_TOKENS, train_tokens(geometry)) * row_bytes


def training_cost(geometry: Geometry, gpu: str, cpu_tflops: float) -> dict[str, Any]:
    """Estimates for `vllm-dejavu train` as it is by default, in one pass. The closed form is fitted on the
    CPU in fp64 everywhere.

    Times: fp32 is what training computes in by default; fp16: --model-dtype float16, forward passes (not
    moments) in 16 bits.
    """
    seq_len, tokens = train_seq_len(geometry), train_tokens(geometry)
    flops = {
        "collection": forward_flops(geometry, tokens, seq_len, logits=False),
        "moments": moment_flops(geometry, tokens),
        "fit": fit_flops(geometry),
        "gradient": gradient_flops(geometry),
        "calibration": calibration_flops(geometry, seq_len),
    }
    fp16_tflops, fp32_tflops = (rate * UTILISATION for rate in TFLOPS[gpu])
    fit_s = flops["fit"] / (cpu_tflops * FP64_SHARE * 1e12)

    def seconds(forward_tflops: float, moment_tflops: float) -> float:
        forward = flops["collection"] + flops["calibration"]
        return (
            forward / forward_tflops + (flops["moments"] + flops["gradient"]) / moment_tflops
        ) / 1e12 + fit_s

    return {
        "tokens": tokens,
        "calibration_runs_at_most": calibration_runs(geometry),
        "flops": flops,
        "assumed_utilisation": UTILISATION,
        "gpu_fp32_tflops": fp32_tflops,
        "gpu_fp16_tflops": fp16_tflops,
        "cpu_fp32_tflops": cpu_tflops,
        "fit_s": fit_s,
        "gpu_fp32_s": seconds(fp32_tflops, fp32_tflops),
        "gpu_fp16_s": seconds(fp16_tflops, fp32_tflops),
        "cpu_s": seconds(cpu_tflops, cpu_tflops),
        "moments_bytes": moments_bytes(geometry),
        "memory_bytes": geometry.num_weights * TRAINED_WEIGHT_BYTES + moments_bytes(geometry),
        # A checkpoint of the moments stays until the next one is whole.
        "disk_bytes": 2 * moments_bytes(geometry) + sample_bytes(geometry),
    }


# The report.


def report(result: dict[str, Any]) -> str:
    r, d, s, m, t = (result, *(result[k] for k in ("densities", "step", "memory", "training")))
    point = f"{r['model']['name']} on {r['gpu']}, batch {r['batch']}, context {r['context']}, tp {r['tp']}"
    verdict = f"{s['speedup']:.2f}x" if s["speedup"] > 1 else f"{s['speedup']:.2f}x: slower than dense"
    count, rank = r["model"]["num_layers"], " a rank" if r["tp"] > 1 else ""
    lines = [
        r["banner"],
        point,
        "",
        f"densities        {d['from']}",
        (
            f"                 means over layers: MLP {d['mlp_mean']:.2f} (any row), heads"
            f" {d['head_mean']:.2f} a row, {d['head_union_mean']:.2f} any row; {d['mlp_gates']} MLPs and"
            f" {d['head_gates']} attentions of {count} layers gated"
        ),
        (
            f"predicted gain   {verdict} (decode step {s['dense_ms']:.2f} -> {s['sparse_ms']:.2f} ms;"
            " modelled, not measured)"
        ),
        (
            f"                 launches a layer: dense {s['dense_launches_per_layer']}, sparse"
            f" {s['sparse_launches_per_layer']:.3g}; most of the sparse step: {s['dominant']},"
            f" {s['dominant_share']:.0%}"
        ),
        f"break-even       {_break_even_words(s['break_even_mlp_density'])}",
        (
            f"beside INT4      dense INT4 {s['int4']['dense_ms']:.2f} ms,"
            f" {_beside(s['int4']['dense_ms'], s['sparse_ms'])} sparse 16-bit; both together"
            f" {s['int4']['sparse_ms']:.2f} ms; modelled, dequantization free; no INT4 is served here"
            " (docs/plan.md)"
        ),
        (
            f"memory cost      {_bytes(m['predictor_bytes'])} of predictors{rank},"
            f" {m['share_of_weights']:.1%} of the weights ({_bytes(m['weight_bytes'])}), in place of"
            f" {m['kv_tokens_displaced']:,} cached tokens; workspaces not counted"
        ),
        (
            f"training         estimates for {t['tokens']:,} tokens and a calibration of"
            f" {t['calibration_runs_at_most']:,} forward passes at most"
        ),
        (
            f"                 {_time(t['gpu_fp32_s'])} on one {r['gpu']} at {t['gpu_fp32_tflops']:.3g} fp32"
            f" TFLOP/s (datasheet x {t['assumed_utilisation']} assumed), of which the fit on a CPU like this"
            f" one {_time(t['fit_s'])}"
        ),
        (
            f"                 {_time(t['gpu_fp16_s'])} with --model-dtype float16, at"
            f" {t['gpu_fp16_tflops']:.3g} TFLOP/s (datasheet x {t['assumed_utilisation']} assumed)"
        ),
        (
            f"                 {_time(t['cpu_s'])} on this CPU at {t['cpu_fp32_tflops'] * 1e3:.3g} fp32"
            f" GFLOP/s (measured just now), {FP64_SHARE} of it in fp64 (assumed)"
        ),
        f"                 FLOPs: {', '.join(f'{name} {flops:.1e}' for name, flops in t['flops'].items())}",
        (
            f"                 memory {_bytes(t['memory_bytes'])} (fp32 weights and moments; activations not"
            f" counted), disk {_bytes(t['disk_bytes'])}"
        ),
        *(f"note             {note}" for note in r["notes"]),
    ]
    return "\n".join(lines)


def _break_even_words(density: float | None) -> str:
    if density is None:
        return "no MLP is gated"
    if density > 1:
        return "none: faster at any MLP density"
    if density <= 0:
        return "none: no MLP density is small enough"
    return f"sparse is no faster above MLP density {density:.2f}"


def _beside(dense_int4_ms: float, sparse_ms: float) -> str:
    return (
        f"{sparse_ms / dense_int4_ms:.2f}x as fast as"
        if dense_int4_ms < sparse_ms
        else f"{dense_int4_ms / sparse_ms:.2f}x the time of"
    )


def _bytes(count: float) -> str:
    for unit in ("GB", "MB"):
        size = count / {"GB": 1e9, "MB": 1e6}[unit]
        if size >= 1:
            return f"{size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds)} s"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
