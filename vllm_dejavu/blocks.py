"""What the gated MLP and the gated attention have in common: where they stand, what flows through them, their
gate.

Each block is one or two opaque ops (`ops`) seen from torch.compile; what happens inside them is in the blocks
too, below "Inside the ops". Shapes: T tokens (padded), hidden, `units` = neurons or heads of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.families import Geometry
from vllm_dejavu.gate import Calibrated, Gate
from vllm_dejavu.kernels.interface import Call, Kernels
from vllm_dejavu.predictor import gate_input
from vllm_dejavu.recall import Recall
from vllm_dejavu.steps import Step, current_step


class Site(NamedTuple):
    """Where a block stands: `layer` in the whole model, `prefix` as vLLM names its place."""

    vllm_config: VllmConfig
    settings: DejaVuConfig
    geometry: Geometry
    layer: int
    prefix: str

    def at(self, name: str) -> Site:
        return self._replace(prefix=f"{self.prefix}.{name}")


class Flow(NamedTuple):
    """What goes from block to block beside the hidden states.

    Attributes:
        positions: [T]. attn_input: [T, hidden], what this layer's attention reads.
        previous: [T, hidden], residual in front of the MLP of the layer before; None in the first layer.
        head_scores: [T, heads] of the next attention, where the MLP before it has scored them on the way.
        early: the neurons of the next MLP, where they are predicted beside the attention.
    """

    positions: torch.Tensor
    attn_input: torch.Tensor | None = None
    previous: torch.Tensor | None = None
    head_scores: torch.Tensor | None = None
    early: tuple[torch.Tensor, ...] | None = None


class GatedBlock(nn.Module):
    """What the two have in common: the gate, and whether this step takes the sparse path."""

    kernels: Kernels  # chosen once; of a gated block
    attention_name: str  # of the layer's attention, whose metadata tells how the step runs
    number: int | None = None  # by which the native ops know it (native), or None: Python's ops
    workspace: Any = None  # of the kernels, where they need one; set by the model
    most_rows = 0  # that the kernels may be given, where that is not a decode step's

    def __init__(self, site: Site):
        super().__init__()
        self.gate: Gate | None = None
        self.settings = site.settings
        self.ranks = get_tensor_model_parallel_world_size()
        self.device_type = torch.get_default_device().type

    def attach(self, calibrated: Calibrated, block: str, site: Site, units: int, bits: int) -> None:
        """Give this block, whose weights have so many bits, its gate, and make it findable by the ops."""
        self.gate = Gate(calibrated, block, site.layer, units, site.settings, self.kernels, bits)
        vars(self)["gate"] = self.gate  # found without Module's own search, at each of a step's questions
        self.recall = Recall(self.gate)
        self.layer_name = self.name_for_ops(site, block)

    def name_for_ops(self, site: Site, what: str) -> str:
        """Make this block findable by the ops; returns the name they find it by."""
        name, context = (
            f"{site.prefix}.dejavu_{what}",
            site.vllm_config.compilation_config.static_forward_context,
        )
        if name in context:
            raise ValueError(f"Duplicate layer name: {name}")
        context[name] = self
        return name

    def gate_input(self, block_input: torch.Tensor, flow: Flow) -> torch.Tensor:
        """What the gate's predictor reads: [T, hidden]."""
        states = {"attn_input": flow.attn_input, "previous": flow.previous}
        return gate_input(self.gate.lookahead, block_input=block_input, **states)

    def reduced(self, out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[T, hidden] of this rank -> of all, with the bias."""
        if self.ranks > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out if bias is None else out + bias

    # Inside the ops:

    def step(self) -> Step | None:
        return current_step(self.attention_name, self.settings.apply_to)

    def sparse_step(self, num_tokens: int) -> Step | None:
        """The step if this block, which has a gate, runs sparse in it, else None."""
        step = self.step()
        return step if self.takes(step, num_tokens) else None

    def takes(self, step: Step | None, num_tokens: int) -> bool:
        """Whether this block, which has a gate, runs sparse in a step."""
        return step is not None and step.sparse and self.gate.takes(num_tokens)

    def call(self, step: Step, x: torch.Tensor) -> Call:
        return Call(step.row_lens(x.shape[0], x.device), self.gate.counters, self.workspace)

    def count_dense(self, x: torch.Tensor) -> None:
        """Count a dense pass: nothing in a dense step; everything where only this layer, above its crossover,
        is dense.
        """
        gate, step = self.gate, self.step()
        if step is None:
            return
        if gate.recorder is not None:
            gate.recorder(gate.layer, gate.block, None, None)
        if step.sparse:
            row_lens = step.row_lens(x.shape[0], x.device)
            self.kernels.count_dense(gate.counters, gate.dense_step, gate.dense_row, row_lens)
