"""Custom operations, registered here only: opaque to torch.compile, dense or sparse by one predicate.

Each op gets tensors and the name of its block; the block (its weights, gate and settings) is looked up in
vLLM's forward context, as vLLM's own attention op does. What runs inside is chosen by device in
`implementation`.

No `from __future__ import annotations` here: torch derives the ops' schemas from these signatures.
"""

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.library import Library
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context

from vllm_dejavu.compat import (
    LayerNameType,
    direct_register_custom_op,
    eager_break_during_capture,
    get_attention_context,
    resolve_layer_name,
)
from vllm_dejavu.kernels import cpu, reference

_library = Library("dejavu", "FRAGMENT")


@functools.cache
def implementation(device_type: str) -> ModuleType:
    """The kernels for a kind of device; every implementation has the signatures of `kernels.reference`."""
    if device_type == "cuda":  # NVIDIA and AMD; imported here, so that a CPU installation needs no Triton
        from vllm_dejavu.kernels import gpu

        return gpu
    return cpu if device_type == "cpu" and cpu.available() else reference


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass
class Step:
    """How the current forward pass runs.

    Attributes:
        reason: "sparse", or why it is dense (metrics.STEP_REASONS).
        metadata: attention metadata of the layer asked about.
        in_graph: whether this pass is captured in a CUDA graph or replayed from one: what Python does in it
            is done once.
        sparse: whether the reason is "sparse".
    """

    reason: str
    metadata: Any
    in_graph: bool = False

    def __post_init__(self) -> None:
        self.sparse = self.reason == "sparse"
        self._row_lens: torch.Tensor | None = None

    def row_lens(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """[num_tokens], int32: 0 for rows that only pad the batch. vLLM's own buffer wherever that has the
        rows.

        On a CPU made once a pass, whose ops ask several times a layer, always for as many tokens. Not on a
        GPU: what is captured in a graph may only read what was made in it.
        """
        if device.type != "cpu":
            return self._make_row_lens(num_tokens, device)
        if self._row_lens is None or self._row_lens.shape[0] != num_tokens:
            self._row_lens = self._make_row_lens(num_tokens, device)
        return self._row_lens

    def _make_row_lens(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        if self.metadata.max_query_len != 1:
            return (torch.arange(num_tokens, device=device) < self.metadata.num_actual_tokens).int()
        seq_lens = self.metadata.seq_lens[:num_tokens]
        missing = num_tokens - seq_lens.shape[0]
        return torch.nn.functional.pad(seq_lens, (0, missing)) if missing else seq_lens


def current_step(attention_name: str, apply_to: str) -> Step | None:
    """The predicate shared by all ops: does this forward pass take the sparse path?

    Decided on the host, when an op is called or captured, from what a captured graph cannot change: FULL
    decode graphs are captured with exactly max_query_len == 1, PIECEWISE graphs are replayed for any batch
    and stay dense.

    Returns:
        None in a pass without metadata (memory profiling, dummy batches): dense and not counted.
    """
    context: ForwardContext = get_forward_context()
    if context.attn_metadata is None:
        return None
    if not isinstance(context.attn_metadata, dict):
        return Step("microbatched", None)
    metadata = context.attn_metadata.get(attention_name)
    if metadata is None:
        return None
    # of this pass, by metadata, which layers share
    steps = context.additional_kwargs.setdefault(__name__, {})
    step = steps.get(id(metadata))
    if step is None:
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            reason = "piecewise_graph"
        else:
            reason = "sparse" if apply_to == "all" or metadata.max_query_len == 1 else "prefill_or_mixed"
        # vLLM's second model runner says NONE while it captures full graphs.
        in_graph = context.cudagraph_runtime_mode != CUDAGraphMode.NONE or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        )
        step = steps[id(metadata)] = Step(reason, metadata, in_graph)
    return step


def _block(layer_name: LayerNameType) -> Any:
    return get_forward_context().no_compile_layers[resolve_layer_name(layer_name)]


def _select_neurons(
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    previous: torch.Tensor | None,
    units: int,
    rider_units: int,
    with_row_mask: bool,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neurons of this step and, riding along, the next layer's head scores.

    Args:
        gate_input: [num_tokens, hidden]. previous: what the next layer's head predictor reads, if it rides
            along.
        units, rider_units: neurons; heads of the rider, 0 without one.

    Returns:
        neuron_ids [ffn] int32, counts [segments] int32, row_mask [num_tokens or 0, ffn] bool, head scores
        [num_tokens, rider_units].
    """
    block, num_tokens = _block(layer_name), gate_input.shape[0]
    step = block.sparse_step(num_tokens)
    rider = block.rider if rider_units and block.rider.sparse_step(num_tokens) is not None else None
    impl = implementation(gate_input.device.type)
    if rider_units and rider is None:
        block.rider.foresee(previous)
    if step is None:
        block.foresee(gate_input)
        ids, counts, mask, scores = _select_neurons_fake(
            gate_input, positions, previous, units, rider_units, with_row_mask, layer_name
        )
        if rider is not None:
            row_lens = rider.sparse_step(num_tokens).row_lens(num_tokens, gate_input.device)
            scores = rider.select(impl, previous, positions, row_lens)
        return ids, counts, mask, scores
    row_lens = step.row_lens(num_tokens, gate_input.device)
    if block.overlaps(gate_input.device):
        # Beside the attention; `_mlp` waits. It also holds gate_input, so that its memory is not given away
        # meanwhile.
        main, side = torch.cuda.current_stream(), _side_stream(gate_input.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            ids, counts, mask, scores = block.select(
                impl, gate_input, positions, row_lens, with_row_mask, None, None
            )
        block.pending = (side.record_event(), row_lens)  # held until then: it may be a temporary
    else:
        ids, counts, mask, scores = block.select(
            impl, gate_input, positions, row_lens, with_row_mask, rider, previous
        )
    if scores is None:
        scores = gate_input.new_empty((num_tokens, rider_units), dtype=torch.float32)
    return ids, counts, mask, scores


def _select_neurons_fake(
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    previous: torch.Tensor | None,
    units: int,
    rider_units: int,
    with_row_mask: bool,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    new, rows = gate_input.new_empty, gate_input.shape[0]
    return (
        new((units,), dtype=torch.int32),
        new((-(-units // reference.SEGMENT),), dtype=torch.int32),
        new((rows if with_row_mask else 0, units), dtype=torch.bool),
        new((rows, rider_units), dtype=torch.float32),
    )


def _mlp(
    x: torch.Tensor,
    neuron_ids: torch.Tensor,
    counts: torch.Tensor,
    row_mask: torch.Tensor,
    gate_input: torch.Tensor,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """MLP [num_tokens, hidden] -> [num_tokens, hidden] without fc2's bias: this rank's part of the sum.

    gate_input: what the neurons were predicted from; not read here, but alive until here.
    """
    block = _block(layer_name)
    step = block.sparse_step(x.shape[0])
    if step is None:
        return block.dense(implementation(x.device.type), x)
    if block.pending is not None:
        torch.cuda.current_stream().wait_event(block.pending[0])
        block.pending = None
    row_lens = step.row_lens(x.shape[0], x.device)
    return block.sparse(implementation(x.device.type), x, neuron_ids, counts, row_mask, row_lens)


def _mlp_fake(
    x: torch.Tensor,
    neuron_ids: torch.Tensor,
    counts: torch.Tensor,
    row_mask: torch.Tensor,
    gate_input: torch.Tensor,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return torch.empty_like(x)


def _select_heads(
    gate_input: torch.Tensor, positions: torch.Tensor, units: int, layer_name: LayerNameType
) -> torch.Tensor:
    """Head scores [num_tokens, heads], fp32: a head of a row is selected when its score is positive."""
    block = _block(layer_name)
    step = block.sparse_step(gate_input.shape[0])
    if step is None:
        block.foresee(gate_input)
        return _select_heads_fake(gate_input, positions, units, layer_name)
    row_lens = step.row_lens(gate_input.shape[0], gate_input.device)
    return block.select(implementation(gate_input.device.type), gate_input, positions, row_lens)


def _select_heads_fake(
    gate_input: torch.Tensor, positions: torch.Tensor, units: int, layer_name: LayerNameType
) -> torch.Tensor:
    return gate_input.new_empty((gate_input.shape[0], units), dtype=torch.float32)


def _qkv(
    x: torch.Tensor, head_scores: torch.Tensor, output_size: int, layer_name: LayerNameType
) -> torch.Tensor:
    """K and V of all heads, Q of the selected: [num_tokens, hidden] -> [num_tokens, 3 * heads *
    head_size].
    """
    block = _block(layer_name)
    step = block.sparse_step(x.shape[0])
    # What an unselected head would have contributed is measured with its true query.
    if block.needs_contributions or step is None:
        return implementation(x.device.type).linear(x, block.qkv_proj.weight, block.qkv_proj.bias)
    return block.sparse_qkv(
        implementation(x.device.type), x, head_scores, step.row_lens(x.shape[0], x.device)
    )


def _qkv_fake(
    x: torch.Tensor, head_scores: torch.Tensor, output_size: int, layer_name: LayerNameType
) -> torch.Tensor:
    return x.new_empty((x.shape[0], output_size))


@eager_break_during_capture
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_scores: torch.Tensor,
    output: torch.Tensor,
    layer_name: LayerNameType,
    kv_cache_dummy_dep: torch.Tensor | None = None,
) -> None:
    """Attention over the paged cache and the output projection, into output [num_tokens, hidden] (no bias).

    `kv_cache_dummy_dep` only orders this op behind the cache update, where that is another op
    (`DejaVuAttention.updates_cache`).
    """
    block, num_tokens = _block(layer_name), query.shape[0]
    metadata, layer, kv_cache, slot_mapping = get_attention_context(block.attn.layer_name)
    if layer.updates_cache and slot_mapping is not None:
        layer.impl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
    step = block.sparse_step(num_tokens)
    if (
        step is not None
        and block.reads_cache
        and metadata.max_query_len == 1
        and metadata.seq_lens.shape[0] >= num_tokens
    ):
        impl = implementation(query.device.type)
        block.paged(
            impl, query, kv_cache, metadata.block_table, metadata.seq_lens[:num_tokens], head_scores, output
        )
        return
    attn = torch.empty_like(query, memory_format=torch.contiguous_format)  # [num_tokens, heads, head_size]
    written = 0 if metadata is None else metadata.num_actual_tokens  # by the backend: not what pads the batch
    if written < num_tokens:
        attn[written:].zero_()
    layer.impl.forward(layer, query, key, value, kv_cache, metadata, output=attn)
    if step is None:
        block.project(implementation(query.device.type), attn, output)
        return
    row_lens = step.row_lens(num_tokens, query.device)
    block.sparse(implementation(query.device.type), attn, head_scores, row_lens, output)


def _attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_scores: torch.Tensor,
    output: torch.Tensor,
    layer_name: LayerNameType,
    kv_cache_dummy_dep: torch.Tensor | None = None,
) -> None:
    return


# Our attention runs eagerly between the pieces of a PIECEWISE graph, as vLLM's does
# (compilation_config.splitting_ops).
SPLITTING_OPS = ("dejavu::attention",)

for _name, _function, _fake, _mutates in (
    ("select_neurons", _select_neurons, _select_neurons_fake, []),
    ("mlp", _mlp, _mlp_fake, []),
    ("select_heads", _select_heads, _select_heads_fake, []),
    ("qkv", _qkv, _qkv_fake, []),
    ("attention", _attention, _attention_fake, ["output"]),
):
    direct_register_custom_op(_name, _function, mutates_args=_mutates, fake_impl=_fake, target_lib=_library)

select_neurons = torch.ops.dejavu.select_neurons
mlp = torch.ops.dejavu.mlp
select_heads = torch.ops.dejavu.select_heads
qkv = torch.ops.dejavu.qkv
attention = torch.ops.dejavu.attention
