"""Custom operations, registered here only: opaque to torch.compile, dense or sparse by the one predicate
(`steps`).

Each op gets tensors and the name of its block; the block (its weights, gate and kernels) is looked up in
vLLM's forward context, as vLLM's own attention op does, and does the work.

No `from __future__ import annotations` here: torch derives the ops' schemas from these signatures.
"""

import functools
from typing import Any

import torch
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from vllm_dejavu.compat import (
    LayerNameType,
    direct_register_custom_op,
    eager_break_during_capture,
    resolve_layer_name,
)
from vllm_dejavu.kernels import cpu
from vllm_dejavu.kernels.interface import SEGMENT, Rows, Selection, implementation

_library = Library("dejavu", "FRAGMENT")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _block(layer_name: LayerNameType) -> Any:
    return get_forward_context().no_compile_layers[resolve_layer_name(layer_name)]


def _select_neurons(
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    units: int,
    with_mask: bool,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neurons of this step, predicted on a side stream beside the attention; `mlp` waits for them.

    Returns:
        ids, counts and mask of a `Selection` (mask [num_tokens or 0, units]); nothing in a dense step.
    """
    block = _block(layer_name)
    step = block.sparse_step(gate_input.shape[0])
    if step is None:
        return _select_neurons_fake(gate_input, positions, units, with_mask, layer_name)
    call = block.call(step, gate_input)
    main, side = torch.cuda.current_stream(), _side_stream(gate_input.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        chosen = block.choose(gate_input, positions, call)
    block.pending = (side.record_event(), call.row_lens)  # held until then: it may be a temporary
    mask = gate_input.new_empty((0, units), dtype=torch.bool) if chosen.mask is None else chosen.mask
    return chosen.ids, chosen.counts, mask


def _select_neurons_fake(
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    units: int,
    with_mask: bool,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new, rows = gate_input.new_empty, gate_input.shape[0]
    return (
        new((units,), dtype=torch.int32),
        new((-(-units // SEGMENT),), dtype=torch.int32),
        new((rows if with_mask else 0, units), dtype=torch.bool),
    )


def _mlp(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    previous: torch.Tensor | None,
    rider_units: int,
    early: list[torch.Tensor],
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The MLP without fc2's bias: this rank's part of the sum; riding along, the next layer's head scores.

    Args:
        x: [num_tokens, hidden]. gate_input: what the predictor reads; alive until here where it is read
            early.
        previous: what the next layer's head predictor reads, if it rides along. rider_units: its heads, or 0.
        early: from `select_neurons`; empty: they are predicted here.

    Returns:
        [num_tokens, hidden]; [num_tokens, rider_units], fp32.
    """
    chosen = None
    if early:
        ids, counts, mask = early
        chosen = Selection(ids, counts, mask if mask.shape[0] else None)
    out, head_scores = _block(layer_name).run(x, gate_input, positions, previous, chosen)
    if head_scores is None:
        head_scores = x.new_empty((x.shape[0], rider_units), dtype=torch.float32)
    return out, head_scores


def _mlp_fake(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    previous: torch.Tensor | None,
    rider_units: int,
    early: list[torch.Tensor],
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty((x.shape[0], rider_units), dtype=torch.float32)


def _qkv(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    head_scores: torch.Tensor | None,
    units: int,
    columns: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of all heads, Q of the selected, and which those are.

    Args:
        head_scores: of this layer, where the MLP before it has scored them; else they are predicted here.

    Returns:
        [num_tokens, columns]; head scores [num_tokens, units], fp32: a head of a row is selected when its
        score is positive. Where they were given, [num_tokens, 0]: an op must not return its argument.
    """
    qkv, scores = _block(layer_name).project(x, gate_input, positions, head_scores)
    if head_scores is not None:
        scores = x.new_empty((x.shape[0], 0), dtype=torch.float32)
    elif scores is None:
        scores = x.new_empty((x.shape[0], units), dtype=torch.float32)
    return qkv, scores


def _qkv_fake(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    head_scores: torch.Tensor | None,
    units: int,
    columns: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    scored = (x.shape[0], units if head_scores is None else 0)
    return x.new_empty((x.shape[0], columns)), x.new_empty(scored, dtype=torch.float32)


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
    _block(layer_name).attend(query, key, value, head_scores, output)


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


def _attention_block(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    head_scores: torch.Tensor | None,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """`qkv` and `attention` in one, where no graph is split between them: [num_tokens, hidden], no bias."""
    return _block(layer_name).run(x, gate_input, positions, head_scores)


def _attention_block_fake(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    head_scores: torch.Tensor | None,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return torch.empty_like(x)


def _integer_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    """A linear of integers that belongs to no gated block: [T, inputs] -> [T, outputs]."""
    rows = Rows(weight.data, bias, scale.data, transposed, output_scale)
    return implementation(x.device.type).linear(x, rows)


def _integer_linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], Rows(weight, bias, scale, transposed).outputs))


def _exact_down(h: torch.Tensor, hidden: int, layer_name: LayerNameType) -> torch.Tensor:
    """In mode `exact`: the activation and fc2, without its bias: [T, units] -> [T, hidden] of this rank."""
    return _block(layer_name).run(h)


def _exact_down_fake(h: torch.Tensor, hidden: int, layer_name: LayerNameType) -> torch.Tensor:
    return h.new_empty((h.shape[0], hidden))


# What the native ops (kernels/csrc/model.h) call where Python has to decide: they know a block by its number,
# and hand on the name that Python knows it by.


def _python_mlp(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    previous: torch.Tensor | None,
    rider_units: int,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _mlp(x, gate_input, positions, previous, rider_units, [], name)


def _python_attention(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    head_scores: torch.Tensor | None,
    name: str,
) -> torch.Tensor:
    return _attention_block(x, gate_input, positions, head_scores, name)


def _native_mlp_fake(
    x: torch.Tensor,
    gate_input: torch.Tensor,
    positions: torch.Tensor,
    previous: torch.Tensor | None,
    rider_units: int,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _mlp_fake(x, gate_input, positions, previous, rider_units, [], layer)


# Our attention runs eagerly between the pieces of a PIECEWISE graph, as vLLM's does
# (compilation_config.splitting_ops).
SPLITTING_OPS = ("dejavu::attention",)

for _name, _function, _fake, _mutates in (
    ("select_neurons", _select_neurons, _select_neurons_fake, []),
    ("mlp", _mlp, _mlp_fake, []),
    ("qkv", _qkv, _qkv_fake, []),
    ("attention", _attention, _attention_fake, ["output"]),
    ("attention_block", _attention_block, _attention_block_fake, []),
    ("integer_linear", _integer_linear, _integer_linear_fake, []),
    ("exact_down", _exact_down, _exact_down_fake, []),
    ("python_mlp", _python_mlp, None, []),
    ("python_attention", _python_attention, None, []),
):
    direct_register_custom_op(_name, _function, mutates_args=_mutates, fake_impl=_fake, target_lib=_library)

select_neurons = torch.ops.dejavu.select_neurons
mlp = torch.ops.dejavu.mlp
qkv = torch.ops.dejavu.qkv
attention = torch.ops.dejavu.attention
attention_block = torch.ops.dejavu.attention_block
integer_linear = torch.ops.dejavu.integer_linear
exact_down = torch.ops.dejavu.exact_down


def _native_exact_down_fake(
    h: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    output_scale: torch.Tensor | None,
    square: bool,
    crossover: float,
    counters: torch.Tensor | None,
) -> torch.Tensor:
    return h.new_empty((h.shape[0], Rows(weight, None, scale, True).outputs))


if current_platform.is_cpu() and cpu.available():
    torch.library.register_fake("dejavu_cpu::exact_down", _native_exact_down_fake)
    torch.library.register_fake("dejavu_cpu::mlp", _native_mlp_fake)
    torch.library.register_fake("dejavu_cpu::attention", _attention_block_fake)
    native_mlp = torch.ops.dejavu_cpu.mlp
    native_exact_down = torch.ops.dejavu_cpu.exact_down
    native_attention = torch.ops.dejavu_cpu.attention
