"""Recall while serving: on a few rows of some prompts, what a gate would have selected against the truth.

Prompts run dense, so the truth costs next to nothing there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_dejavu import metrics
from vllm_dejavu.gate import Gate
from vllm_dejavu.steps import Step

# Prompts of at least this many tokens are sampled, on so many rows: there the products of a few rows more are
# noise.
LONG_PASS, SAMPLED_ROWS = 64, 8


class Recall:
    """Of one gate: `foresee` with what its predictor reads, then, in the same pass, `check` with the
    truth.
    """

    def __init__(self, gate: Gate):
        self.gate = gate
        self.long_passes = 0
        # Rows of this pass [SAMPLED_ROWS] and what the predictor says of them [SAMPLED_ROWS, units].
        self.foreseen: tuple[torch.Tensor, torch.Tensor] | None = None

    def due(self, step: Step | None) -> bool:
        """Whether this gate is sampled in a pass: in some long dense ones.

        Only where Python runs in each pass, not in captured graphs; there, prompts too long for a graph are
        what is sampled.
        """
        gate, every = self.gate, self.gate.settings.sample_recall
        if step is None or step.in_graph or step.reason != "prefill_or_mixed":
            return False
        if gate.settings.mode != "sparse" or not every or gate.calibrated_bias is not None:
            return False
        if step.metadata.num_actual_tokens < LONG_PASS:
            return False
        if self not in step.decided:
            self.long_passes += 1
            # not all layers in the same pass
            step.decided[self] = (self.long_passes + gate.layer) % every == 0
        return step.decided[self]

    def foresee(self, step: Step | None, gate_input: torch.Tensor) -> None:
        """Called in dense passes: predict, where that is due."""
        self.foreseen = None
        if self.due(step):
            tokens = step.metadata.num_actual_tokens
            rows = torch.arange(SAMPLED_ROWS, device=gate_input.device) * tokens // SAMPLED_ROWS
            self.foreseen = rows, self.gate.predictor.scores(gate_input[rows]) > 0

    def check(self, true_active: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Count what was foreseen in this pass; true_active: rows -> [rows, units], bool."""
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
        counts = torch.stack([amount.sum() for amount in amounts.values()])
        self.gate.counters[first : first + len(amounts)] += counts
