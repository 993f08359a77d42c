"""Mode `exact`: no predictor, no loss. Every layer is vLLM's own, in whatever quantization it serves, but
fc2: of that only the rows are read whose neuron came out positive, which is known once fc1 is computed.

T tokens (padded), hidden, `units` = neurons of this rank.
"""

from __future__ import annotations

import functools

import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear

from vllm_dejavu import metrics, ops
from vllm_dejavu.attention import GatedAttention
from vllm_dejavu.blocks import Flow, GatedBlock, Site
from vllm_dejavu.compat import encode_layer_name
from vllm_dejavu.formats import TransposedRowParallelLinear, gated_form, keep_gathered, linear_config, rows_of
from vllm_dejavu.kernels import cpu, interface
from vllm_dejavu.kernels.interface import Call


class ExactMLP(GatedBlock):
    """fc1 -> activation -> fc2, which skips what came out 0. It has no gate."""

    block = "mlp"

    def __init__(self, site: Site, bias: bool, attention_name: str):
        super().__init__(site)
        geometry, settings = site.geometry, site.settings
        hidden, ffn = geometry.hidden_size, geometry.ffn_dim
        self.activation, self.attention_name = geometry.activation, attention_name
        self.units, self.hidden, self.layer = ffn // self.ranks, hidden, site.layer
        self.fc1 = ColumnParallelLinear(
            hidden, ffn, bias=bias, quant_config=linear_config(site, "fc1"), prefix=f"{site.prefix}.fc1"
        )
        form = gated_form(site, "fc2")
        self.kernels = interface.choose(self.device_type, self.activation, form.bits)
        self.fc2 = TransposedRowParallelLinear(ffn, hidden, bias, form)
        keep_gathered(self.kernels, self.fc2)
        self.most_rows = self.kernels.largest_batch or 0
        crossover = settings.crossover
        self.crossover = self.kernels.tile_crossover.get(form.bits, 1.0) if crossover is None else crossover
        self.register_buffer("counters", metrics.new_gate_counters(), persistent=False)
        self.layer_name = self.name_for_ops(site, "exact")

    @property
    def calibrated(self) -> dict[str, float | None]:
        """Nothing was."""
        return {"density": None, "recall": None}

    def carry(self, attention: GatedAttention) -> None:
        """As `GatedMLP`: there is no predictor that anything could ride along with."""

    def predict_early(self, attn_input: torch.Tensor, flow: Flow) -> Flow:
        """As `GatedMLP`: nothing is predicted."""
        return flow

    def forward(self, x: torch.Tensor, residual: torch.Tensor, flow: Flow) -> tuple[torch.Tensor, Flow]:
        """[T, hidden] -> [T, hidden]."""
        h = self.fc1(x)[0]
        if self.kernels is cpu.KERNELS:
            weight = self.fc2.weight, self.fc2.weight_scale, self.fc2.output_scale
            square = self.activation == "relu2"
            out = ops.native_exact_down(h, *weight, square, self.crossover, self.counters)
        else:
            out = ops.exact_down(h, self.hidden, encode_layer_name(self.layer_name))
        return self.reduced(out, self.fc2.bias), Flow(flow.positions, flow.attn_input, previous=residual)

    # Inside the op:

    @functools.cached_property
    def weights(self) -> interface.Rows:
        return rows_of(self.fc2, bias=False)

    def run(self, h: torch.Tensor) -> torch.Tensor:
        """[T, units], what fc1 gave -> [T, hidden] of this rank."""
        step = self.step()
        if step is None:
            row_lens = torch.ones(h.shape[0], dtype=torch.int32, device=h.device)
        else:
            row_lens = step.row_lens(h.shape[0], h.device)
        call = Call(row_lens, self.counters, self.workspace)
        return self.kernels.exact_down(h, self.weights, self.activation, self.crossover, call)
