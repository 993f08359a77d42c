"""What an implementation of the gated blocks is: the tensors it is given, by name, and what it computes of
them.

T is the number of rows of a step, padded. Two conventions run through all of it:

- `row_lens` [T], int32: rows with 0 only pad the batch; they select nothing and give 0. In a decode step it
  is vLLM's `seq_lens`.
- A list of neurons (`Selection`) comes in segments of SEGMENT neurons, each of which can be written without
  knowing the others: no sort, no pass over all neurons.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vllm_dejavu.kernels import packing

SEGMENT = 128
# What a gate's `counters` (int64) hold, in this order; callers may append counts of their own.
COUNTERS = ("steps", "rows", "selected", "read", "survived")


class Rows(NamedTuple):
    """A weight that rows or columns are gathered from.

    Attributes:
        weight: [rows, columns], of the inputs' dtype, or int8; or [rows, columns / 2], uint8, of 4 bits
            (`packing`). bias: [outputs], or None.
        scale: of int8: [outputs], fp32: an output is its sum of products times its scale, plus its bias. Of 4
            bits: [rows, columns / WEIGHT_GROUP], of any float type, or, transposed, [groups of rows,
            columns].
        transposed: whether the columns are the outputs, not the rows.
        output_scale: of 4 bits, transposed: [outputs], fp32, what an output is multiplied by besides; or
            None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    transposed: bool = False
    output_scale: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        return {torch.uint8: 4, torch.int8: 8}.get(self.weight.dtype, 16)

    @property
    def outputs(self) -> int:
        return self.weight.shape[1] * (2 if self.bits == 4 else 1) if self.transposed else len(self.weight)

    def floats(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [outputs, inputs] with its scales, in a float type."""
        if self.bits == 4:
            integers = packing.unpack(self.weight)
            wide = integers * packing.expand(self.scale, *integers.shape)
            if self.output_scale is not None:
                wide = wide * self.output_scale
            return (wide.t() if self.transposed else wide).to(dtype)
        weight = self.weight.t() if self.transposed else self.weight
        return weight.to(dtype) if self.scale is None else (weight * self.scale[:, None]).to(dtype)


class LowRank(NamedTuple):
    """A predictor of neurons: `score = up(down(x)) + bias`, with the threshold in the bias.

    Attributes:
        down: [rank, hidden]; up: [neurons, rank]; of any float type, or int8. bias: [neurons], fp32.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor


class Linear(NamedTuple):
    """A predictor of heads: `score = weight(x) + bias`.

    Attributes:
        weight: [heads, hidden], of any float type, or int8. bias: [heads], fp32.
    """

    weight: torch.Tensor
    bias: torch.Tensor


class Rider(NamedTuple):
    """A head predictor whose scores are computed on the way of a neuron predictor's, which saves a launch.

    Attributes:
        x: [T, hidden], what it reads.
    """

    x: torch.Tensor
    predictor: Linear


class Selection(NamedTuple):
    """The neurons that some row selects.

    Attributes:
        ids: [ffn], int32: the first `counts[s]` entries of segment s are the selected neurons out of
            [s * SEGMENT, (s + 1) * SEGMENT), ascending; the rest hold `ffn`.
        counts: [ceil(ffn / SEGMENT)], int32.
        mask: [T, ffn], bool: which row selected which, or None.
    """

    ids: torch.Tensor
    counts: torch.Tensor
    mask: torch.Tensor | None = None


class Mlp(NamedTuple):
    """Weights of an MLP.

    Attributes:
        up: [ffn, hidden]. down: [ffn, hidden], transposed, so that a neuron is a row of both; of up's dtype;
            its bias is added by the caller, after the sum over ranks.
        activation: "relu" or "relu2" (its square): 0 of what is not positive, so that such neurons add
            nothing and `down` skips them.
    """

    up: Rows
    down: Rows
    activation: str = "relu"


class Attention(NamedTuple):
    """Weights of attention.

    Attributes:
        qkv: [(heads + 2 * kv_heads) * head_size, hidden], rows in the order Q, K, V.
        out: [hidden, heads * head_size], or, transposed, [heads * head_size, hidden]; its bias is added by
            the caller, after the sum over ranks.
        split: (qkv [T, rows of qkv], positions [T]) -> query [T, heads, head_size], key and value
            [T, kv_heads, head_size], turned by a rotary embedding where there is one.
    """

    qkv: Rows
    out: Rows
    head_size: int
    split: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Cache(NamedTuple):
    """A layer's paged KV cache and the place of each row's sequence in it.

    Attributes:
        kv: [num_blocks, kv_heads, block_size, 2 * head_size] by any strides; K first, then V (the layout of
            vLLM's FLASH_ATTN and TRITON_ATTN backends).
        block_table: [T, max_blocks], int32. seq_lens: [T], int32, with the current token.
        max_model_len: no sequence is longer; implementations divide their work by it. None: whatever
            block_table holds.
    """

    kv: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    max_model_len: int | None = None


class Call(NamedTuple):
    """What is the same for every kernel of a gate in a step.

    Attributes:
        row_lens: [T], int32.
        counters: COUNTERS of the gate, to be added to; or None.
        workspace: scratch memory of implementations that need it, or None.
    """

    row_lens: torch.Tensor
    counters: torch.Tensor | None = None
    workspace: Any = None


class Asked(NamedTuple):
    """How the neurons of an MLP are to be chosen.

    Attributes:
        x: [T, hidden], what the predictor reads.
        with_mask: whether each row's own selection is wanted too.
        row_exact: whether each row is restricted to it; needs `with_mask`.
    """

    x: torch.Tensor
    predictor: LowRank
    rider: Rider | None = None
    with_mask: bool = False
    row_exact: bool = False


class Kernels:
    """An implementation, on one kind of device. `reference` says what each function gives.

    Attributes:
        name: for people. activations: that its MLPs know. weight_bits: of the weights that it takes.
        crossovers: {block: {hidden size: {tokens: union density}}} above which dense is faster than sparse,
            as measured for it; where nothing was measured, never. int8_crossovers: with weights of 8 bits.
        cache_crossover: keys of the cache (a head's of a token) that must be spared for reading only the
            selected heads' to pay, as measured; None: these kernels cannot, or it is their own affair.
        tile_crossover: by bits of weights, the share of the neurons which all tokens together need that a few
            of them may need for fc2 to go by these few, as measured; where nothing was: always.
        largest_batch: tokens of the largest batch that runs sparse until `tune` has measured a larger one;
            None: any.
    """

    name: str
    activations: tuple[str, ...] = ("relu",)
    weight_bits: tuple[int, ...] = (16,)
    crossovers: dict[str, dict[int, dict[int, float]]] = {}
    int8_crossovers: dict[str, dict[int, dict[int, float]]] = {}
    cache_crossover: int | None = None
    tile_crossover: dict[int, float] = {}
    largest_batch: int | None = None

    score_heads: Callable[..., torch.Tensor]
    select_neurons: Callable[..., tuple[Selection, torch.Tensor | None]]
    sparse_mlp: Callable[..., torch.Tensor]
    exact_down: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    sparse_qkv: Callable[..., torch.Tensor]
    mask_heads: Callable[..., torch.Tensor]
    sparse_out_proj: Callable[..., torch.Tensor]
    paged_attention: Callable[..., torch.Tensor]
    count_dense: Callable[..., None]

    def describe(self) -> str:
        return self.name

    def prepare_weight(self, weight: torch.Tensor) -> None:
        """Called with the memory of a weight that will be gathered from, allocated and not yet written."""

    def mlp_block(
        self, x: torch.Tensor, asked: Asked, mlp: Mlp, call: Call
    ) -> tuple[torch.Tensor, Selection, torch.Tensor | None]:
        """Predict, select, up, activation, down.

        Returns:
            [T, hidden]; the selection; the rider's head scores, or None.
        """
        selection, head_scores = self.select_neurons(
            asked.x, asked.predictor, call, asked.with_mask, asked.rider
        )
        masked = selection if asked.row_exact or selection.mask is None else selection._replace(mask=None)
        return self.sparse_mlp(x, mlp, masked, call), selection, head_scores

    def attention_block(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        head_scores: torch.Tensor,
        weights: Attention,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        call: Call,
        output: torch.Tensor,
    ) -> None:
        """q, k and v, attention, output projection, into `output` [T, hidden].

        Args:
            attend: (query [T, heads, head_size], key, value [T, kv_heads, head_size]) -> [T, heads,
                head_size], in which heads that a row did not select hold 0; it writes the cache, too.
        """
        qkv = self.sparse_qkv(x, weights.qkv, head_scores, weights.head_size, call)
        attn = attend(*weights.split(qkv, positions))
        self.sparse_out_proj(attn, weights.out, head_scores, output)


@functools.cache
def implementation(device_type: str) -> Kernels:
    """The kernels for a kind of device."""
    if device_type == "cuda":  # NVIDIA and AMD; imported here, so that a CPU installation needs no Triton
        from vllm_dejavu.kernels import gpu

        return gpu.KERNELS
    from vllm_dejavu.kernels import cpu, reference

    return cpu.KERNELS if device_type == "cpu" and cpu.available() else reference.KERNELS


def choose(device_type: str, activation: str, weight_bits: int = 16) -> Kernels:
    """The kernels of a block, once, when it is built.

    Raises:
        ValueError: there are none for such a block.
    """
    kernels = implementation(device_type)
    if weight_bits not in kernels.weight_bits:
        raise ValueError(
            f"{kernels.name} know weights of {list(kernels.weight_bits)} bits, not weight_bits={weight_bits}."
        )
    if activation not in kernels.activations:
        raise ValueError(
            f"{kernels.name} know the activations {list(kernels.activations)}, this model has {activation!r}."
            " Serve it without --model-impl dejavu."
        )
    return kernels
