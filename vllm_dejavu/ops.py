"""Custom operations, registered here only: opaque to torch.compile, dense or sparse by one predicate.

Each op gets tensors and the name of its block; the block (its weights, gate and settings) is looked up in vLLM's
forward context, as vLLM's own attention op does. What runs inside is chosen by device in `implementation`.

No `from __future__ import annotations` here: torch derives the ops' schemas from these signatures.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.library import Library
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context

from vllm_dejavu.compat import LayerNameType, direct_register_custom_op, get_attention_context, resolve_layer_name
from vllm_dejavu.kernels import reference

_library = Library("dejavu", "FRAGMENT")


def implementation(device: torch.device) -> ModuleType:
    """The kernels for a device; every implementation has the signatures of `kernels.reference`.

    TODO: ends being a constant when the Triton (cuda) and native (cpu) kernels arrive.
    """
    return reference


@dataclass(frozen=True)
class Step:
    """How the current forward pass runs.

    Attributes:
        reason: "sparse", or why it is dense (metrics.STEP_REASONS).
        metadata: attention metadata of the layer asked about.
    """

    reason: str
    metadata: Any

    @property
    def sparse(self) -> bool:
        return self.reason == "sparse"

    def valid_rows(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """[num_tokens], bool: False for rows that only pad the batch. Computed on the device."""
        rows = torch.arange(num_tokens, device=device)
        if self.metadata.max_query_len != 1:
            return rows < self.metadata.num_actual_tokens
        seq_lens = self.metadata.seq_lens[:num_tokens]
        valid = torch.zeros(num_tokens, dtype=torch.bool, device=device)
        valid[: seq_lens.shape[0]] = seq_lens > 0
        return valid


def current_step(attention_name: str, apply_to: str) -> Step | None:
    """The predicate shared by all ops: does this forward pass take the sparse path?

    Decided on the host, when an op is called or captured, from what a captured graph cannot change: FULL decode
    graphs are captured with exactly max_query_len == 1, PIECEWISE graphs are replayed for any batch and stay dense.

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
    if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
        return Step("piecewise_graph", metadata)
    if apply_to == "all" or metadata.max_query_len == 1:
        return Step("sparse", metadata)
    return Step("prefill_or_mixed", metadata)


def _block(layer_name: LayerNameType) -> Any:
    return get_forward_context().no_compile_layers[resolve_layer_name(layer_name)]


def _select_neurons(
    gate_input: torch.Tensor, positions: torch.Tensor, units: int, with_row_mask: bool, layer_name: LayerNameType
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neurons of this step: (neuron_ids [ffn] int32, num_selected [1] int32, row_mask [num_tokens or 0, ffn] bool)."""
    block = _block(layer_name)
    step = block.sparse_step(gate_input.shape[0])
    if step is None:
        return _select_neurons_fake(gate_input, positions, units, with_row_mask, layer_name)
    impl = implementation(gate_input.device)
    mask = block.select(impl, gate_input, positions, step.valid_rows(gate_input.shape[0], gate_input.device))
    ids, num_selected = impl.compact_union(mask)
    return ids, num_selected, mask if with_row_mask else mask[:0].clone()


def _select_neurons_fake(
    gate_input: torch.Tensor, positions: torch.Tensor, units: int, with_row_mask: bool, layer_name: LayerNameType
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    new, rows = gate_input.new_empty, gate_input.shape[0] if with_row_mask else 0
    return (
        new((units,), dtype=torch.int32),
        new((1,), dtype=torch.int32),
        new((rows, units), dtype=torch.bool),
    )


def _mlp(
    x: torch.Tensor,
    neuron_ids: torch.Tensor,
    num_selected: torch.Tensor,
    row_mask: torch.Tensor,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """MLP [num_tokens, hidden] -> [num_tokens, hidden] without fc2's bias: this rank's part of the sum."""
    block = _block(layer_name)
    step = block.sparse_step(x.shape[0])
    if step is None:
        return block.dense(x)
    valid = step.valid_rows(x.shape[0], x.device)
    return block.sparse(implementation(x.device), x, neuron_ids, num_selected, row_mask, valid)


def _mlp_fake(
    x: torch.Tensor,
    neuron_ids: torch.Tensor,
    num_selected: torch.Tensor,
    row_mask: torch.Tensor,
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
        return _select_heads_fake(gate_input, positions, units, layer_name)
    valid = step.valid_rows(gate_input.shape[0], gate_input.device)
    return block.select(implementation(gate_input.device), gate_input, positions, valid)


def _select_heads_fake(
    gate_input: torch.Tensor, positions: torch.Tensor, units: int, layer_name: LayerNameType
) -> torch.Tensor:
    return gate_input.new_empty((gate_input.shape[0], units), dtype=torch.float32)


def _qkv(x: torch.Tensor, head_scores: torch.Tensor, output_size: int, layer_name: LayerNameType) -> torch.Tensor:
    """K and V of all heads, Q of the selected: [num_tokens, hidden] -> [num_tokens, 3 * heads * head_size]."""
    block = _block(layer_name)
    # What an unselected head would have contributed is measured with its true query.
    if block.needs_contributions or block.sparse_step(x.shape[0]) is None:
        return block.qkv_proj(x)[0]
    proj = block.qkv_proj
    return implementation(x.device).sparse_qkv(x, proj.weight, proj.bias, head_scores > 0)


def _qkv_fake(
    x: torch.Tensor, head_scores: torch.Tensor, output_size: int, layer_name: LayerNameType
) -> torch.Tensor:
    return x.new_empty((x.shape[0], output_size))


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

    One op, so that a GPU kernel can fuse the merge of its splits with the projection. `kv_cache_dummy_dep` only
    orders this op behind the cache update.
    """
    block = _block(layer_name)
    metadata, layer, kv_cache, _ = get_attention_context(block.attn.layer_name)
    # [num_tokens, heads, head_size]; rows that pad the batch are not written by the backend
    attn = torch.zeros_like(query)
    layer.impl.forward(layer, query, key, value, kv_cache, metadata, output=attn)
    step = block.sparse_step(query.shape[0])
    if step is None:
        output.copy_(block.project(attn))
        return
    valid = step.valid_rows(query.shape[0], query.device)
    block.sparse(implementation(query.device), attn, head_scores, valid, output)


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


# Our attention runs eagerly between the pieces of a PIECEWISE graph, as vLLM's does (compilation_config.splitting_ops).
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
