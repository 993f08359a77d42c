"""The counts of the workers in vLLM's Prometheus `/metrics`; runs in the process of the API server.

Before vLLM logs its own statistics (every VLLM_LOG_STATS_INTERVAL seconds, 10 by default; not with
--disable-log-stats) the counters are fetched from the workers by one `collective_rpc` an engine, between two
steps. Nothing is added to a step.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger

from vllm_dejavu.metrics import summarize

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = init_logger("vllm.dejavu")

_PREFIX = "vllm:dejavu_"
# As vLLM's own metrics have them; `engine` counts data-parallel ones.
_COMMON = ("model_name", "engine")
_GATE = (*_COMMON, "layer", "block")
# Counters by layer and block: name, help, and the amount in a gate's counts (`metrics.GATE_COUNTERS`).
_GATE_COUNTERS = (
    (
        "selected_units",
        "Neurons or heads selected, summed over the rows of sparse steps.",
        lambda c: c["selected"],
    ),
    (
        "selectable_units",
        "Neurons or heads there were, summed likewise: selected / selectable is the density per token.",
        lambda c: c["rows"] * c["units"],
    ),
    (
        "read_units",
        "Neurons or heads read, summed over sparse steps (the union of the rows).",
        lambda c: c["read"],
    ),
    (
        "readable_units",
        "Neurons or heads there were, summed likewise: read / readable is the density per step.",
        lambda c: c["steps"] * c["units"],
    ),
    (
        "read_keys",
        "Keys of the attention's cache read in sparse steps, each with its value (CPU).",
        lambda c: c["cache_read"],
    ),
    (
        "readable_keys",
        "Keys there were in it, summed likewise: read / readable is the density of the cache (CPU).",
        lambda c: c["cache_held"],
    ),
    (
        "above_crossover_steps",
        "Decode steps in which all weights of this block were read, the batch being above its crossover.",
        lambda c: c["above_crossover"],
    ),
    (
        "sampled_active_units",
        "Truly active neurons or heads on sampled prompt rows.",
        lambda c: c["sampled_active"],
    ),
    (
        "sampled_hit_units",
        "Those of them that the predictor selects: hit / active is the recall.",
        lambda c: c["sampled_hit"],
    ),
    (
        "sampled_selected_units",
        "Neurons or heads that the predictor selects on sampled prompt rows.",
        lambda c: c["sampled_selected"],
    ),
)


def install() -> None:
    """Fetch counts whenever vLLM's asynchronous engine logs its statistics. Called in the front end; may be
    called again.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.do_log_stats
    if hasattr(original, "dejavu_exports"):
        return

    @functools.wraps(original)
    async def do_log_stats(self: AsyncLLM) -> None:
        exporter = vars(self).setdefault("_dejavu_exporter", _exporter_for(self.vllm_config))
        if exporter is not None:
            try:
                for engine, counts in (await counts_by_engine(self)).items():
                    exporter.update(summarize(counts), engine)
            except Exception as e:  # vLLM's own statistics go on; an engine that died says so itself
                logger.warning_once("dejavu: counts could not be fetched for /metrics: %r", e)
        await original(self)

    do_log_stats.dejavu_exports = True  # type: ignore[attr-defined]
    AsyncLLM.do_log_stats = do_log_stats


async def counts_by_engine(llm: AsyncLLM) -> dict[int, list[dict[str, Any]]]:
    """`dejavu_metrics` of every worker, by data-parallel engine."""
    client = llm.engine_core
    if len(client.core_engines) == 1:
        return {client.engine_ranks_managed[0]: await llm.collective_rpc("dejavu_metrics")}
    # `collective_rpc` calls all of them, but gives the answer of the first.
    calls = [
        client._call_utility_async("collective_rpc", "dejavu_metrics", None, (), None, engine=engine)
        for engine in client.core_engines
    ]
    return dict(zip(client.engine_ranks_managed, await asyncio.gather(*calls), strict=True))


def _exporter_for(vllm_config: Any) -> Exporter | None:
    # Of several API servers one counts: each would see the same totals.
    first = getattr(vllm_config.parallel_config, "_api_process_rank", 0) <= 0
    model = vllm_config.model_config
    return Exporter(model.served_model_name) if first and model.model_impl == "dejavu" else None


class Exporter:
    """Prometheus metrics of one served model, from summaries of its counts.

    Args:
        model_name: as the label of vLLM's own metrics.
    """

    def __init__(self, model_name: str):
        self.model_name = model_name
        self._metrics: dict[
            str, Any
        ] = {}  # vLLM unregisters what is called vllm:* when another engine starts in this process
        self.last: dict[tuple[str, ...], float] = {}

    def update(self, summary: dict[str, Any], engine: int = 0) -> None:
        """Bring the metrics of an engine up to a summary (`metrics.summarize`)."""
        common = (self.model_name, str(engine))
        for reason, count in summary["steps"].items():
            self._count(
                "steps",
                "Engine steps: sparse, or the reason why they were dense.",
                (*_COMMON, "reason"),
                (*common, reason),
                count,
            )
        for layer, blocks in enumerate(summary["layers"]):
            for block, counts in blocks.items():
                if not counts["gated"]:
                    continue
                for what, text, amount in _GATE_COUNTERS:
                    self._count(what, text, _GATE, (*common, str(layer), block), amount(counts))
                for what, value in counts["calibrated"].items():
                    if value is not None:
                        self._gauge(
                            f"calibrated_{what}",
                            f"The artifact's {what} on its calibration text.",
                            _GATE,
                            (*common, str(layer), block),
                            value,
                        )
        for block in ("mlp", "attention"):
            gates = [entry[block] for entry in summary["layers"] if entry[block]["gated"]]
            for what in ("density", "read_density", "sampled_recall"):
                values = [g[what] for g in gates if g[what] is not None]
                if values:
                    text = (
                        f"{what} since the start, mean over gated layers; for alerts, rates of the counters"
                        " follow changes sooner."
                    )
                    self._gauge(what, text, (*_COMMON, "block"), (*common, block), sum(values) / len(values))
        self._gauge(
            "predictor_bytes",
            "Memory of the predictors, all ranks.",
            _COMMON,
            common,
            summary["predictor_bytes"],
        )
        self._gauge(
            "dense_switch",
            "1 while the run-time switch has every gate select everything.",
            _COMMON,
            common,
            summary["dense_switch"],
        )
        artifact = summary["artifact"]
        labels = (
            *common,
            summary["mode"],
            artifact["digest"],
            str(artifact["fingerprint_verified"]).lower(),
            str(summary["weight_bits"]),
            str(summary["lm_head_bits"]),
        )
        self._gauge(
            "info",
            "What is served.",
            (*_COMMON, "mode", "artifact_digest", "fingerprint_verified", "weight_bits", "lm_head_bits"),
            labels,
            1,
        )

    def _count(
        self, what: str, text: str, labels: tuple[str, ...], values: tuple[str, ...], total: float
    ) -> None:
        seen = self.last.get((what, *values), 0)
        # Totals fall when counters are reset; what came since then is the new total.
        self._metric(Counter, what, text, labels).labels(*values).inc(
            total - seen if total >= seen else total
        )
        self.last[(what, *values)] = total

    def _gauge(
        self, what: str, text: str, labels: tuple[str, ...], values: tuple[str, ...], value: float
    ) -> None:
        self._metric(Gauge, what, text, labels, multiprocess_mode="mostrecent").labels(*values).set(value)

    def _metric(self, kind: type, what: str, text: str, labels: tuple[str, ...], **options: Any) -> Any:
        if what not in self._metrics:
            self._metrics[what] = kind(_PREFIX + what, text, labels, **options)
        return self._metrics[what]
