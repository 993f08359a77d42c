"""What a point of an engine took, as columns of its row: times, densities, bytes, and who else was busy."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import median, percentile

from vllm_dejavu.families import Geometry

# More than this with other processes: the row is no measurement of this machine (`Others`).
BUSY_CORES = 0.1


class Others:
    """Cores that other processes kept busy since it was made, stolen time included; 0 where the system does
    not say.

    Threads of a CPU's kernels wait for each other hundreds of times a step: one busy neighbour slows a step
    down not by its share but many times over (measured: OPT-125M on 2 cores, 13 ms; beside one test run 1.4
    s), dense and sparse unevenly.
    """

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """(wall, all processes, this process) in seconds."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
        except OSError:
            fields = []
        user, nice, system, _, _, irq, soft, steal = (list(map(int, fields)) + [0] * 8)[:8]
        own = os.times()
        return (
            time.monotonic(),
            (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"),
            own.user + own.system,
        )

    def cores(self) -> float:
        wall, every, own = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return max(0.0, every - own) / max(wall, 1e-9)


def prefill_columns(ms: Sequence[float]) -> dict[str, float]:
    return {"prefill_ms": median(ms), "prefill_min_ms": min(ms), "prefill_max_ms": max(ms)} if ms else {}


def timings(result: dict[str, Any], batch: int) -> dict[str, float]:
    ms = [1e3 * s for s in result["step_s"]]
    return {
        "tpot_p50_ms": median(ms),
        "tpot_p20_ms": percentile(ms, 0.2),
        "tpot_p80_ms": percentile(ms, 0.8),
        "tpot_p99_ms": percentile(ms, 0.99),
        "ttft_p50_ms": 1e3 * median(result["ttft_s"]),
        "ttft_max_ms": 1e3 * max(result["ttft_s"]),
        "tokens_per_s": 1e3 * batch * len(ms) / sum(ms),
        "others_cores": result["others_cores"],
    }


def densities(summary: dict[str, Any]) -> dict[str, Any]:
    """Means over layers of what was counted since the last reset (`counted`)."""

    def mean(block: str, what: str) -> float | None:
        values = [layer[block].get(what) for layer in summary["layers"]]
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    read, survived = mean("mlp", "read_density"), mean("mlp", "survived_density")
    return {
        "sparse_step_share": summary["sparse_step_share"],
        "mlp_density": summary["mlp_density"],
        "mlp_union_density": read,
        "head_density": summary["head_density"],
        "head_union_density": mean("attention", "read_density"),
        "cache_density": mean("attention", "cache_density"),
        "survivors": survived / read if survived is not None and read else None,
    }


def _share(counts: dict[str, Any], *names: str) -> float:
    """The first that was counted; a block without counts was read whole."""
    return next((counts[n] for n in names if counts.get(n) is not None), 1.0)


def cache_bytes(g: Geometry, itemsize: float, tokens: float) -> float:
    """Bytes of keys and values of all heads that a decode step reads; itemsize: of an element of the cache,
    tokens: of all sequences.
    """
    return g.num_layers * tokens * 2 * g.num_kv_heads * g.head_size * itemsize


def weight_bytes(
    g: Geometry,
    itemsize: float,
    layers: Sequence[dict[str, Any]] | None = None,
    predictor_bytes: int = 0,
    head_itemsize: float | None = None,
) -> float:
    """Bytes of weights that a decode step reads: projections and MLP of every layer, the predictors, lm_head
    once.

    Left out, as they are alike on both sides and small: biases, norms, a token's embedding. The KV cache:
    `cache_bytes`.

    Args:
        itemsize: bytes of a weight of the layers, and of the LM head unless `head_itemsize` says otherwise;
            scales are left out: a thousandth.
        predictor_bytes: of all gates; read whole in every step.
        layers: `metrics.summarize(...)["layers"]`: fc1 rows are read at the union's density, fc2 rows where
            fc1 came out positive, Q rows and out_proj columns for heads that some row selected, K and V
            always. None: all of it.
    """

    of_heads, matrix = g.hidden_size * g.num_heads * g.head_size, g.hidden_size * g.ffn_dim
    of_keys = g.hidden_size * g.num_kv_heads * g.head_size
    head, elements = g.vocab_size * g.hidden_size * (head_itemsize or itemsize), 0.0
    for layer in layers if layers is not None else [{"mlp": {}, "attention": {}}] * g.num_layers:
        mlp, heads = layer["mlp"], _share(layer["attention"], "read_density")
        elements += (
            2 * of_keys
            + 2 * heads * of_heads
            + (_share(mlp, "read_density") + _share(mlp, "survived_density", "read_density")) * matrix
        )
    return elements * itemsize + head + predictor_bytes


def rate(num_bytes: float, row: dict[str, Any]) -> dict[str, float]:
    """Columns: weights read a step, and that over the time of a step. 1 MB/ms is 1 GB/s."""
    return {"weight_mb": num_bytes / 1e6, "weight_gbps": num_bytes / 1e6 / row["tpot_p50_ms"]}


def peak_memory_gb(device: str) -> float:
    """Of the device; on a CPU of this process, with all it has loaded."""
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
