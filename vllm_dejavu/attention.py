"""The gated attention: K and V of all heads, queries, cache and output projection of the selected ones only.

Shapes as in `blocks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear

from vllm_dejavu import ops, selection
from vllm_dejavu.blocks import Flow, GatedBlock, Site
from vllm_dejavu.compat import Attention, encode_layer_name, get_attention_context
from vllm_dejavu.formats import config_of, gated_form, keep_gathered, linear_config, row_parallel, rows_of
from vllm_dejavu.gate import Calibrated
from vllm_dejavu.kernels import interface
from vllm_dejavu.kernels.interface import Call
from vllm_dejavu.metrics import GATE_COUNTERS
from vllm_dejavu.steps import Step

# Backends whose metadata holds max_query_len, seq_lens and num_actual_tokens, and whether our kernels can
# read their cache: vLLM's CPU backend packs a block for its own instructions.
ATTENTION_BACKENDS = {"CPU_ATTN": False, "FLASH_ATTN": True, "TRITON_ATTN": True}
SELECTED = GATE_COUNTERS.index("selected")
CACHE = slice(GATE_COUNTERS.index("cache_held"), GATE_COUNTERS.index("cache_read") + 1)


class DejaVuAttention(Attention):
    """vLLM's attention layer: the same backend, cache and cache write, called by our ops.

    The plain `forward(query, key, value)` stays vLLM's, for layers that are not gated.
    """

    # Whether our op writes keys and values to the cache itself. On a GPU vLLM's own op does, as in a layer
    # that is not gated: vLLM 0.26 splits graphs at it as at ours. A CPU has no graphs, and an op costs more
    # there than what it does.
    updates_cache = False
    # Called once after the weights are in place, whatever the load format.
    after_loading: Callable[[], None] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.after_loading is not None:
            self.after_loading()

    def write_cache(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
        """vLLM's op that writes the cache, where ours does not: what it gives only orders the ops."""
        if self.attn_backend.forward_includes_kv_cache_update or self.updates_cache:
            return None
        return torch.ops.vllm.unified_kv_cache_update(key, value, encode_layer_name(self.layer_name))


class GatedAttention(GatedBlock):
    """qkv -> paged attention -> out_proj; K and V are always computed and cached for all heads.

    Args:
        calibrated: the gate, or None: dense, vLLM's own layers.
        rotary: vLLM's rotary embedding, (positions, query, key) -> query, key; or None.
    """

    def __init__(
        self,
        site: Site,
        bias: bool,
        calibrated: Calibrated | None,
        rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ):
        super().__init__(site)
        geometry, vllm_config = site.geometry, site.vllm_config
        hidden, size = geometry.hidden_size, geometry.head_size
        names = ("qkv_proj", "out_proj")
        form = None if calibrated is None else gated_form(site, *names)
        config = {name: linear_config(site, name) if form is None else config_of(form.bits) for name in names}
        self.units, self.rotary = geometry.num_heads // self.ranks, rotary
        self.kv_heads = max(1, geometry.num_kv_heads // self.ranks)
        self.qkv_proj = QKVParallelLinear(
            hidden,
            size,
            geometry.num_heads,
            geometry.num_kv_heads,
            bias=bias,
            quant_config=config["qkv_proj"],
            prefix=f"{site.prefix}.qkv_proj",
        )
        width, prefix = geometry.num_heads * size, f"{site.prefix}.out_proj"
        self.out_proj = row_parallel(width, hidden, bias, config["out_proj"], prefix, form)
        self.attn = DejaVuAttention(
            self.units,
            size,
            scale=size**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{site.prefix}.attn",
        )
        self.hidden, self.head_size, self.attention_name = hidden, size, self.attn.layer_name
        # of query, key and value, side by side
        self.columns = [n * size for n in (self.units, self.kv_heads, self.kv_heads)]
        backend = self.attn.attn_backend.get_name()
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(
                f"model_impl='dejavu' does not support the attention backend {backend}: its metadata has no"
                f" sequence lengths to decide by. Choose one of {list(ATTENTION_BACKENDS)} with"
                " --attention-backend."
            )
        self.reads_cache = ATTENTION_BACKENDS[backend]
        includes_update = self.attn.attn_backend.forward_includes_kv_cache_update
        self.attn.updates_cache = backend == "CPU_ATTN" and not includes_update
        self.max_model_len = vllm_config.model_config.max_model_len
        if calibrated is None:
            return
        self.kernels = interface.choose(self.device_type, geometry.activation, form.bits)
        keep_gathered(self.kernels, self.qkv_proj, self.out_proj)
        self.attach(calibrated, "attention", site, self.units, form.bits)
        self.threshold = calibrated.spec.threshold
        # True contributions of all heads are wanted: the stock attention computes them, with true queries.
        self.needs_contributions = site.settings.measure or site.settings.mode == "oracle"
        self.reads_cache = self.reads_cache and not self.needs_contributions
        self.register_buffer("grams", None, persistent=False)

    def forward(self, x: torch.Tensor, flow: Flow) -> tuple[torch.Tensor, Flow]:
        """[T, hidden] -> [T, hidden]."""
        flow = flow._replace(attn_input=x)
        if self.gate is None:
            return self.stock(x, flow.positions), flow
        name = encode_layer_name(self.layer_name)
        gate_input = self.gate_input(x, flow)
        if self.number is not None:
            out = ops.native_attention(x, gate_input, flow.positions, flow.head_scores, self.number)
            return self.reduced(out, self.out_proj.bias), flow
        if self.attn.updates_cache:  # where nothing splits a graph: one op
            out = ops.attention_block(x, gate_input, flow.positions, flow.head_scores, name)
            return self.reduced(out, self.out_proj.bias), flow
        columns = sum(self.columns)
        qkv, scores = ops.qkv(x, gate_input, flow.positions, flow.head_scores, self.units, columns, name)
        scores = scores if flow.head_scores is None else flow.head_scores
        query, key, value = self.split(qkv, flow.positions)
        written = self.attn.write_cache(key, value)
        out = x.new_empty(x.shape[0], self.hidden)
        ops.attention(query, key, value, scores, out, name, written)
        return self.reduced(out, self.out_proj.bias), flow

    def stock(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """vLLM's own layers."""
        # flat, as vLLM's own models pass them: older versions take the output's shape from the query's
        query, key, value = (part.flatten(1) for part in self.split(self.qkv_proj(x)[0], positions))
        return self.out_proj(self.attn(query, key, value))[0]

    def split(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, sum of columns] -> query [T, units, head_size], key and value [T, kv_heads, head_size]."""
        query, key, value = qkv.split_with_sizes(self.columns, -1)
        if self.rotary is not None:
            query, key = self.rotary(positions, query, key)
        rows, size = qkv.shape[0], self.head_size
        return query.view(rows, -1, size), key.view(rows, -1, size), value.view(rows, -1, size)

    # Inside the ops:

    @functools.cached_property
    def weights(self) -> interface.Attention:
        qkv, out = rows_of(self.qkv_proj), rows_of(self.out_proj, bias=False)
        return interface.Attention(qkv, out, self.head_size, self.split)

    def choose(self, x: torch.Tensor, positions: torch.Tensor, call: Call) -> torch.Tensor:
        """Scores [T, units] by what the predictor reads; +1 and -1 where a control decides.

        The oracle decides after the attention, so all are +1.
        """
        mode = self.settings.mode
        if mode == "sparse":
            return self.kernels.score_heads(x, self.gate.predictor.weights, call)
        if mode == "oracle":
            return _scores_of((call.row_lens > 0)[:, None].expand(-1, self.units))
        return _scores_of(self.gate.select(positions, call.row_lens))

    def project(
        self,
        x: torch.Tensor,
        gate_input: torch.Tensor,
        positions: torch.Tensor,
        head_scores: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """K and V of all heads, Q of those selected: [T, rows of qkv], and the head scores, None in a
        dense step.
        """
        step, weights = self.sparse_step(x.shape[0]), self.weights
        if step is None:
            self.recall.foresee(self.step(), gate_input)
            return self.kernels.linear(x, weights.qkv), None
        call = self.call(step, x)
        if head_scores is None:
            head_scores = self.choose(gate_input, positions, call)
        if self.needs_contributions:
            return self.kernels.linear(x, weights.qkv), head_scores
        return self.kernels.sparse_qkv(x, weights.qkv, head_scores, weights.head_size, call), head_scores

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        head_scores: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attention over the paged cache and the output projection, into output [T, hidden] (no bias)."""
        step = self.sparse_step(query.shape[0])
        if step is None:
            attn = self.stock_attention(query, key, value)
            self.count_dense(attn)
            self.recall.check(lambda rows: self.contributes(attn[rows]))
            self.kernels.linear(attn.flatten(1), self.weights.out, output)
            return
        if self.needs_contributions:
            attn = self.stock_attention(query, key, value)
            head_scores = self.measured(attn, head_scores, step)
            attn = self.kernels.mask_heads(attn, head_scores)
        else:
            attn = self.selected_attention(query, key, value, head_scores, step)
        self.kernels.sparse_out_proj(attn, self.weights.out, head_scores, output)

    def run(
        self,
        x: torch.Tensor,
        gate_input: torch.Tensor,
        positions: torch.Tensor,
        head_scores: torch.Tensor | None,
    ) -> torch.Tensor:
        """The whole block but out_proj's bias: [T, hidden] of this rank."""
        output = x.new_empty(x.shape[0], self.hidden)
        step = self.step()
        if not self.selects(step, x.shape[0]) or self.needs_contributions:
            qkv, head_scores = self.project(x, gate_input, positions, head_scores)
            self.attend(*self.split(qkv, positions), head_scores, output)
            return output
        call = self.call(step, x)
        if head_scores is None:
            head_scores = self.choose(gate_input, positions, call)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return self.selected_attention(query, key, value, head_scores, step)

        if self.takes(step, x.shape[0]):
            self.kernels.attention_block(x, positions, head_scores, self.weights, attend, call, output)
            return output
        gate = self.gate
        self.kernels.count_dense(gate.counters, gate.dense_step, gate.selected_row, call.row_lens)
        gate.counters[SELECTED] += (head_scores > 0).sum()
        qkv = self.kernels.linear(x, self.weights.qkv)
        attn = attend(*self.split(qkv, positions))
        self.kernels.linear(attn.flatten(1), self.weights.out, output)
        return output

    def selects(self, step: Step | None, num_tokens: int) -> bool:
        """Whether heads are selected in a step: for the projections, or for the cache."""
        return self.takes(step, num_tokens) or (
            step is not None and step.sparse and self.gate.reads_selected(step)
        )

    def selected_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        head_scores: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        """[T, units, head_size], 0 for heads that a row did not select: straight from the cache where our
        kernels read it, else computed for all heads.
        """
        num_tokens = query.shape[0]
        row_lens = step.row_lens(num_tokens, query.device)
        if self.gate.recorder is not None:
            self.gate.observe(head_scores > 0, row_lens > 0)
        if not (self.reads_cache and step.has_sequences(num_tokens)):
            return self.kernels.mask_heads(self.stock_attention(query, key, value), head_scores)
        metadata, layer, kv_cache, slot_mapping = get_attention_context(self.attn.layer_name)
        if layer.updates_cache and slot_mapping is not None:
            layer.impl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        seq_lens = metadata.seq_lens[:num_tokens]
        cache = interface.Cache(kv_cache, metadata.block_table, seq_lens, self.max_model_len)
        call = Call(row_lens, None, self.workspace)
        return self.kernels.paged_attention(query, cache, layer.impl.scale, head_scores, call)

    def stock_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[T, units, head_size] by vLLM's backend, which writes the cache where it, or our op, has to."""
        metadata, layer, kv_cache, slot_mapping = get_attention_context(self.attn.layer_name)
        if layer.updates_cache and slot_mapping is not None:
            layer.impl.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.device_type == "cpu" and metadata is not None:
            self._count_cache(metadata)
        attn = torch.empty_like(query, memory_format=torch.contiguous_format)
        written = 0 if metadata is None else metadata.num_actual_tokens  # not what pads the batch
        if written < query.shape[0]:
            attn[written:].zero_()
        layer.impl.forward(layer, query, key, value, kv_cache, metadata, output=attn)
        return attn

    def _count_cache(self, metadata: Any) -> None:
        """All of it is read."""
        step = self.step()
        if self.gate is not None and step is not None and step.sparse and step.one_token_each:
            self.gate.counters[CACHE] += self.kv_heads * step.cached_tokens

    def contributes(self, attn: torch.Tensor) -> torch.Tensor:
        """[rows, units], bool: whether a head adds more than the threshold; without memory for grams."""
        return selection.contributions(attn, self.weights.out.floats(attn.dtype)) > self.threshold

    def measured(self, attn: torch.Tensor, head_scores: torch.Tensor, step: Step) -> torch.Tensor:
        """Count a selection against the true contributions; the scores that hold, which are the oracle's
        own.
        """
        valid = step.row_lens(attn.shape[0], attn.device) > 0
        if self.grams is None:
            self.grams = selection.head_grams(self.weights.out.floats(), self.units)
        active = selection.head_contributions(attn, self.grams) > self.threshold
        if self.settings.mode == "oracle":
            head_scores = _scores_of(active & valid[:, None])
        self.gate.count(head_scores > 0, valid, active)
        return head_scores


def _scores_of(mask: torch.Tensor) -> torch.Tensor:
    """Scores that select exactly a mask."""
    return torch.where(mask, 1.0, -1.0)
