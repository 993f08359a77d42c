"""A model's gated blocks in the hands of the native kernels: on a CPU a step goes through them without
Python.

Between two lines of Python a layer's weights pass through the caches, so that each line is fetched from
memory again: what a step asks of a block is told once (`_bind`), what is the same for all blocks once a pass
(`begin`). The native ops (kernels/csrc/model.h) do the rest, vLLM's own operators for the cache and the
attention included; where only Python can do something, in a pass or a block, they call our Python ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vllm_dejavu.attention import GatedAttention
from vllm_dejavu.blocks import GatedBlock
from vllm_dejavu.compat import (
    CPU_ATTENTION_SETTINGS,
    cpu_attention_splits,
    get_attention_context,
    key_and_value_cache,
    rotary_cache,
)
from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.kernels import cpu
from vllm_dejavu.mlp import GatedMLP
from vllm_dejavu.steps import Step

SELECTED_HEADS = 2  # of what `use_cache` answers


class NativeBlocks:
    """Of the layers of a pipeline stage. Gated blocks get their `number`, by which the native ops know them.

    Args:
        row_exact: whether each row is restricted to its own neurons.
    """

    def __init__(self, layers: Sequence[tuple[GatedAttention, GatedMLP]], row_exact: bool):
        self.attentions = {i: a for i, (a, _) in enumerate(layers) if _native(a) and a.attn.updates_cache}
        rotaries = {i: rotary_cache(a.rotary, a.qkv_proj.params_dtype) for i, a in self.attentions.items()}
        self.rotaries = {i: found for i, found in rotaries.items() if found is not None}
        self.attentions = {i: a for i, a in self.attentions.items() if i in self.rotaries}
        self.mlps = {i: mlp for i, (_, mlp) in enumerate(layers) if _native(mlp)}
        for blocks in (self.attentions, self.mlps):
            for i, block in blocks.items():
                block.number = i
        self.gates = [b.gate for b in (*self.attentions.values(), *self.mlps.values())]
        self.handle = torch.classes.dejavu_cpu.Model(len(layers), row_exact)
        self.bound = False
        self.first = next(iter(self.attentions.values()), None)
        self.cache: torch.Tensor | None = None  # the first layer's, when all were made known
        self.attends = False  # whether attention is native too

    def begin(self, step: Step | None, num_tokens: int) -> None:
        """In front of a forward pass of so many tokens, padding included."""
        if not self.bound:
            self._bind()
        # A recorder is Python's, and so is the sampling of recall.
        if step is None or step.metadata is None or any(gate.recorder is not None for gate in self.gates):
            self.handle.begin_other()
            return
        mlps = [i for i, mlp in self.mlps.items() if mlp.recall.due(step)]
        attentions = [i for i, attention in self.attentions.items() if attention.recall.due(step)]
        row_lens = step.row_lens(num_tokens, torch.device("cpu"))
        metadata, slots, tensors = step.metadata, None, [row_lens] * 4
        causal, row_is_sequence = True, False
        if self.first is not None:
            if self.first.attn.kv_cache is not self.cache:
                self._use_cache()
            if self.attends:
                slots = get_attention_context(self.first.attn.layer_name)[3]
                causal, row_is_sequence = metadata.causal, step.one_token_each
                tensors = [metadata.query_start_loc, metadata.seq_lens]
                tensors += [metadata.block_table, metadata.scheduler_metadata]
        aside, how = (mlps, attentions), (causal, row_is_sequence)
        self.handle.begin(step.sparse, *aside, row_lens, slots, tensors, metadata.num_actual_tokens, *how)

    def end(self) -> None:
        self.handle.end()

    def _bind(self) -> None:
        """Once the weights are in place."""
        numbers = {id(attention): i for i, attention in self.attentions.items()}
        for i, mlp in self.mlps.items():
            predictor, (up, down, activation) = mlp.gate.predictor.weights, mlp.weights
            rider = -1 if mlp.rider is None else numbers.get(id(mlp.rider), -1)
            weights = up.weight, up.scale, up.bias, *cpu.KERNELS.transposed(down)
            weights += activation == "relu2", cpu.KERNELS.tile_share(down)
            self.handle.add_mlp(i, *_gate(mlp), list(predictor), *weights, rider)
        for i, attention in self.attentions.items():
            predictor, (qkv, out, size, _) = attention.gate.predictor.weights, attention.weights
            weights = qkv.weight, qkv.scale, qkv.bias, *cpu.KERNELS.transposed(out), out.transposed
            heads = [attention.units, attention.kv_heads, size]
            named = *_gate(attention), list(predictor), *weights, heads
            self.handle.add_attention(i, *named, *self.rotaries[i])
        self.bound = True

    def _use_cache(self) -> None:
        """Once vLLM has given the layers their caches, in a pass whose metadata all of them share.

        Native in all layers, or in none.
        """
        context = get_attention_context(self.first.attn.layer_name)
        self.cache = context[2]
        ways = {i: self._use_cache_of(i, a, context) for i, a in self.attentions.items()}
        self.attends = all(ways.values())
        if not self.attends:
            self.handle.forget_caches()
        for i, attention in self.attentions.items():
            reads = self.attends and ways[i] == SELECTED_HEADS
            attention.gate.least_cached = least_cached(attention) if reads else None

    def _use_cache_of(self, i: int, attention: GatedAttention, context: tuple[Any, ...]) -> int:
        """How a layer's attention can be native, as `use_cache` says it; context: of the first one."""
        metadata, layer, cache, slots = get_attention_context(attention.attn.layer_name)
        shared = metadata is context[0] and slots is context[3]
        pair = key_and_value_cache(cache, attention.kv_heads, attention.head_size)
        plain = getattr(metadata, "dynamic_causal", None) is None
        if not (shared and plain and pair and CPU_ATTENTION_SETTINGS <= vars(layer.impl).keys()):
            return 0
        impl = layer.impl
        numbers = [impl.scale, float(impl.logits_soft_cap), layer._k_scale_float, layer._v_scale_float]
        fixed: list[Any] = [layer.isa, impl.kv_cache_dtype, numbers, impl.sliding_window]
        fixed += [impl.alibi_slopes, impl.sinks, cpu_attention_splits()]
        return self.handle.use_cache(i, *pair, *fixed, least_cached(attention))


def least_cached(attention: GatedAttention) -> int | None:
    """Tokens of a decode step's sequences, all together, from which on reading only the selected heads' cache
    is expected to spare as much as it has to; None: never.
    """
    density, group = attention.gate.spec.density["mean"], attention.units // attention.kv_heads
    spared = (1 - density) ** group  # a key is read for all queries of its group
    if attention.gate.cache_crossover is None or spared <= 0:
        return None
    return math.ceil(attention.gate.cache_crossover / (attention.kv_heads * spared))


def native_blocks(
    settings: DejaVuConfig, layers: Sequence[tuple[GatedAttention, GatedMLP]]
) -> NativeBlocks | None:
    """None where steps need more than the native kernels do: controls, measurements."""
    if settings.mode != "sparse" or settings.measure:
        return None
    if not any(_native(block) for pair in layers for block in pair):
        return None
    return NativeBlocks(layers, settings.masks_rows)


def _native(block: GatedBlock) -> bool:
    return block.gate is not None and block.kernels is cpu.KERNELS


def _gate(block: GatedBlock) -> tuple[str, list[torch.Tensor], int]:
    """Name for the forward context, counters, most tokens of a sparse step."""
    gate = block.gate
    most = -1 if gate.max_tokens is None or gate.settings.apply_to == "all" else gate.max_tokens
    return block.layer_name, [gate.counters, gate.dense_step, gate.dense_row, gate.selected_row], most
