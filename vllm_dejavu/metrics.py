"""What the sparse path really did: counts kept on the device, read out on request.

Counters are tensors, so that CUDA graphs can add to them; only a read-out brings them to the host.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_dejavu.kernels.reference import COUNTERS

# One int64 vector a gate. Units are neurons or heads of this rank.
#   steps: sparse steps the gate took part in; rows: valid rows in them
#   selected: units selected, summed over rows (per token, before any union)
#   read: units read, summed over steps (the union of the rows)
#   survived: MLP: fc2 rows read, summed over steps (neurons that came out positive)
#   cache_held: attention, on a CPU: keys (a head's of a token) that the cache held in sparse steps in which
#       every row is a sequence; cache_read: those of them that were read, each with its value
#   active: truly active units, summed over rows; with `measure` or in oracle mode only; hit: those of them
#   that were selected
#   above_crossover: of the steps, those in which the block's weights were all read, the batch being above its
#       crossover; also those in which every other block did so too, which are no sparse steps of the model
#   sampled_*: rows of long dense passes on which prediction was compared with truth (`sample_recall`): rows,
#   units
#       predicted, truly active, and both; of prompts, and in no other counter
GATE_COUNTERS = (
    *COUNTERS,
    "cache_held",
    "cache_read",
    "active",
    "hit",
    "above_crossover",
    "sampled_rows",
    "sampled_selected",
    "sampled_active",
    "sampled_hit",
)
# The same on every tensor-parallel rank; the others add up.
SHARED = ("steps", "rows", "above_crossover", "sampled_rows")
# One int64 vector a model: sparse steps, then dense steps by reason.
# above_crossover: it could have been sparse, and the batch was above the crossover of every gate.
STEP_REASONS = (
    "sparse",
    "prefill_or_mixed",
    "piecewise_graph",
    "microbatched",
    "mode_dense",
    "above_crossover",
)


def new_gate_counters(device: torch.device | None = None) -> torch.Tensor:
    return torch.zeros(len(GATE_COUNTERS), dtype=torch.int64, device=device)


def new_step_counters(device: torch.device | None = None) -> torch.Tensor:
    return torch.zeros(len(STEP_REASONS), dtype=torch.int64, device=device)


class WorkerExtension:
    """Mixed into vLLM's worker class; its methods are called with `LLM.collective_rpc(NAME)`."""

    def dejavu_metrics(self) -> dict[str, Any]:
        """Counts since the start or the last reset, of this rank; see `DejaVuOPTForCausalLM.metrics`."""
        return self.model_runner.get_model().metrics()  # type: ignore[attr-defined]

    def dejavu_reset_metrics(self) -> None:
        """Set every counter to 0."""
        self.model_runner.get_model().reset_metrics()  # type: ignore[attr-defined]

    def dejavu_set_dense(self, dense: bool) -> None:
        """Select everything from now on, or what the predictors say again; see `control.set_dense`, which
        also resets the cache.
        """
        self.model_runner.get_model().set_dense(dense)  # type: ignore[attr-defined]


def summarize(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the read-outs of all ranks into densities.

    Args:
        ranks: one `dejavu_metrics()` result a worker, as `LLM.collective_rpc("dejavu_metrics")` returns them.

    Returns:
        steps: {reason: count} of the first rank; sparse_step_share: sparse steps / steps, None before any
            step;
        artifact: {path, digest, fingerprint, fingerprint_verified};
        predictor_bytes: of all ranks; dense_switch: whether everything is selected at present;
        layers: per layer {"mlp": {...}, "attention": {...}} with units, and for gated blocks density
            (selected per token), read_density (read per step), survived_density, cache_density (of the
            attention's cache, on a CPU), recall, and sampled_density and sampled_recall of prompt rows; a
            dense block has density 1. None: nothing counted;
        mlp_density, head_density: means over layers.
    """
    steps = ranks[0]["steps"]
    total = sum(steps.values())
    merged: dict[tuple[int, str], dict[str, int]] = {}
    for rank in ranks:
        for gate in rank["gates"]:
            slot = merged.setdefault((gate["layer"], gate["block"]), {})
            for key, value in gate.items():
                if key in ("layer", "block"):
                    continue
                if key == "calibrated":
                    slot[key] = value
                    continue
                # Every tensor-parallel rank sees the same steps and rows; units and selections add up.
                slot[key] = max(slot.get(key, 0), value) if key in SHARED else slot.get(key, 0) + value
    layers: list[dict[str, dict[str, Any]]] = []
    for layer in range(ranks[0]["num_layers"]):
        entry = {}
        for block in ("mlp", "attention"):
            counts = merged.get((layer, block))
            entry[block] = (
                {"gated": False, "density": 1.0, "read_density": 1.0}
                if counts is None
                else _densities(counts)
            )
        layers.append(entry)

    def mean(block: str) -> float | None:
        values = [entry[block]["density"] for entry in layers]
        return None if None in values else sum(values) / len(values)

    return {
        "steps": steps,
        "sparse_step_share": steps["sparse"] / total if total else None,
        "artifact": ranks[0]["artifact"],
        "mode": ranks[0]["mode"],
        "weight_bits": ranks[0]["weight_bits"],
        "lm_head_bits": ranks[0]["lm_head_bits"],
        "dense_switch": ranks[0]["dense_switch"],
        "predictor_bytes": sum(rank["predictor_bytes"] for rank in ranks),
        "layers": layers,
        "mlp_density": mean("mlp"),
        "head_density": mean("attention"),
    }


def _densities(counts: dict[str, int]) -> dict[str, Any]:
    def ratio(a: float, b: float) -> float | None:
        return a / b if b else None

    per_token, per_step = counts["rows"] * counts["units"], counts["steps"] * counts["units"]
    return {
        "gated": True,
        **counts,
        "density": ratio(counts["selected"], per_token),
        "read_density": ratio(counts["read"], per_step),
        "survived_density": ratio(counts["survived"], per_step),
        "cache_density": ratio(counts["cache_read"], counts["cache_held"]),
        "active_density": ratio(counts["active"], per_token),
        "recall": ratio(counts["hit"], counts["active"]),
        "sampled_density": ratio(counts["sampled_selected"], counts["sampled_rows"] * counts["units"]),
        "sampled_recall": ratio(counts["sampled_hit"], counts["sampled_active"]),
    }
