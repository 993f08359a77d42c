"""Launch-and-bytes MODEL of one OPT decode step, dense and sparse. It computes; it measures nothing.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --geometry 30b --device h200 --batch 1 --context 256 --launches 13

A layer takes `bytes read and written / bandwidth + launches * cost of a launch + all-reduces`, every term added: in a
decode step each kernel waits for the one before it, so its start-up hides nothing. Use it to see what a selection can
give at best and which term is in the way, and beside a measurement (`account(...).summary()`) to see what is left.

Left out, and why:
- activations: a few MiB a launch at most, at batch 64; they stay in the L2 cache, and both sides have them;
- biases and LayerNorm weights: 13 * hidden of 12 * hidden^2 elements;
- arithmetic: at batch 64 a 16-bit weight meets 64 rows; these devices stop being bound by memory at 150 to 300
  (datasheet FLOP/s over bytes/s). Far larger batches are outside this model;
- slower reads of scattered rows: `efficiency` is the same for both sides. Kernels that gather worse lose that much.
"""
from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

BANNER = "MODEL, not a measurement: time = bytes / bandwidth + launches x launch cost (+ all-reduces)"

# What vLLM's OPT launches per layer and decode step: ten; merging the splits is a kernel of its own, ReLU too.
DENSE_LAUNCHES = (
    "add+LayerNorm", "qkv", "cache write", "attention", "attention merge", "out_proj", "add+LayerNorm", "fc1", "ReLU", "fc2",
)  # fmt: skip
# Our budget: the merge rides in out_proj, ReLU in fc1, the next layer's head scores in the predictor's down-projection.
SPARSE_LAUNCHES = (
    "add+LayerNorm", "qkv", "cache write", "attention", "out_proj", "add+LayerNorm", "predictor down",
    "predictor up+select", "fc1", "fc2",
)  # fmt: skip
# Outside the layers, once a step, alike on both sides (assumed).
STEP_LAUNCHES = ("embedding", "position embedding+add", "LayerNorm", "lm_head", "sample")

ALL_REDUCES_PER_LAYER = 2  # after out_proj and after fc2
MLP_BYTE_BUDGET = 0.03  # share of a block's bytes that its predictor may have, for hidden size >= 2048


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{type(owner).__name__}.{name} is {value}; it must be a positive number.")


@dataclass(frozen=True)
class Geometry:
    """Shape of an OPT model; ffn is 4 * hidden and every head has its own K and V."""

    name: str
    hidden: int
    num_heads: int
    num_layers: int
    vocab: int = 50272
    positions: int = 2050  # OPT's table is offset by 2

    def __post_init__(self) -> None:
        _positive(self, "hidden", "num_heads", "num_layers", "vocab", "positions")
        if self.hidden % self.num_heads:
            raise ValueError(f"{self.name}: hidden {self.hidden} is not a multiple of num_heads {self.num_heads}.")

    @property
    def ffn(self) -> int:
        return 4 * self.hidden

    @property
    def head_size(self) -> int:
        return self.hidden // self.num_heads

    @property
    def num_weights(self) -> int:
        """Of layers and tied embeddings, without biases and norms."""
        return self.num_layers * 12 * self.hidden**2 + (self.vocab + self.positions) * self.hidden


GEOMETRIES = {
    "1.3b": Geometry("OPT-1.3B", 2048, 32, 24),
    "2.7b": Geometry("OPT-2.7B", 2560, 32, 32),
    "6.7b": Geometry("OPT-6.7B", 4096, 32, 32),
    "13b": Geometry("OPT-13B", 5120, 40, 40),
    "30b": Geometry("OPT-30B", 7168, 56, 48),
    "66b": Geometry("OPT-66B", 9216, 72, 64),
    "175b": Geometry("OPT-175B", 12288, 96, 96),
}


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        bandwidth_gbs: memory, datasheet, 1e9 bytes/s.
        link_gbs: what one device sends to all its peers together, one direction.
        peer_gbs: what it sends to one peer; below link_gbs where devices are wired in a mesh, without a switch.
        launch_us: one more dependent kernel in a captured graph.
        all_reduce_us: an all-reduce of nothing.
        efficiency: share of bandwidth_gbs that reads reach, dense and sparse alike. Ratios of bytes do not depend on
            it; below 1 launches weigh less beside the bytes, so speed-ups come out higher, not lower.
    """

    name: str
    bandwidth_gbs: float
    memory_gb: float
    link_gbs: float
    peer_gbs: float = math.inf
    launch_us: float = 3.0
    all_reduce_us: float = 8.0
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "bandwidth_gbs", "memory_gb", "link_gbs", "efficiency")
        if self.peer_gbs <= 0:
            raise ValueError(f"Device.peer_gbs is {self.peer_gbs}; it must be positive.")
        for name in ("launch_us", "all_reduce_us"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Device.{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.efficiency > 1:
            raise ValueError(f"Device.efficiency is {self.efficiency}; it is a share of the datasheet bandwidth, at most 1.")

    def read_us(self, num_bytes: float) -> float:
        return num_bytes / (self.bandwidth_gbs * self.efficiency * 1e3)  # 1 GB/s is 1e3 bytes/us

    def group_gbs(self, tp: int) -> float:
        return min(self.link_gbs, self.peer_gbs * max(tp - 1, 1))


# Bandwidth and capacity: vendors' datasheets of the modules named, SXM and OAM, not PCIe. Links: half of the figure the
# datasheet gives for both directions together. launch_us: assumed 3 everywhere (2-4 is usual for a dependent kernel of
# a CUDA graph; for MI300X, HIP graphs, not even that much is known here). all_reduce_us: assumed 8 everywhere. Reported
# for H100, small messages, 2-8 GPUs, no graph: 8.5-12 for vLLM's kernel, 4-8 for a faster one (sglang pull request
# 2904). The same table has 13-24 us at 256 KiB, where latency + bytes / link gives under 10: large batches under
# tensor parallelism come out too fast on both sides, and so too high in speed-up.
DEVICES = {
    # 2039 GB/s HBM2e; NVLink 3, 600 GB/s both directions.
    "a100": Device("A100-80GB SXM", 2039, 80, 300),
    # 3.35 TB/s HBM3; NVLink 4, 900 GB/s both directions.
    "h100": Device("H100 SXM", 3350, 80, 450),
    # 4.8 TB/s HBM3e, 141 GB; NVLink 4 as H100.
    "h200": Device("H200", 4800, 141, 450),
    # DGX B200: 64 TB/s and 1440 GB for 8 GPUs (other datasheets: 7.7 TB/s, 192 GB); NVLink 5, 1.8 TB/s both directions.
    "b200": Device("B200", 8000, 180, 900),
    # 5.3 TB/s HBM3, 192 GB; xGMI mesh of 8: 7 links, each 128 GB/s both directions, so a pair of GPUs has one link only.
    "mi300x": Device("MI300X", 5300, 192, 448, peer_gbs=64),
}


@dataclass(frozen=True)
class Workload:
    """One decode step: every sequence adds one token.

    Attributes:
        context: tokens each sequence attends to.
        mlp_density: neurons selected by any row of the batch (the union), all layers alike.
        head_density: heads selected per sequence. 1 means that attention is not gated: it then has no predictor.
        head_union_density: heads selected by any sequence. None takes sequences to choose independently,
            1 - (1 - head_density)^batch; sequences that agree have less.
        survivors: selected neurons that come out of fc1 positive; fc2 reads only those.
        tp: tensor-parallel size; weights, heads and neurons are split, the predictor's down-projection is not.
        dtype_bytes: of weights and KV cache.
        predictor_rank: of the MLP's predictor, down [rank, hidden] and up [ffn, rank]; 0 for none, None for the
            largest that has at most 3% of the MLP's bytes. The head predictor is linear: [num_heads, hidden].
        sparse_launches: per layer; beside SPARSE_LAUNCHES it may count fewer or more.
        skip_projections: read Q rows and out_proj columns of union heads only; False reads them all.
    """

    batch: int = 1
    context: int = 256
    mlp_density: float = 0.1
    head_density: float = 0.5
    head_union_density: float | None = None
    survivors: float = 1.0
    tp: int = 1
    dtype_bytes: float = 2
    predictor_rank: int | None = None
    predictor_dtype_bytes: float = 2
    dense_launches: int = len(DENSE_LAUNCHES)
    sparse_launches: int = len(SPARSE_LAUNCHES)
    skip_projections: bool = True

    def __post_init__(self) -> None:
        _positive(self, "batch", "context", "tp", "dtype_bytes", "predictor_dtype_bytes")
        for name in ("mlp_density", "head_density", "head_union_density"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"Workload.{name} is {value}; a density is a share kept, in (0, 1].")
        if not 0 <= self.survivors <= 1:
            raise ValueError(f"Workload.survivors is {self.survivors}; it is a share of the selected neurons, in [0, 1].")
        for name in ("predictor_rank", "dense_launches", "sparse_launches"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"Workload.{name} is {value}; it must be 0 or more.")
        union = self.head_union_density
        if union is not None and not self.head_density <= union <= min(1.0, self.batch * self.head_density) + 1e-9:
            raise ValueError(
                f"Workload.head_union_density is {union}; a union of {self.batch} sequences with {self.head_density} "
                f"each lies between that and their sum, at most 1. Leave it out to take them as independent."
            )

    @property
    def union_heads(self) -> float:
        """Share of heads that some sequence selects."""
        if self.head_union_density is not None:
            return self.head_union_density
        return 1 - (1 - self.head_density) ** self.batch

    def rank(self, geometry: Geometry) -> int:
        if self.predictor_rank is not None:
            return self.predictor_rank
        mlp_bytes = 2 * geometry.hidden * geometry.ffn * self.dtype_bytes
        return int(MLP_BYTE_BUDGET * mlp_bytes / ((geometry.hidden + geometry.ffn) * self.predictor_dtype_bytes))


@dataclass(frozen=True)
class Part:
    """Memory traffic of one part of a layer, on one rank."""

    dense_bytes: float
    sparse_bytes: float


@dataclass(frozen=True)
class Account:
    """Where the modelled time of one decode step goes. Bytes and times are those of one rank; `account` makes it.

    Attributes:
        parts: of one layer.
        outer_bytes: embeddings and lm_head, once a step and alike on both sides.
        all_reduce_us: of one layer, both all-reduces; 0 without tensor parallelism.
        outer_us: of everything outside the layers.
        need_gb: whole weights and KV cache on one rank, without predictors and workspaces.
    """

    geometry: Geometry
    device: Device
    workload: Workload
    parts: dict[str, Part]
    outer_bytes: float
    all_reduce_us: float
    outer_us: float
    need_gb: float

    @property
    def dense_bytes(self) -> float:
        return sum(part.dense_bytes for part in self.parts.values())

    @property
    def sparse_bytes(self) -> float:
        return sum(part.sparse_bytes for part in self.parts.values())

    @property
    def dense_us(self) -> float:
        """One layer, as the next three."""
        return self.device.read_us(self.dense_bytes) + self.workload.dense_launches * self.device.launch_us + self.all_reduce_us

    @property
    def sparse_us(self) -> float:
        return sum(self.sparse_terms_us.values())

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us

    @property
    def sparse_terms_us(self) -> dict[str, float]:
        """The sparse layer's time: one term a part, one for launches, one for all-reduces."""
        terms = {name: self.device.read_us(part.sparse_bytes) for name, part in self.parts.items()}
        terms["launches"] = self.workload.sparse_launches * self.device.launch_us
        terms["all-reduce"] = self.all_reduce_us
        return terms

    @property
    def dominant(self) -> str:
        """Largest term of the sparse layer."""
        return max(self.sparse_terms_us.items(), key=lambda term: term[1])[0]

    @property
    def dominant_share(self) -> float:
        return self.sparse_terms_us[self.dominant] / self.sparse_us

    @property
    def dense_step_us(self) -> float:
        return self.geometry.num_layers * self.dense_us + self.outer_us

    @property
    def sparse_step_us(self) -> float:
        return self.geometry.num_layers * self.sparse_us + self.outer_us

    @property
    def step_speedup(self) -> float:
        return self.dense_step_us / self.sparse_step_us

    @property
    def fits(self) -> bool:
        """False where the device cannot hold the model and its cache; True promises nothing about the rest."""
        return self.need_gb <= self.device.memory_gb

    def summary(self) -> str:
        w = self.workload
        return (
            f"model: {self.geometry.name} on {self.device.name}, batch {w.batch} x {w.context}, tp {w.tp}, "
            f"MLP {w.mlp_density:.2f}, heads {w.head_density:.2f} (union {w.union_heads:.2f}): "
            f"layer {self.dense_us:.1f} -> {self.sparse_us:.1f} us, {self.speedup:.2f}x; "
            f"step {self.dense_step_us / 1e3:.2f} -> {self.sparse_step_us / 1e3:.2f} ms, {self.step_speedup:.2f}x; "
            f"most of sparse: {self.dominant} ({self.dominant_share:.0%})"
        )


def account(geometry: Geometry, device: Device, workload: Workload) -> Account:
    """Bytes, launches and time of one decode step, dense and sparse.

    Raises:
        ValueError: where tensor parallelism does not divide the heads.
    """
    g, w = geometry, workload
    if g.num_heads % w.tp:
        raise ValueError(f"{g.name} has {g.num_heads} heads, which tp={w.tp} does not divide; take a divisor.")
    square_bytes = g.hidden**2 * w.dtype_bytes / w.tp  # one hidden x hidden projection, this rank's share
    matrix_bytes = g.hidden * g.ffn * w.dtype_bytes / w.tp  # fc1, and fc2
    token_kv_bytes = 2 * g.hidden * w.dtype_bytes / w.tp
    union = w.union_heads if w.skip_projections else 1.0
    gates_heads = w.head_density < 1
    predictor_elements = w.rank(g) * (g.hidden + g.ffn / w.tp) + gates_heads * g.num_heads / w.tp * g.hidden
    parts = {
        "qkv": Part(3 * square_bytes, (2 + union) * square_bytes),  # K and V always: the cache stays complete
        "KV write": Part(w.batch * token_kv_bytes, w.batch * token_kv_bytes),
        "KV read": Part(w.batch * w.context * token_kv_bytes, w.batch * w.context * token_kv_bytes * w.head_density),
        "out_proj": Part(square_bytes, union * square_bytes),
        "fc1": Part(matrix_bytes, w.mlp_density * matrix_bytes),
        "fc2": Part(matrix_bytes, w.mlp_density * w.survivors * matrix_bytes),
        "predictor": Part(0, predictor_elements * w.predictor_dtype_bytes),
    }

    hidden_bytes = w.batch * g.hidden * w.dtype_bytes
    logits_bytes = w.batch * g.vocab * w.dtype_bytes
    all_reduce_us = outer_link_us = 0.0
    if w.tp > 1:
        link_bytes_per_us = device.group_gbs(w.tp) * 1e3
        sent = (w.tp - 1) / w.tp
        one_us = device.all_reduce_us + 2 * hidden_bytes * sent / link_bytes_per_us
        all_reduce_us = ALL_REDUCES_PER_LAYER * one_us
        # The vocabulary is split as well: one all-reduce of the embedding, one gather of the logits.
        outer_link_us = one_us + device.all_reduce_us + logits_bytes * sent / link_bytes_per_us
    outer_bytes = g.vocab * g.hidden * w.dtype_bytes / w.tp + 2 * hidden_bytes  # lm_head; a token's and a position's row
    outer_us = device.read_us(outer_bytes) + len(STEP_LAUNCHES) * device.launch_us + outer_link_us
    need_bytes = g.num_weights * w.dtype_bytes / w.tp + g.num_layers * parts["KV read"].dense_bytes
    return Account(g, device, w, parts, outer_bytes, all_reduce_us, outer_us, need_bytes / 1e9)


# Neurons that any row of a batch selects, mean over layers: the tables of Polar Sparsity (NeurIPS 2025), made for 99%
# recall. Single layers lie far off (6.7B at batch 64: up to 0.97). Time is linear in this density, so its mean gives the
# step's time; that layers above their crossover run dense is not modelled. Heads per sequence: 0.3 for 66B is theirs
# too; 0.5 and 0.4 are what this project sets itself for 6.7B and 30B. None of it was measured here.
_UNION_DENSITIES = {
    "6.7b": {1: 0.10, 8: 0.29, 16: 0.40, 32: 0.52, 64: 0.62, 256: 0.77},
    "30b": {1: 0.08, 8: 0.21, 16: 0.30, 32: 0.42, 64: 0.53, 256: 0.68},
    "66b": {1: 0.08, 8: 0.18, 16: 0.26, 32: 0.37, 64: 0.49, 256: 0.64},
}
_HEAD_DENSITIES = {"6.7b": 0.5, "30b": 0.4, "66b": 0.3}
# No table for these sizes: the nearest by hidden size stands in.
_STANDS_IN = {"1.3b": "6.7b", "2.7b": "6.7b", "13b": "6.7b", "175b": "66b"}


def preset_densities(name: str, batch: int) -> tuple[float, float, str]:
    """Assumed MLP union density, heads per sequence, and in words where they come from.

    Between two batch sizes of the table: linear in log2(batch). Above the last: the last.
    """
    known = _STANDS_IN.get(name, name)
    table = _UNION_DENSITIES[known]
    if known != name:
        source = f"assumed: {known} stands in"
    else:
        source = "Polar's tables" if name == "66b" else "MLP Polar's table, heads assumed"
    if batch in table:
        return table[batch], _HEAD_DENSITIES[known], source
    above = [size for size in table if size > batch]
    below = max(size for size in table if size < batch)
    if not above:
        return table[below], _HEAD_DENSITIES[known], f"{source}, batch {below}"
    share = math.log2(batch / below) / math.log2(min(above) / below)
    density = table[below] + share * (table[min(above)] - table[below])
    return density, _HEAD_DENSITIES[known], f"{source}, interpolated"


def csv_row(result: Account, densities_from: str) -> dict[str, object]:
    d, w = result.device, result.workload
    row: dict[str, object] = {
        "kind": "model",
        "geometry": result.geometry.name,
        "device": d.name,
        **{f.name: getattr(w, f.name) for f in fields(w)},
        "head_union_density": round(w.union_heads, 6),
        "densities_from": densities_from,
        "predictor_rank": w.rank(result.geometry),
        **{f.name: getattr(d, f.name) for f in fields(d) if f.name != "name"},
    }
    for name, part in result.parts.items():
        stem = name.replace(" ", "_").lower()
        row[f"{stem}_layer_dense_bytes"] = round(part.dense_bytes)
        row[f"{stem}_layer_sparse_bytes"] = round(part.sparse_bytes)
    row |= {
        "layer_dense_bytes": round(result.dense_bytes),
        "layer_sparse_bytes": round(result.sparse_bytes),
        "outer_bytes": round(result.outer_bytes),
        "layer_all_reduce_us": round(result.all_reduce_us, 3),
        "layer_dense_us": round(result.dense_us, 3),
        "layer_sparse_us": round(result.sparse_us, 3),
        "layer_speedup": round(result.speedup, 4),
        "step_dense_us": round(result.dense_step_us, 2),
        "step_sparse_us": round(result.sparse_step_us, 2),
        "step_speedup": round(result.step_speedup, 4),
        "dominant_sparse_term": result.dominant,
        "dominant_sparse_share": round(result.dominant_share, 4),
        "need_gb": round(result.need_gb, 2),
        "fits": result.fits,
    }
    return row


def print_parts(result: Account) -> None:
    """One layer of one point: bytes by part, launches by name."""
    d, w = result.device, result.workload
    print(f"\n{'one layer, one rank':22}{'dense MB':>10}{'us':>9}{'sparse MB':>12}{'us':>9}")

    def line(name: str, dense_bytes: float | None, dense_us: float, sparse_bytes: float | None, sparse_us: float) -> None:
        dense, sparse = ("" if b is None else f"{b / 1e6:.2f}" for b in (dense_bytes, sparse_bytes))
        print(f"{name:22}{dense:>10}{dense_us:>9.2f}{sparse:>12}{sparse_us:>9.2f}")

    for name, part in result.parts.items():
        line(name, part.dense_bytes, d.read_us(part.dense_bytes), part.sparse_bytes, d.read_us(part.sparse_bytes))
    line(f"launches {w.dense_launches}, {w.sparse_launches}", None, w.dense_launches * d.launch_us, None, w.sparse_launches * d.launch_us)
    if w.tp > 1:
        line("all-reduces", None, result.all_reduce_us, None, result.all_reduce_us)
    line("sum", result.dense_bytes, result.dense_us, result.sparse_bytes, result.sparse_us)
    for label, names, count in (("dense", DENSE_LAUNCHES, w.dense_launches), ("sparse", SPARSE_LAUNCHES, w.sparse_launches)):
        rest = "" if count == len(names) else f"; {count - len(names):+d} not named"
        print(f"{label} launches: {', '.join(names)}{rest}")


def print_table(results: Sequence[tuple[Account, str]]) -> None:
    header = (
        f"{'geometry':9}{'device':14}{'batch':>6}{'context':>8}{'MLP':>6}{'heads':>6}{'union':>6}{'layer us':>17}{'layer':>7}"
        f"{'step ms':>17}{'step':>7}  {'most of sparse':17}densities"
    )
    previous = None
    for result, densities_from in results:
        if previous != (result.geometry, result.device):
            print(f"\n{header}")
            previous = result.geometry, result.device
        w = result.workload
        layer = f"{result.dense_us:.1f} ->{result.sparse_us:>7.1f}"
        step = f"{result.dense_step_us / 1e3:.2f} ->{result.sparse_step_us / 1e3:>7.2f}"
        note = "" if result.fits else f"  DOES NOT FIT: {result.need_gb:.0f} of {result.device.memory_gb:.0f} GB"
        print(
            f"{result.geometry.name:9}{result.device.name:14}{w.batch:>6}{w.context:>8}{w.mlp_density:>6.2f}{w.head_density:>6.2f}"
            f"{w.union_heads:>6.2f}{layer:>17}{result.speedup:>6.2f}x{step:>17}{result.step_speedup:>6.2f}x  "
            f"{f'{result.dominant} {result.dominant_share:.0%}':17}{densities_from}{note}"
        )


def plot(path: Path, results: Sequence[tuple[Account, str]]) -> None:
    """Whole-step speed-up over batch size: one panel per context and device, one line per geometry."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--png needs matplotlib, which is not installed here: pip install matplotlib, or take --csv.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((r.workload.context, r.device.name) for r, _ in results))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.5), sharey=True, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(r.geometry.name for r, _ in results):
            points = [r for r, _ in results if (r.workload.context, r.device.name) == panel and r.geometry.name == name]
            (line,) = axis.plot([r.workload.batch for r in points], [r.step_speedup for r in points], label=name)
            for r in points:
                face = line.get_color() if r.fits else "white"
                axis.plot(r.workload.batch, r.step_speedup, "o", color=line.get_color(), markerfacecolor=face)
        batches = sorted({r.workload.batch for r, _ in results})
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{panel[1]}, context {panel[0]}", xlabel="batch")
    axes[0][0].set_ylabel("modelled speed-up of a decode step over dense")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle("MODEL, not a measurement, at assumed or given densities; hollow: does not fit in memory")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


OVERRIDES = tuple(f.name for f in fields(Device) if f.name != "name")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    default = Workload()
    parser = argparse.ArgumentParser(description="Launch-and-bytes MODEL of an OPT decode step, dense and sparse; measures nothing.")
    point = parser.add_argument_group("points, every combination")
    point.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES), metavar="NAME", help=", ".join(GEOMETRIES) + " (all)")
    point.add_argument("--device", nargs="+", choices=DEVICES, default=["h200"], metavar="NAME", help=", ".join(DEVICES) + " (%(default)s)")
    point.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64], help="(%(default)s)")
    point.add_argument("--context", nargs="+", type=int, default=[256, 1920], help="(%(default)s)")
    work = parser.add_argument_group("workload")
    work.add_argument("--mlp-density", type=float, help="union over the batch; not given: by geometry and batch, assumed")
    work.add_argument("--head-density", type=float, help="per sequence; not given: by geometry, assumed")
    work.add_argument("--head-union-density", type=float, help="not given: sequences choose independently")
    work.add_argument("--survivors", type=float, default=default.survivors, help="share of selected neurons that fc2 reads (%(default)s)")
    work.add_argument("--tp", type=int, default=default.tp, help="tensor-parallel size (%(default)s)")
    work.add_argument("--dtype-bytes", type=float, default=default.dtype_bytes, help="of weights and KV cache (%(default)s)")
    work.add_argument("--predictor-rank", type=int, help="not given: 3%% of the MLP's bytes; 0: none")
    work.add_argument("--predictor-dtype-bytes", type=float, default=default.predictor_dtype_bytes, help="(%(default)s)")
    work.add_argument("--launches", type=int, default=default.sparse_launches, help="of a sparse layer (%(default)s)")
    work.add_argument("--dense-launches", type=int, default=default.dense_launches, help="(%(default)s)")
    work.add_argument("--dense-projections", action="store_true", help="read all Q rows and out_proj columns")
    device = parser.add_argument_group("device, in place of the table's figures")
    for name in OVERRIDES:
        device.add_argument(f"--{name.replace('_', '-')}", type=float, help="not given: the table's")
    out = parser.add_argument_group("output")
    out.add_argument("--csv", type=Path)
    out.add_argument("--png", type=Path, help="needs matplotlib")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, overrides: dict[str, float]) -> list[tuple[Account, str]]:
    results = []
    for device in (replace(DEVICES[name], **overrides) for name in args.device):
        for name in args.geometry:
            for context in args.context:
                for batch in args.batch:
                    mlp, heads, densities_from = preset_densities(name, batch)
                    if args.mlp_density is not None and args.head_density is not None:
                        densities_from = "given"
                    elif args.mlp_density is not None:
                        densities_from = f"MLP given; rest: {densities_from}"
                    elif args.head_density is not None:
                        densities_from = f"heads given; rest: {densities_from}"
                    workload = Workload(
                        batch=batch,
                        context=context,
                        mlp_density=mlp if args.mlp_density is None else args.mlp_density,
                        head_density=heads if args.head_density is None else args.head_density,
                        head_union_density=args.head_union_density,
                        survivors=args.survivors,
                        tp=args.tp,
                        dtype_bytes=args.dtype_bytes,
                        predictor_rank=args.predictor_rank,
                        predictor_dtype_bytes=args.predictor_dtype_bytes,
                        dense_launches=args.dense_launches,
                        sparse_launches=args.launches,
                        skip_projections=not args.dense_projections,
                    )
                    results.append((account(GEOMETRIES[name], device, workload), densities_from))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    overrides = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    try:
        results = run(args, overrides)
    except ValueError as error:
        raise SystemExit(f"roofline.py: {error}") from None
    device = results[0][0].device
    print(BANNER)
    print(
        f"tp {args.tp}; launches a layer: dense {args.dense_launches}, sparse {args.launches}, {device.launch_us:g} us each; "
        f"efficiency {device.efficiency:g}; union: heads read by any sequence; step: with embeddings, lm_head, sampling"
    )
    if overrides:
        print("in place of the device table's figures: " + ", ".join(f"{name} {value:g}" for name, value in overrides.items()))
    print_table(results)
    if len(results) == 1:
        print_parts(results[0][0])
    if args.csv:
        rows = [csv_row(*result) for result in results]
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{len(rows)} rows: {args.csv}")
    if args.png:
        plot(args.png, results)
        print(f"plot: {args.png}")


if __name__ == "__main__":
    main(sys.argv[1:])
