"""Launch-and-bytes MODEL of one OPT decode step, dense and sparse. It computes; it measures nothing.

Needs the standard library only. On the command line: `vllm-dejavu plan` for one model, `plan --table` for
many points. The sizes, devices and densities that are known beforehand are in `published`.

A layer takes `bytes read and written / bandwidth + launches * cost of a launch + all-reduces`, every term
added: in a decode step each kernel waits for the one before it, so its start-up hides nothing. Use it to see
what a selection can give at best and which term is in the way, and beside a measurement
(`account(...).summary()`) to see what is left.

Left out, and why:
- activations: a few MiB a launch at most, at batch 64; they stay in the L2 cache, and both sides have them;
- biases and LayerNorm weights: 13 * hidden of 12 * hidden^2 elements, where ffn is 4 * hidden;
- arithmetic: at batch 64 a 16-bit weight meets 64 rows; these devices stop being bound by memory at 150 to
  300 (datasheet FLOP/s over bytes/s). Far larger batches are outside this model;
- slower reads of scattered rows: `efficiency` is the same for both sides. Kernels that gather worse lose that
much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vllm_dejavu.config import WEIGHT_BITS
from vllm_dejavu.families import Geometry
from vllm_dejavu.sizes import BYTE_BUDGET

BANNER = "MODEL, not a measurement: time = bytes / bandwidth + launches x launch cost (+ all-reduces)"

# What vLLM's OPT launches per layer and decode step: ten; merging the splits is a kernel of its own, ReLU
# too.
DENSE_LAUNCHES = (
    "add+LayerNorm",
    "qkv",
    "cache write",
    "attention",
    "attention merge",
    "out_proj",
    "add+LayerNorm",
    "fc1",
    "ReLU",
    "fc2",
)
# Our budget: the merge rides in out_proj, ReLU in fc1, the next layer's head scores in the predictor's
# down-projection.
SPARSE_LAUNCHES = (
    "add+LayerNorm",
    "qkv",
    "cache write",
    "attention",
    "out_proj",
    "add+LayerNorm",
    "predictor down",
    "predictor up+select",
    "fc1",
    "fc2",
)
# Outside the layers, once a step, alike on both sides (assumed).
STEP_LAUNCHES = ("embedding", "position embedding+add", "LayerNorm", "lm_head", "sample")

ALL_REDUCES_PER_LAYER = 2  # after out_proj and after fc2
POSITION_OFFSET = 2  # rows of OPT's table of positions that no token has
SCALE_BYTES = 2  # of quantized weights: one scale for each group of inputs of an output

# What is taken for granted of weight-only quantization, beside what the model says of itself.
QUANTIZATION_ASSUMPTIONS = (
    (
        "Only the layers' linear weights are quantized: values of 4 (or 8) bits, and a 16-bit scale for each"
        " group of 128 inputs of an output."
    ),
    "Embeddings, LM head and KV cache stay in 16 bits.",
    "Dequantization is free: hidden behind the reads, at every batch size.",
    (
        "Rows of 4-bit weights are gathered as efficiently as rows of 16-bit weights. No kernel of this"
        " project does that."
    ),
    (
        "fc2's scales belong to 128 neighbouring neurons together, so that a scattered selection reads nearly"
        " all of them; likewise out_proj's, for heads of fewer than 128."
    ),
    "Predictors stay as they are; their densities are taken to hold for quantized weights too.",
    "Launches are as many as without quantization.",
)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{type(owner).__name__}.{name} is {value}; it must be a positive number.")


def linear_weights(geometry: Geometry) -> int:
    """Of a layer: the four projections, and the two matrices of the MLP."""
    g = geometry
    return 2 * g.hidden_size * ((g.num_heads + g.num_kv_heads) * g.head_size + g.ffn_dim)


def embedding_weights(geometry: Geometry) -> int:
    """Of tokens, tied with the LM head, and of positions."""
    return (geometry.vocab_size + geometry.max_positions + POSITION_OFFSET) * geometry.hidden_size


def num_weights(geometry: Geometry) -> int:
    """Of layers and tied embeddings, without biases and norms."""
    return geometry.num_layers * linear_weights(geometry) + embedding_weights(geometry)


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        bandwidth_gbs: memory, datasheet, 1e9 bytes/s.
        link_gbs: what one device sends to all its peers together, one direction.
        peer_gbs: what it sends to one peer; below link_gbs where devices are wired in a mesh, without a
            switch.
        launch_us: one more dependent kernel in a captured graph.
        all_reduce_us: an all-reduce of nothing.
        efficiency: share of bandwidth_gbs that reads reach, dense and sparse alike. Ratios of bytes do not
            depend on it; below 1 launches weigh less beside the bytes, so speed-ups come out higher, not
            lower.
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
            raise ValueError(
                f"Device.efficiency is {self.efficiency}; it is a share of the datasheet bandwidth, at"
                " most 1."
            )

    def read_us(self, num_bytes: float) -> float:
        return num_bytes / (self.bandwidth_gbs * self.efficiency * 1e3)  # 1 GB/s is 1e3 bytes/us

    def group_gbs(self, tp: int) -> float:
        return min(self.link_gbs, self.peer_gbs * max(tp - 1, 1))


@dataclass(frozen=True)
class Workload:
    """One decode step: every sequence adds one token.

    Attributes:
        context: tokens each sequence attends to.
        mlp_density: neurons selected by any row of the batch (the union), all layers alike.
        head_density: heads selected per sequence. 1 means that attention is not gated: it then has no
            predictor.
        head_union_density: heads selected by any sequence. None takes sequences to choose independently,
            1 - (1 - head_density)^batch; sequences that agree have less.
        survivors: selected neurons that come out of fc1 positive; fc2 reads only those.
        tp: tensor-parallel size; weights, heads and neurons are split, the predictor's down-projection is
            not.
        dtype_bytes: of weights and KV cache.
        predictor_rank: of the MLP's predictor, down [rank, hidden] and up [ffn, rank]; 0 for none, None for
            the largest that has at most 3% of the MLP's bytes. The head predictor is linear: [num_heads,
            hidden].
        sparse_launches: per layer; beside SPARSE_LAUNCHES it may count fewer or more.
        skip_projections: read Q rows and out_proj columns of union heads only; False reads them all.
        dense_weight_bits, sparse_weight_bits: of the layers' linear weights, on either side; 8 or 4: with
            scales, and under QUANTIZATION_ASSUMPTIONS; 16: not quantized, dtype_bytes each.
        quantization_group: inputs of an output that share a scale.
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
    dense_weight_bits: int = 16
    sparse_weight_bits: int = 16
    quantization_group: int = 128

    def __post_init__(self) -> None:
        _positive(
            self, "batch", "context", "tp", "dtype_bytes", "predictor_dtype_bytes", "quantization_group"
        )
        for name in ("dense_weight_bits", "sparse_weight_bits"):
            if getattr(self, name) not in WEIGHT_BITS:
                raise ValueError(
                    f"Workload.{name} is {getattr(self, name)}; it must be one of {list(WEIGHT_BITS)}."
                )
        for name in ("mlp_density", "head_density", "head_union_density"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"Workload.{name} is {value}; a density is a share kept, in (0, 1].")
        if not 0 <= self.survivors <= 1:
            raise ValueError(
                f"Workload.survivors is {self.survivors}; it is a share of the selected neurons, in [0, 1]."
            )
        for name in ("predictor_rank", "dense_launches", "sparse_launches"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"Workload.{name} is {value}; it must be 0 or more.")
        union = self.head_union_density
        if (
            union is not None
            and not self.head_density <= union <= min(1.0, self.batch * self.head_density) + 1e-9
        ):
            raise ValueError(
                f"Workload.head_union_density is {union}; a union of {self.batch} sequences with"
                f" {self.head_density} each lies between that and their sum, at most 1. Leave it out to take"
                " them as independent."
            )

    @property
    def union_heads(self) -> float:
        """Share of heads that some sequence selects."""
        if self.head_union_density is not None:
            return self.head_union_density
        return 1 - (1 - self.head_density) ** self.batch

    def element_bytes(self, bits: int) -> tuple[float, float]:
        """Of a linear weight: its value, its share of a scale."""
        return (self.dtype_bytes, 0.0) if bits == 16 else (bits / 8, SCALE_BYTES / self.quantization_group)

    def groups_read(self, density: float, units: float) -> float:
        """Share of groups of inputs that a selection touches, if it is independent; units: selectable units
        in a group, below 1 taken as 1.
        """
        return 1 - (1 - density) ** max(1.0, units)

    def rank(self, geometry: Geometry) -> int:
        if self.predictor_rank is not None:
            return self.predictor_rank
        hidden, ffn = geometry.hidden_size, geometry.ffn_dim
        mlp_bytes = 2 * hidden * ffn * self.dtype_bytes
        return int(BYTE_BUDGET * mlp_bytes / ((hidden + ffn) * self.predictor_dtype_bytes))


@dataclass(frozen=True)
class Part:
    """Memory traffic of one part of a layer, on one rank."""

    dense_bytes: float
    sparse_bytes: float


@dataclass(frozen=True)
class Account:
    """Where the modelled time of one decode step goes. Bytes and times are those of one rank; `account` makes
    it.

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
        return (
            self.device.read_us(self.dense_bytes)
            + self.workload.dense_launches * self.device.launch_us
            + self.all_reduce_us
        )

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
        """False where the device cannot hold the model and its cache; True promises nothing about the
        rest.
        """
        return self.need_gb <= self.device.memory_gb

    def summary(self, name: str) -> str:
        """One line. name: of the model."""
        w = self.workload
        bits = (
            ""
            if w.dense_weight_bits == w.sparse_weight_bits == 16
            else f"weights in {w.dense_weight_bits} and {w.sparse_weight_bits} bits, "
        )
        return (
            f"model: {name} on {self.device.name}, batch {w.batch} x {w.context}, tp {w.tp},"
            f" {bits}MLP {w.mlp_density:.2f}, heads {w.head_density:.2f} (union {w.union_heads:.2f}): layer"
            f" {self.dense_us:.1f} -> {self.sparse_us:.1f} us, {self.speedup:.2f}x; step"
            f" {self.dense_step_us / 1e3:.2f} -> {self.sparse_step_us / 1e3:.2f} ms,"
            f" {self.step_speedup:.2f}x; most of sparse: {self.dominant} ({self.dominant_share:.0%})"
        )


def account(geometry: Geometry, device: Device, workload: Workload) -> Account:
    """Bytes, launches and time of one decode step, dense and sparse.

    Raises:
        ValueError: where tensor parallelism does not divide the heads.
    """
    g, w = geometry, workload
    if g.num_heads % w.tp:
        raise ValueError(
            f"The model has {g.num_heads} heads, which tp={w.tp} does not divide; take a divisor."
        )
    queries = g.hidden_size * g.num_heads * g.head_size / w.tp  # weights, this rank's share; of out_proj too
    keys = g.hidden_size * g.num_kv_heads * g.head_size / w.tp  # of values too
    matrix = g.hidden_size * g.ffn_dim / w.tp  # of fc1, and of fc2
    dense_element_bytes = sum(w.element_bytes(w.dense_weight_bits))
    value_bytes, scale_bytes = w.element_bytes(w.sparse_weight_bits)
    row_bytes = value_bytes + scale_bytes  # where whole rows are read: a scale belongs to one row
    token_kv_bytes = 2 * g.num_kv_heads * g.head_size * w.dtype_bytes / w.tp
    # a key is read where one of the queries that share it was selected
    read_keys = 1 - (1 - w.head_density) ** (g.num_heads // g.num_kv_heads)
    union = w.union_heads if w.skip_projections else 1.0
    fired = w.mlp_density * w.survivors
    union_groups = w.groups_read(union, w.quantization_group / g.head_size)
    gates_heads = w.head_density < 1
    predictor_elements = (
        w.rank(g) * (g.hidden_size + g.ffn_dim / w.tp) + gates_heads * g.num_heads / w.tp * g.hidden_size
    )
    parts = {
        # K and V always: the cache stays complete
        "qkv": Part((queries + 2 * keys) * dense_element_bytes, (union * queries + 2 * keys) * row_bytes),
        "KV write": Part(w.batch * token_kv_bytes, w.batch * token_kv_bytes),
        "KV read": Part(
            w.batch * w.context * token_kv_bytes, w.batch * w.context * token_kv_bytes * read_keys
        ),
        "out_proj": Part(
            queries * dense_element_bytes, queries * (union * value_bytes + union_groups * scale_bytes)
        ),
        "fc1": Part(matrix * dense_element_bytes, w.mlp_density * matrix * row_bytes),
        "fc2": Part(
            matrix * dense_element_bytes,
            matrix * (fired * value_bytes + w.groups_read(fired, w.quantization_group) * scale_bytes),
        ),
        "predictor": Part(0, predictor_elements * w.predictor_dtype_bytes),
    }

    hidden_bytes = w.batch * g.hidden_size * w.dtype_bytes
    logits_bytes = w.batch * g.vocab_size * w.dtype_bytes
    all_reduce_us = outer_link_us = 0.0
    if w.tp > 1:
        link_bytes_per_us = device.group_gbs(w.tp) * 1e3
        sent = (w.tp - 1) / w.tp
        one_us = device.all_reduce_us + 2 * hidden_bytes * sent / link_bytes_per_us
        all_reduce_us = ALL_REDUCES_PER_LAYER * one_us
        # The vocabulary is split as well: one all-reduce of the embedding, one gather of the logits.
        outer_link_us = one_us + device.all_reduce_us + logits_bytes * sent / link_bytes_per_us
    # lm_head; a token's and a position's row
    outer_bytes = g.vocab_size * g.hidden_size * w.dtype_bytes / w.tp + 2 * hidden_bytes
    outer_us = device.read_us(outer_bytes) + len(STEP_LAUNCHES) * device.launch_us + outer_link_us
    # Of the side with the larger weights: the layers' linear ones, embeddings beside them.
    linear_bytes = g.num_layers * linear_weights(g) * max(dense_element_bytes, row_bytes)
    embedding_bytes = embedding_weights(g) * w.dtype_bytes
    need_bytes = (linear_bytes + embedding_bytes) / w.tp + g.num_layers * parts["KV read"].dense_bytes
    return Account(g, device, w, parts, outer_bytes, all_reduce_us, outer_us, need_bytes / 1e9)


@dataclass(frozen=True)
class Quantized:
    """One point with weights in 16 bits and in fewer, dense and sparse; `quantized` makes it. Times in ms, of
    a decode step.
    """

    plain: Account
    small: Account
    bits: int
    break_even_mlp_density: float

    @property
    def times_ms(self) -> dict[str, float]:
        return {
            "dense 16": self.plain.dense_step_us / 1e3,
            f"dense INT{self.bits}": self.small.dense_step_us / 1e3,
            "sparse 16": self.plain.sparse_step_us / 1e3,
            f"sparse INT{self.bits}": self.small.sparse_step_us / 1e3,
        }


def quantized(geometry: Geometry, device: Device, workload: Workload, bits: int = 4) -> Quantized:
    """What sparsity, fewer bits and both together give.

    `break_even_mlp_density`: below it sparse with 16 bits is faster than dense with `bits`, heads as they
    are; at or below 0: at none.
    """
    plain = account(geometry, device, replace(workload, dense_weight_bits=16, sparse_weight_bits=16))
    small = account(geometry, device, replace(workload, dense_weight_bits=bits, sparse_weight_bits=bits))
    half, full = (
        account(geometry, device, replace(plain.workload, mlp_density=d)).sparse_us for d in (0.5, 1.0)
    )
    # the time is linear in the density
    return Quantized(plain, small, bits, 1 - (full - small.dense_us) / (2 * (full - half)))
