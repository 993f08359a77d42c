"""The gated MLP: dense, stock products; sparse, only the neurons that its gate selected. Shapes as in
`blocks`.
"""

from __future__ import annotations

import functools

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear

from vllm_dejavu import ops
from vllm_dejavu.attention import GatedAttention
from vllm_dejavu.blocks import Flow, GatedBlock, Site
from vllm_dejavu.compat import encode_layer_name
from vllm_dejavu.formats import (
    TransposedRowParallelLinear,
    config_of,
    gated_form,
    keep_gathered,
    linear_config,
    row_parallel,
    rows_of,
)
from vllm_dejavu.gate import Calibrated
from vllm_dejavu.kernels import interface, reference
from vllm_dejavu.kernels.interface import Asked, Call, Mlp, Rider, Selection


class GatedMLP(GatedBlock):
    """fc1 -> activation -> fc2; gated when the artifact says so, else vLLM's own linears.

    Args:
        calibrated: the gate, or None: dense, no predictor is launched.
    """

    def __init__(self, site: Site, bias: bool, calibrated: Calibrated | None, attention_name: str):
        super().__init__(site)
        hidden, ffn = site.geometry.hidden_size, site.geometry.ffn_dim
        self.activation, self.attention_name = site.geometry.activation, attention_name
        self.units = ffn // self.ranks
        self._rider: tuple[GatedAttention, ...] = ()
        form = None if calibrated is None else gated_form(site, "fc1", "fc2")
        config = {
            name: linear_config(site, name) if form is None else config_of(form.bits)
            for name in ("fc1", "fc2")
        }
        self.fc1 = ColumnParallelLinear(
            hidden, ffn, bias=bias, quant_config=config["fc1"], prefix=f"{site.prefix}.fc1"
        )
        if calibrated is None:
            self.fc2 = row_parallel(ffn, hidden, bias, config["fc2"], f"{site.prefix}.fc2")
            return
        self.kernels = interface.choose(self.device_type, self.activation, form.bits)
        self.fc2 = TransposedRowParallelLinear(ffn, hidden, bias, form)
        keep_gathered(self.kernels, self.fc1, self.fc2)
        self.attach(calibrated, "mlp", site, self.units, form.bits)
        settings = site.settings
        # Beside the attention, on a side stream.
        self.early = settings.overlap and self.gate.lookahead != "self" and self.device_type == "cuda"
        self.with_mask = settings.masks_rows or settings.measure
        # A prediction under way on the side stream, and what it reads that nobody else holds.
        self.pending: tuple[torch.cuda.Event, torch.Tensor] | None = None

    @property
    def rider(self) -> GatedAttention | None:
        """The next layer's attention, if its head scores are computed in this predictor's launch."""
        return self._rider[0] if self._rider else None

    def carry(self, attention: GatedAttention) -> None:
        """Let the next layer's head predictor ride along, where both read what is known here: the MLP's own
        input, and the residual in front of it. In a tuple: it is not our submodule.
        """
        if self.gate is None or attention.gate is None or self.settings.mode != "sparse":
            return
        if self.gate.lookahead == "self" and attention.gate.lookahead == "previous":
            self._rider = (attention,)

    def predict_early(self, attn_input: torch.Tensor, flow: Flow) -> Flow:
        """In front of the attention: start the prediction, where it can run beside it."""
        if self.gate is None or not self.early:
            return flow
        x = self.gate_input(attn_input, flow._replace(attn_input=attn_input))
        name = encode_layer_name(self.layer_name)
        chosen = ops.select_neurons(x, flow.positions, self.units, self.masked, name)
        return flow._replace(early=(*chosen, x))

    def forward(self, x: torch.Tensor, residual: torch.Tensor, flow: Flow) -> tuple[torch.Tensor, Flow]:
        """[T, hidden] -> [T, hidden]; residual: in front of this block and its norm."""
        early, rider = flow.early, self.rider
        following = Flow(flow.positions, flow.attn_input, previous=residual)
        if self.gate is None:
            return self.fc2(reference.ACTIVATIONS[self.activation](self.fc1(x)[0]))[0], following
        asked = (
            x,
            self.gate_input(x, flow) if early is None else early[-1],
            flow.positions,
            None if rider is None else residual,
            0 if rider is None else rider.units,
        )
        if self.number is not None and early is None:
            out, head_scores = ops.native_mlp(*asked, self.number)
        else:
            chosen = [] if early is None else list(early[:-1])
            out, head_scores = ops.mlp(*asked, chosen, encode_layer_name(self.layer_name))
        if rider is not None:
            following = following._replace(head_scores=head_scores)
        return self.reduced(out, self.fc2.bias), following

    # Inside the ops:

    @property
    def masked(self) -> bool:
        return self.with_mask or self.gate.recorder is not None

    @functools.cached_property
    def weights(self) -> Mlp:
        return Mlp(rows_of(self.fc1), rows_of(self.fc2, bias=False), self.activation)

    def choose(self, x: torch.Tensor, positions: torch.Tensor, call: Call) -> Selection:
        """Neurons of this step, alone; in mode oracle x is the MLP's own input."""
        mode, gate, measure = self.settings.mode, self.gate, self.settings.measure
        if mode == "sparse":
            call = call._replace(counters=None) if measure else call
            chosen, _ = self.kernels.select_neurons(x, gate.predictor.weights, call, self.masked)
            if not measure and gate.recorder is not None:
                gate.observe(chosen.mask, call.row_lens > 0)
            return chosen
        valid = call.row_lens > 0
        if mode == "oracle":
            mask = self.true_active(x) & valid[:, None]
        else:
            mask = gate.select(positions, call.row_lens)
        if not measure:
            gate.count(mask, valid, mask if mode == "oracle" else None)
        return reference.compact_union(mask)._replace(mask=mask if self.masked else None)

    def true_active(self, x: torch.Tensor) -> torch.Tensor:
        return reference.mlp_activations(x, rows_of(self.fc1)) > 0

    def run(
        self,
        x: torch.Tensor,
        gate_input: torch.Tensor,
        positions: torch.Tensor,
        previous: torch.Tensor | None,
        early: Selection | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's MLP without fc2's bias, and the rider's head scores.

        Args:
            previous: what a rider reads. early: from `predict_early`.
        """
        # All layers of a pass run by one predicate, so that the rider's step is this one.
        step, rider, rows = self.step(), self.rider, x.shape[0]
        if rider is not None and not rider.selects(step, rows):
            rider = None
        if not self.takes(step, rows):
            scores = None
            if rider is not None:
                scores = rider.choose(previous, positions, rider.call(step, x))
            return self.dense(x, gate_input), scores
        call = self.call(step, x)
        if self.settings.mode == "sparse" and early is None and not self.settings.measure:
            riding = None if rider is None else Rider(previous, rider.gate.predictor.weights)
            asked = Asked(
                gate_input, self.gate.predictor.weights, riding, self.masked, self.settings.masks_rows
            )
            out, chosen, scores = self.kernels.mlp_block(x, asked, self.weights, call)
            if self.gate.recorder is not None:
                self.gate.observe(chosen.mask, call.row_lens > 0)
            return out, scores
        chosen = self.choose(gate_input, positions, call) if early is None else early
        if self.pending is not None:
            self.pending[0].wait()  # the current stream does
            self.pending = None
        if self.settings.measure:
            self.gate.count(chosen.mask, call.row_lens > 0, self.true_active(x))
        if not self.settings.masks_rows:
            chosen = chosen._replace(mask=None)
        scores = None
        if rider is not None:
            scores = rider.choose(previous, positions, rider.call(step, x))
        return self.kernels.sparse_mlp(x, self.weights, chosen, call), scores

    def dense(self, x: torch.Tensor, gate_input: torch.Tensor) -> torch.Tensor:
        """This rank's dense MLP without fc2's bias."""
        self.recall.foresee(self.step(), gate_input)
        self.count_dense(x)
        # Not `true_active`: that makes a copy of fc1 in fp32.
        self.recall.check(lambda rows: self.kernels.linear(x[rows], self.weights.up) > 0)
        return self.kernels.sparse_mlp(x, self.weights)
