"""Gated MLP and attention blocks: the dense path is vLLM's own, the sparse path reads what the gate selected.

Shapes: T tokens (padded), hidden, `units` = neurons or heads of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from vllm_dejavu import metrics, ops, selection
from vllm_dejavu.artifact import GateSpec
from vllm_dejavu.compat import Attention, encode_layer_name, keep_plain_weight
from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.kernels import reference
from vllm_dejavu.predictor import Predictor

# Called after each pass of a gated block as recorder(layer, block, mask [T, units], valid [T]), with None and
# None where the block ran dense. Tests set it on eager engines; None while serving.
Recorder = Callable[[int, str, torch.Tensor | None, torch.Tensor | None], None]


# Backends whose metadata holds max_query_len, seq_lens and num_actual_tokens, and whether our kernels can
# read their cache: vLLM's CPU backend packs a block for its own instructions.
ATTENTION_BACKENDS = {"CPU_ATTN": False, "FLASH_ATTN": True, "TRITON_ATTN": True}


class Gate(nn.Module):
    """Predictor, threshold and counters of one block on this rank.

    Args:
        spec, tensors: as `Artifact.gate` gives them (all ranks' units).
        tuned: {tokens: union density} from which on dense is faster, as measured on this device (`tune`), or
            None: as the kernels' own table has it.
        block: "mlp" or "attention". layer: index in the whole model.
        units: neurons or heads of this rank.
    """

    def __init__(
        self,
        spec: GateSpec,
        tensors: dict[str, torch.Tensor],
        tuned: dict[int, float] | None,
        block: str,
        layer: int,
        units: int,
        settings: DejaVuConfig,
    ):
        super().__init__()
        self.spec, self.block, self.layer, self.units, self.settings = spec, block, layer, units, settings
        self.start = get_tensor_model_parallel_rank() * units
        device = torch.get_default_device()
        self.predictor = Predictor(tensors, self.start, units, device)
        # The oracle looks at the block's own input: it asks what is truly active, not what can be foreseen.
        self.lookahead = "self" if settings.mode == "oracle" else spec.lookahead
        kernels = ops.implementation(device.type)
        cap = kernels.LARGEST_BATCH
        if tuned is None:
            tuned = _of_size(kernels.CROSSOVERS.get(block, {}), self.predictor.hidden)
        elif cap is not None:
            cap = max((cap, *tuned))
        self.max_tokens = _largest_batch(spec, settings.crossover, tuned, cap)
        static = selection.static_units(tensors["activation_rate"], spec.density["mean"])
        self.register_buffer("static", static[self.start : self.start + units].to(device), persistent=False)
        self.register_buffer(
            "unit_ids", torch.arange(self.start, self.start + units, device=device), persistent=False
        )
        self.register_buffer("counters", metrics.new_gate_counters(device), persistent=False)
        # What a dense pass adds to the counters: once, and for each row.
        everything = (
            {"steps": 1, "read": units, "survived": units, "above_crossover": 1},
            {"rows": 1, "selected": units},
        )
        for name, counts in zip(("dense_step", "dense_row"), everything, strict=True):
            self.register_buffer(
                name,
                torch.tensor([counts.get(c, 0) for c in metrics.GATE_COUNTERS], device=device),
                persistent=False,
            )
        self.recorder: Recorder | None = None
        self.calibrated_bias: torch.Tensor | None = None  # kept while everything is selected
        self.long_passes = 0

    def takes(self, num_tokens: int) -> bool:
        """Whether a sparse step of so many tokens, padding included, is sparse in this block."""
        return self.max_tokens is None or num_tokens <= self.max_tokens or self.settings.apply_to == "all"

    def set_dense(self, dense: bool) -> None:
        """Select everything, by biases that no score can outweigh: also in graphs that are captured
        already.
        """
        if dense and self.calibrated_bias is None:
            self.calibrated_bias = self.predictor.bias.clone()
            self.predictor.bias.fill_(torch.inf)
        elif not dense and self.calibrated_bias is not None:
            self.predictor.bias.copy_(self.calibrated_bias)
            self.calibrated_bias = None

    def select(self, positions: torch.Tensor, row_lens: torch.Tensor) -> torch.Tensor:
        """Mask [T, units], bool, of the controls that need neither predictor nor the block's own weights."""
        if self.settings.mode == "static":
            chosen = self.static[None, :]
        else:
            assert self.settings.mode == "random", f"mode {self.settings.mode} has no selection of its own"
            chosen = selection.random_mask(
                positions, self.layer, self.unit_ids, self.spec.density["mean"], self.settings.seed
            )
        return chosen & (row_lens > 0)[:, None]

    def count(self, mask: torch.Tensor, valid: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """Add a step's selection to the counters, where the kernels did not, and show it to the recorder."""
        selected = mask.sum()
        active_count = hit = selected.new_zeros(())
        if active is not None:
            active = active & valid[:, None]
            active_count, hit = active.sum(), (active & mask).sum()
        read = mask.any(dim=0).sum()
        zero, one = selected.new_zeros(()), selected.new_ones(())
        amounts = [one, valid.sum(), selected, read, zero, active_count, hit]
        self.counters[: len(amounts)] += torch.stack(amounts)
        self.observe(mask, valid)

    def observe(self, mask: torch.Tensor, valid: torch.Tensor) -> None:
        if self.recorder is not None:
            self.recorder(self.layer, self.block, mask, valid)


def _of_size(measured: dict[int, dict[int, float]], hidden: int) -> dict[int, float]:
    """Crossovers by tokens for a hidden size: those of the largest measured one that is not above it, else of
    the smallest.
    """
    return (
        measured[max((size for size in measured if size <= hidden), default=min(measured))]
        if measured
        else {}
    )


def _largest_batch(
    spec: GateSpec, crossover: float | None, measured: dict[int, float], cap: int | None = None
) -> int | None:
    """Largest padded token count up to which a gate's union density stays below the crossover; None: all do.

    Args:
        crossover: the setting; None takes `measured`, {tokens: density}, and no more tokens than `cap`.
    """
    if crossover is not None:
        cap = None

    def limit(tokens: int) -> float:
        if crossover is not None:
            return crossover
        return measured.get(max((size for size in measured if size <= tokens), default=-1), 1.0)

    # A union only grows with the batch, so what lies beyond the calibrated sizes counts as over.
    last = max(map(int, spec.union_density), default=0)
    if not last or all(limit(tokens) >= 1 for tokens in range(1, last + 1)):
        return cap
    over = (tokens - 1 for tokens in range(1, last + 1) if spec.density_at(tokens) > limit(tokens))
    return min(next(over, last), last if cap is None else cap)


# Prompts of at least this many tokens are sampled, on so many rows: there the products of a few rows more are
# noise.
LONG_PASS, SAMPLED_ROWS = 64, 8


class _GatedBlock(nn.Module):
    """What the MLP and the attention block share: whether this step takes the sparse path, and recall on
    prompts.
    """

    gate: Gate | None
    settings: DejaVuConfig
    attention_name: str
    # Rows of this pass [SAMPLED_ROWS] and what the predictor says of them [SAMPLED_ROWS, units], until
    # `check` compares.
    foreseen: tuple[torch.Tensor, torch.Tensor] | None = None
    workspace: Any = None  # launch.Workspace where the kernels need one; set by the model

    def sparse_step(self, num_tokens: int) -> ops.Step | None:
        """The step if this block runs sparse in it, else None."""
        if self.gate is None:
            return None
        step = ops.current_step(self.attention_name, self.settings.apply_to)
        if step is None or not step.sparse:
            return None
        return step if self.gate.takes(num_tokens) else None

    def count_dense(self, num_tokens: int, device: torch.device) -> None:
        """Count a dense pass: nothing in a dense step; everything where only this layer, above its crossover,
        is dense.
        """
        gate, step = self.gate, ops.current_step(self.attention_name, self.settings.apply_to)
        if step is None:
            return
        if gate.recorder is not None:
            gate.recorder(gate.layer, gate.block, None, None)
        if step.sparse:
            row_lens = step.row_lens(num_tokens, device)
            ops.implementation(device.type).count_dense(
                gate.counters, gate.dense_step, gate.dense_row, row_lens
            )

    def foresee(self, gate_input: torch.Tensor) -> None:
        """Called in dense passes with what the predictor would read: predict on a few rows of some long ones.

        Only where Python runs in each pass, not in captured graphs; there, prompts too long for a graph are
        what is sampled.
        """
        self.foreseen = None
        gate, every = self.gate, self.settings.sample_recall
        step = ops.current_step(self.attention_name, self.settings.apply_to)
        if (
            step is None
            or step.in_graph
            or step.reason != "prefill_or_mixed"
            or self.settings.mode != "sparse"
            or not every
            or gate.calibrated_bias is not None
        ):
            return
        if (tokens := step.metadata.num_actual_tokens) < LONG_PASS:
            return
        gate.long_passes += 1
        if (gate.long_passes + gate.layer) % every == 0:  # not all layers in the same pass
            rows = torch.arange(SAMPLED_ROWS, device=gate_input.device) * tokens // SAMPLED_ROWS
            self.foreseen = rows, gate.predictor.scores(gate_input[rows]) > 0

    def check(self, true_active: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Count what was foreseen in this pass against the truth; true_active: rows -> [rows, units],
        bool.
        """
        if self.foreseen is None:
            return
        (rows, chosen), self.foreseen = self.foreseen, None
        active = true_active(rows)
        amounts = {
            "rows": active.new_ones(len(rows)),
            "selected": chosen,
            "active": active,
            "hit": chosen & active,
        }
        first = metrics.GATE_COUNTERS.index("sampled_rows")
        self.gate.counters[first : first + len(amounts)] += torch.stack(
            [amount.sum() for amount in amounts.values()]
        )

    def register(self, vllm_config: VllmConfig, name: str) -> None:
        """Make this block findable by the ops."""
        context = vllm_config.compilation_config.static_forward_context
        if name in context:
            raise ValueError(f"Duplicate layer name: {name}")
        context[name] = self
        self.layer_name = name


def _prepare(*linears: nn.Module) -> None:
    """Let the kernels see weights that they will gather from, before these are loaded."""
    for linear in linears:
        ops.implementation(linear.weight.device.type).prepare_weight(linear.weight)


class TransposedRowParallelLinear(nn.Module):
    """fc2 stored as [ffn / tp, hidden], so that a neuron's weights are contiguous. Never a second copy.

    Holds `weight` and `bias` [hidden]; the bias is added once, after the all-reduce.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool):
        super().__init__()
        self.size = input_size // get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.empty(self.size, output_size), requires_grad=False)
        self.weight.weight_loader = self.load_weight
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None

    def load_weight(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        """Checkpoint layout [hidden, ffn] -> this rank's rows, transposed."""
        start = get_tensor_model_parallel_rank() * self.size
        param.data.copy_(loaded.narrow(1, start, self.size).t())


class DejaVuMLP(_GatedBlock):
    """fc1 -> activation -> fc2; gated when the manifest says so, else vLLM's own linears.

    Args:
        gate: (spec, tensors, tuned) of `Gate`, or None: dense, no predictor is launched.
        activation: key of `reference.ACTIVATIONS`.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        bias: bool,
        activation: str,
        layer: int,
        gate: tuple | None,
        settings: DejaVuConfig,
        vllm_config: VllmConfig,
        prefix: str,
        attention_name: str,
    ):
        super().__init__()
        self.settings, self.activation, self.attention_name = settings, activation, attention_name
        self.units = ffn // get_tensor_model_parallel_world_size()
        self.fc1 = ColumnParallelLinear(hidden, ffn, bias=bias, prefix=f"{prefix}.fc1")
        if gate is None:
            self.gate = None
            self.fc2 = RowParallelLinear(ffn, hidden, bias=bias, prefix=f"{prefix}.fc2")
            return
        keep_plain_weight(self.fc1)
        self.fc2 = TransposedRowParallelLinear(ffn, hidden, bias)
        _prepare(self.fc1, self.fc2)
        self.gate = Gate(*gate, "mlp", layer, self.units, settings)
        self.needs_row_mask = settings.masks_rows or settings.measure
        # A prediction under way on the side stream, and what it reads that nobody else holds.
        self.pending: tuple[torch.cuda.Event, torch.Tensor] | None = None
        self._rider: tuple[DejaVuSelfAttention, ...] = ()
        self.register(vllm_config, f"{prefix}.dejavu_mlp")

    @property
    def rider(self) -> DejaVuSelfAttention | None:
        """The next layer's attention, if its head scores are computed in this predictor's launch."""
        return self._rider[0] if self._rider else None

    def carry(self, attention: DejaVuSelfAttention) -> None:
        """Let a later layer's head predictor (lookahead `previous`) ride along. In a tuple: it is not our
        submodule.
        """
        self._rider = (attention,)

    def overlaps(self, device: torch.device) -> bool:
        """Whether prediction runs on a side stream, beside the attention."""
        return self.settings.overlap and self.gate.lookahead != "self" and device.type == "cuda"

    def choose(
        self, gate_input: torch.Tensor, positions: torch.Tensor, previous: torch.Tensor | None = None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Neurons of this step, for `forward`, and the rider's head scores [T, heads] or None. May run before
        the attention.

        Args:
            gate_input: [T, hidden]. previous: residual in front of this MLP block; read by the rider.
        """
        rider = self.rider
        ids, counts, row_mask, head_scores = ops.select_neurons(
            gate_input,
            positions,
            None if rider is None else previous,
            self.units,
            0 if rider is None else rider.units,
            self.needs_row_mask or self.gate.recorder is not None,
            encode_layer_name(self.layer_name),
        )
        return (ids, counts, row_mask, gate_input), None if rider is None else head_scores

    def forward(self, x: torch.Tensor, chosen: tuple[torch.Tensor, ...] | None) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]; chosen: from `choose`, None for a dense layer."""
        if chosen is None:
            return self.fc2(reference.ACTIVATIONS[self.activation](self.fc1(x)[0]))[0]
        out = ops.mlp(x, *chosen, encode_layer_name(self.layer_name))
        if get_tensor_model_parallel_world_size() > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out if self.fc2.bias is None else out + self.fc2.bias

    # Called from inside the ops:

    def select(
        self,
        impl: ModuleType,
        gate_input: torch.Tensor,
        positions: torch.Tensor,
        row_lens: torch.Tensor,
        with_row_mask: bool,
        rider: DejaVuSelfAttention | None,
        previous: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(neuron_ids, counts, row_mask, the rider's head scores or None); in mode oracle `gate_input` is the
        MLP's own input.
        """
        mode, gate, measure = self.settings.mode, self.gate, self.settings.measure
        if mode == "sparse":
            p = gate.predictor
            heads = (
                None if rider is None else (previous, rider.gate.predictor.weight, rider.gate.predictor.bias)
            )
            chosen = impl.select_neurons(
                gate_input,
                p.down,
                p.up,
                p.bias,
                row_lens,
                with_row_mask,
                heads,
                None if measure else gate.counters,
                self.workspace,
            )
            if not measure and gate.recorder is not None:
                gate.observe(chosen[2], row_lens > 0)
            return chosen
        if mode == "oracle":
            mask = (impl.mlp_activations(gate_input, self.fc1.weight, self.fc1.bias) > 0) & (row_lens > 0)[
                :, None
            ]
        else:
            mask = gate.select(positions, row_lens)
        if not measure:
            gate.count(mask, row_lens > 0, mask if mode == "oracle" else None)
        return *impl.compact_union(mask), mask if with_row_mask else mask[:0].clone(), None

    def dense(self, impl: ModuleType, x: torch.Tensor) -> torch.Tensor:
        """This rank's dense MLP without fc2's bias."""
        self.count_dense(x.shape[0], x.device)
        # Not `mlp_activations`: that makes a copy of fc1 in fp32.
        self.check(lambda rows: impl.linear(x[rows], self.fc1.weight, self.fc1.bias) > 0)
        return impl.dense_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.activation)

    def sparse(
        self,
        impl: ModuleType,
        x: torch.Tensor,
        ids: torch.Tensor,
        counts: torch.Tensor,
        row_mask: torch.Tensor,
        row_lens: torch.Tensor,
    ) -> torch.Tensor:
        """This rank's sparse MLP without fc2's bias."""
        if self.settings.measure:
            active = impl.mlp_activations(x, self.fc1.weight, self.fc1.bias) > 0
            self.gate.count(row_mask, row_lens > 0, active)
        mask = row_mask if self.settings.masks_rows else None
        return impl.sparse_mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            ids,
            counts,
            row_lens,
            mask,
            self.activation,
            self.gate.counters,
            self.workspace,
        )


class DejaVuAttention(Attention):
    """vLLM's attention layer with our op in place of its own: the same backend, cache and cache write.

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

    def forward_gated(self, qkv: torch.Tensor, head_scores: torch.Tensor, block_name: str) -> torch.Tensor:
        """qkv: [T, 3 * heads * head_size]; returns out_proj's part [T, hidden] of this rank, without bias."""
        query, key, value = (t.view(-1, self.num_heads, self.head_size) for t in qkv.chunk(3, dim=-1))
        dep = None
        if not (self.attn_backend.forward_includes_kv_cache_update or self.updates_cache):
            dep = torch.ops.vllm.unified_kv_cache_update(key, value, encode_layer_name(self.layer_name))
        output = qkv.new_empty(qkv.shape[0], self.hidden_size)
        ops.attention(query, key, value, head_scores, output, encode_layer_name(block_name), dep)
        return output


class DejaVuSelfAttention(_GatedBlock):
    """qkv -> paged attention -> out_proj; K and V are always computed and cached for all heads.

    Args:
        gate: (spec, tensors, tuned) of `Gate`, or None: dense, vLLM's own layers.
    """

    def __init__(
        self,
        hidden: int,
        num_heads: int,
        bias: bool,
        layer: int,
        gate: tuple | None,
        settings: DejaVuConfig,
        vllm_config: VllmConfig,
        prefix: str,
    ):
        super().__init__()
        self.settings = settings
        self.units = num_heads // get_tensor_model_parallel_world_size()
        self.head_dim = hidden // num_heads
        self.qkv_proj = QKVParallelLinear(
            hidden, self.head_dim, num_heads, bias=bias, prefix=f"{prefix}.qkv_proj"
        )
        self.out_proj = RowParallelLinear(hidden, hidden, bias=bias, prefix=f"{prefix}.out_proj")
        self.attn = DejaVuAttention(
            self.units,
            self.head_dim,
            scale=self.head_dim**-0.5,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )
        self.attn.hidden_size = hidden
        self.attention_name = self.attn.layer_name
        backend = self.attn.attn_backend.get_name()
        self.reads_cache = ATTENTION_BACKENDS.get(backend, False)
        self.attn.updates_cache = (
            backend == "CPU_ATTN" and not self.attn.attn_backend.forward_includes_kv_cache_update
        )
        self.max_model_len = vllm_config.model_config.max_model_len
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(
                f"model_impl='dejavu' does not support the attention backend {backend}: its metadata has no"
                f" sequence lengths to decide by. Choose one of {list(ATTENTION_BACKENDS)} with"
                " --attention-backend."
            )
        self.gate = None
        if gate is None:
            return
        keep_plain_weight(self.qkv_proj)
        keep_plain_weight(self.out_proj)
        _prepare(self.qkv_proj, self.out_proj)
        self.gate = Gate(*gate, "attention", layer, self.units, settings)
        self.threshold = gate[0].threshold
        # True contributions of all heads are wanted: the stock attention computes them.
        self.needs_contributions = settings.measure or settings.mode == "oracle"
        self.reads_cache = self.reads_cache and not self.needs_contributions
        self.register_buffer("grams", None, persistent=False)
        self.register(vllm_config, f"{prefix}.dejavu_attention")

    def forward(self, x: torch.Tensor, head_scores: torch.Tensor | None) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]; head_scores: from `choose`, None for a dense layer."""
        if head_scores is None:
            query, key, value = self.qkv_proj(x)[0].chunk(3, dim=-1)
            return self.out_proj(self.attn(query, key, value))[0]
        qkv = ops.qkv(x, head_scores, 3 * self.units * self.head_dim, encode_layer_name(self.layer_name))
        out = self.attn.forward_gated(qkv, head_scores, self.layer_name)
        if get_tensor_model_parallel_world_size() > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out if self.out_proj.bias is None else out + self.out_proj.bias

    def choose(self, gate_input: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Head scores [T, units], fp32, of this step."""
        return ops.select_heads(gate_input, positions, self.units, encode_layer_name(self.layer_name))

    # Called from inside the ops:

    def select(
        self, impl: ModuleType, gate_input: torch.Tensor, positions: torch.Tensor, row_lens: torch.Tensor
    ) -> torch.Tensor:
        """Scores [T, units]; +1 and -1 where a control decides. The oracle decides after the attention, so
        all are +1.
        """
        mode = self.settings.mode
        if mode == "sparse":
            return impl.score_heads(
                gate_input, self.gate.predictor.weight, self.gate.predictor.bias, row_lens, self.workspace
            )
        if mode == "oracle":
            return _scores_of((row_lens > 0)[:, None].expand(-1, self.units))
        return _scores_of(self.gate.select(positions, row_lens))

    def sparse_qkv(
        self, impl: ModuleType, x: torch.Tensor, head_scores: torch.Tensor, row_lens: torch.Tensor
    ) -> torch.Tensor:
        """[T, 3 * units * head_dim]: K and V of all heads, Q of those selected; counts the selection."""
        proj = self.qkv_proj
        return impl.sparse_qkv(
            x,
            proj.weight,
            proj.bias,
            head_scores,
            row_lens,
            self.head_dim,
            self.gate.counters,
            self.workspace,
        )

    def paged(
        self,
        impl: ModuleType,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        head_scores: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attention of the selected heads straight from the cache, projected into `output` [T, hidden]."""
        if self.gate.recorder is not None:
            self.gate.observe(head_scores > 0, seq_lens > 0)
        attn = impl.paged_attention(
            query,
            kv_cache,
            block_table,
            seq_lens,
            self.attn.impl.scale,
            head_scores,
            self.max_model_len,
            self.workspace,
        )
        impl.sparse_out_proj(attn, self.out_proj.weight, head_scores, output, self.workspace)

    def project(self, impl: ModuleType, attn: torch.Tensor, output: torch.Tensor) -> None:
        """Dense out_proj of this rank without bias: [T, units, head_dim] -> `output` [T, hidden]."""
        self.count_dense(attn.shape[0], attn.device)
        self.check(lambda rows: selection.contributions(attn[rows], self.out_proj.weight) > self.threshold)
        impl.linear(attn.flatten(1), self.out_proj.weight, None, output)

    def sparse(
        self,
        impl: ModuleType,
        attn: torch.Tensor,
        head_scores: torch.Tensor,
        row_lens: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Keep the selected heads of `attn` [T, units, head_dim], computed for all, and project them into
        `output`.
        """
        if self.needs_contributions:
            valid = row_lens > 0
            if self.grams is None:
                self.grams = selection.head_grams(self.out_proj.weight, self.units)
            active = selection.head_contributions(attn, self.grams) > self.threshold
            if self.settings.mode == "oracle":
                head_scores = _scores_of(active & valid[:, None])
            self.gate.count(head_scores > 0, valid, active)
        elif self.gate.recorder is not None:
            self.gate.observe(head_scores > 0, row_lens > 0)
        impl.sparse_out_proj(
            impl.mask_heads(attn, head_scores), self.out_proj.weight, head_scores, output, self.workspace
        )


def _scores_of(mask: torch.Tensor) -> torch.Tensor:
    """Scores that select exactly a mask."""
    return torch.where(mask, 1.0, -1.0)
