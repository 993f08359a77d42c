"""How many keys of the cache must be spared for attention over the selected heads alone to be faster,
measured on this CPU for `tune`.

Timed is the op that serves, over a block whose projections are as narrow as can be: with all heads, and with
half of them. What a pair of row and head costs beyond its keys is the same at every length, so the gain is a
line over the keys that are spared; where it crosses zero is the answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_dejavu import metrics
from vllm_dejavu.compat import cpu_attention_isa, cpu_attention_schedule, cpu_attention_splits
from vllm_dejavu.compat import key_and_value_cache as halves
from vllm_dejavu.kernels import cpu
from vllm_dejavu.timing import Timer

NEVER = 2**31 - 1
BATCHES, CONTEXTS = (1, 4), (128, 256, 512, 1024)
BLOCK_SIZE = 128  # vLLM's own on a CPU
HIDDEN = 64
ROTATED_BYTES, MOST_COPIES = 256 << 20, 16  # of caches, beyond any cache of the CPU's


def measure(
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    timer: Timer,
    progress: Callable[[str], None],
) -> dict[str, Any] | None:
    """Heads: of one tensor-parallel rank.

    Returns:
        cache_crossover: keys, `NEVER` where nothing is gained however many are spared; cache_measured: a row
        a batch size and context, microseconds. None: this machine cannot read selected heads.
    """
    if not cpu.available():
        return None
    current_platform.import_kernels()
    rows = []
    for batch in BATCHES:
        for context in CONTEXTS:
            point = _Point(batch, context, heads, kv_heads, head_size, dtype)
            if not point.selects:
                return None
            with torch.inference_mode():
                times = timer(point.runs(), len(point.models))
            all_heads, selected = (statistics.median(times[name]) for name in ("all", "selected"))
            rows.append(
                {
                    "batch": batch,
                    "context": context,
                    "spared": point.spared,
                    "all_us": all_heads,
                    "selected_us": selected,
                }
            )
            progress(
                f"cache     {batch:3} tokens, context {context:4}: all heads {all_heads:8.1f} us, half of"
                f" them {selected:8.1f} us"
            )
    found = crossing([(r["spared"], r["all_us"] - r["selected_us"], r["all_us"]) for r in rows])
    return {"cache_crossover": found, "cache_measured": rows}


def crossing(points: list[tuple[int, float, float]]) -> int:
    """Where a line through the gains crosses zero.

    Args:
        points: (keys spared, microseconds gained, microseconds of all heads), of which the last weighs:
            errors are as large as what was timed.
    """
    weights = torch.tensor([1 / whole for *_, whole in points], dtype=torch.float64)
    spared, gained = (torch.tensor([p[i] for p in points], dtype=torch.float64) for i in (0, 1))
    columns = torch.stack([spared, -torch.ones_like(spared)], 1)
    each, once = torch.linalg.lstsq(
        columns * weights[:, None], (gained * weights)[:, None]
    ).solution.flatten()
    if each <= 0:
        return NEVER
    return min(NEVER, max(0, round(float(once / each))))


class _Point:
    """Blocks over caches of so many sequences of one length."""

    def __init__(self, batch: int, context: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype):
        blocks = -(-context // BLOCK_SIZE)
        bytes_each = batch * blocks * BLOCK_SIZE * kv_heads * 2 * size * dtype.itemsize
        copies = min(MOST_COPIES, max(2, -(-ROTATED_BYTES // bytes_each)))
        self.batch, self.heads, self.dtype = batch, heads, dtype
        self.lens = torch.full((batch,), context, dtype=torch.int32)
        self.starts = torch.arange(batch + 1, dtype=torch.int32)
        self.table = torch.randperm(batch * blocks).view(batch, blocks).int()
        self.slots = (
            self.table[:, (context - 1) // BLOCK_SIZE].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
        )
        isa = cpu_attention_isa(dtype, BLOCK_SIZE, size)
        shape = batch, heads, kv_heads, size, self.lens, dtype, self.starts, isa
        self.schedule = cpu_attention_schedule(*shape)
        # half of the keys, each with all of its queries
        chosen = torch.rand(batch, kv_heads).argsort(1).argsort(1) < -(-kv_heads // 2)
        self.scores = torch.where(chosen, 1.0, -1.0).repeat_interleave(heads // kv_heads, 1).contiguous()
        self.spared = int((~chosen).sum()) * context
        self.x = torch.randn(batch, HIDDEN).to(dtype)
        self.models = [self._model(blocks, kv_heads, size, isa) for _ in range(copies)]

    def _model(self, blocks: int, kv_heads: int, size: int, isa: str) -> dict[str, Any]:
        """{"all": a model that never selects, "selected": one that always does}, over the same cache."""
        cache = torch.zeros(self.batch * blocks, kv_heads, BLOCK_SIZE, 2 * size, dtype=self.dtype)
        key_value = halves(cache, kv_heads, size)
        qkv = torch.randn((self.heads + 2 * kv_heads) * size, HIDDEN).to(self.dtype)
        out = torch.randn(HIDDEN, self.heads * size).to(self.dtype)
        counters = torch.zeros(len(metrics.GATE_COUNTERS), dtype=torch.int64)
        predictor = [torch.zeros(self.heads, HIDDEN), torch.zeros(self.heads)]
        made = {}
        self.selects = True
        for name, least in (("all", None), ("selected", 0)):
            model = torch.classes.dejavu_cpu.Model(1, False)
            weights = qkv, None, None, out, None, None, False
            heads = [self.heads, kv_heads, size]
            model.add_attention(0, "", [counters] * 4, -1, predictor, *weights, heads, None, False)
            numbers = [size**-0.5, 0.0, 1.0, 1.0]
            fixed = isa, "auto", numbers, -1, None, None, cpu_attention_splits()
            way = model.use_cache(0, *key_value, *fixed, least)
            self.selects = self.selects and way == (1 if least is None else 2)
            made[name] = model
        return made

    def runs(self) -> dict[str, Callable[[int], Any]]:
        return dict(self._runs())

    def _runs(self) -> Iterator[tuple[str, Callable[[int], Any]]]:
        sequences = [self.starts, self.lens, self.table, self.schedule]
        positions = torch.zeros(self.batch, dtype=torch.int64)
        for name in ("all", "selected"):

            def run(i: int, name: str = name) -> None:
                model = self.models[i][name]
                model.begin(True, [], [], self.lens, self.slots, sequences, self.batch, True, True)
                torch.ops.dejavu_cpu.attention(self.x, self.x, positions, self.scores, 0)
                model.end()

            yield name, run
