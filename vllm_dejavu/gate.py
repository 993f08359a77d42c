"""A gate as it is served: predictor, limit by batch size, counters.

Shapes: T tokens (padded), hidden, `units` = neurons or heads of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_dejavu import metrics, selection
from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.kernels.interface import Kernels
from vllm_dejavu.manifest import GateSpec
from vllm_dejavu.predictor import Predictor
from vllm_dejavu.steps import Step

# Called after each pass of a gated block as recorder(layer, block, mask [T, units], valid [T]), with None and
# None where the block ran dense. Tests set it on eager engines; None while serving.
Recorder = Callable[[int, str, torch.Tensor | None, torch.Tensor | None], None]


class Calibrated(NamedTuple):
    """A gate as the artifact has it, of all ranks, and what was measured for it on this device.

    Attributes:
        tensors: by the names of `manifest.gate_tensors`.
        tuned: {tokens: union density} from which on dense is faster (`tune`), or None: as the kernels' own
            table has it.
        cache_crossover: of an attention, measured likewise: keys that must be spared (`DejaVuConfig`).
    """

    spec: GateSpec
    tensors: dict[str, torch.Tensor]
    tuned: dict[int, float] | None
    cache_crossover: int | None


class Gate(nn.Module):
    """Predictor, threshold and counters of one block on this rank.

    Args:
        block: "mlp" or "attention". layer: index in the whole model.
        units: neurons or heads of this rank. bits: of the block's weights in memory.
    """

    def __init__(
        self,
        calibrated: Calibrated,
        block: str,
        layer: int,
        units: int,
        settings: DejaVuConfig,
        kernels: Kernels,
        bits: int,
    ):
        super().__init__()
        spec, tensors, tuned, cache_crossover = calibrated
        self.spec, self.block, self.layer, self.units, self.settings = spec, block, layer, units, settings
        self.start = get_tensor_model_parallel_rank() * units
        device = torch.get_default_device()
        self.predictor = Predictor(tensors, self.start, units, device)
        # The oracle looks at the block's own input: it asks what is truly active, not what can be foreseen.
        self.lookahead = "self" if settings.mode == "oracle" else spec.lookahead
        cap = kernels.largest_batch
        if tuned is None:
            built_in = kernels.crossovers if bits == 16 else kernels.int8_crossovers
            tuned = _of_size(built_in.get(block, {}), self.predictor.hidden)
        elif cap is not None:
            cap = max((cap, *tuned))
        self.max_tokens = _largest_batch(spec, settings.crossover, tuned, cap)
        known = settings.cache_crossover, cache_crossover, kernels.cache_crossover
        self.cache_crossover = next((keys for keys in known if keys is not None), None)
        static = selection.static_units(tensors["activation_rate"], spec.density["mean"])
        self.register_buffer("static", static[self.start : self.start + units].to(device), persistent=False)
        self.register_buffer(
            "unit_ids", torch.arange(self.start, self.start + units, device=device), persistent=False
        )
        self.register_buffer("counters", metrics.new_gate_counters(device), persistent=False)
        # What a dense pass adds to the counters: once, and for each row.
        everything = {
            "dense_step": {"steps": 1, "read": units, "survived": units, "above_crossover": 1},
            "dense_row": {"rows": 1, "selected": units},
            "selected_row": {"rows": 1},  # where all weights are read, and of the cache what is selected
        }
        for name, counts in everything.items():
            self.register_buffer(
                name,
                torch.tensor([counts.get(c, 0) for c in metrics.GATE_COUNTERS], device=device),
                persistent=False,
            )
        # Tokens of a decode step's sequences, all together, from which on only the selected heads' cache is
        # read, whatever the projections do; None: their heads are selected where the projections' are. Known
        # once there is a cache of which heads can be read (native).
        self.least_cached: int | None = None
        self.recorder: Recorder | None = None
        self.calibrated_bias: torch.Tensor | None = None  # kept while everything is selected

    @property
    def calibrated(self) -> dict[str, float | None]:
        """What the artifact says of its calibration text."""
        return {"density": self.spec.density["mean"], "recall": self.spec.recall}

    def takes(self, num_tokens: int) -> bool:
        """Whether a sparse step of so many tokens, padding included, is sparse in this block."""
        return self.max_tokens is None or num_tokens <= self.max_tokens or self.settings.apply_to == "all"

    def reads_selected(self, step: Step) -> bool:
        """Whether a sparse step reads the cache of the selected heads only."""
        if self.least_cached is None or not step.one_token_each:
            return False
        return step.cached_tokens >= self.least_cached

    def select_everything(self, wanted: bool) -> None:
        """By biases that no score can outweigh: also in graphs that are captured already."""
        if wanted and self.calibrated_bias is None:
            self.calibrated_bias = self.predictor.bias.clone()
            self.predictor.bias.fill_(torch.inf)
        elif not wanted and self.calibrated_bias is not None:
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
        amounts = {"steps": selected.new_ones(()), "rows": valid.sum(), "selected": selected, "read": read}
        amounts |= {"active": active_count, "hit": hit}
        zero = selected.new_zeros(())
        self.counters += torch.stack([amounts.get(name, zero) for name in metrics.GATE_COUNTERS])
        self.observe(mask, valid)

    def observe(self, mask: torch.Tensor, valid: torch.Tensor) -> None:
        if self.recorder is not None:
            self.recorder(self.layer, self.block, mask, valid)


def _of_size(measured: dict[int, dict[int, float]], hidden: int) -> dict[int, float]:
    """Crossovers by tokens for a hidden size: those of the largest measured one that is not above it, else of
    the smallest.
    """
    if not measured:
        return {}
    return measured[max((size for size in measured if size <= hidden), default=min(measured))]


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
