"""What watching costs: fetching the counts, and recall on sampled prompt rows. A measurement, in one
in-process engine, in turns.

    python benchmarks/metrics_cost.py --model DIR --output results/

The counters themselves are written by the kernels and cannot be taken out. Writes metrics_cost.csv: medians,
with 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from common import Table, median, percentile, print_rows

from vllm_dejavu.config import DejaVuConfig

PROMPT, NEW_TOKENS = 128, 32
DEFAULT = DejaVuConfig().sample_recall


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is switched between two repeats
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=args.model,
        model_impl="dejavu",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    model = (
        llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model()
    )
    blocks = [m for m in model.modules() if hasattr(m, "foresee")]
    assert blocks, "no gated block"

    def sample(every: int) -> None:
        for block in blocks:
            block.settings = dataclasses.replace(block.settings, sample_recall=every)

    def run(tokens: int) -> float:
        prompt = {"prompt_token_ids": [2, *range(10, 9 + PROMPT)]}
        return seconds(
            lambda: llm.generate(
                [prompt],
                SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False),
                use_tqdm=False,
            )
        )

    run(NEW_TOKENS)
    found: dict[str, list[float]] = {
        "prompt, never sampled": [],
        "prompt, sampled in every gate": [],
        f"prompt, 1 in {DEFAULT}": [],
        "fetching the counts": [],
        "a decode step": [],
    }
    for _ in range(args.repeats):
        for what, every in (
            ("prompt, never sampled", 0),
            ("prompt, sampled in every gate", 1),
            (f"prompt, 1 in {DEFAULT}", DEFAULT),
        ):
            sample(every)
            found[what].append(run(1))
        found["fetching the counts"].append(seconds(lambda: llm.collective_rpc("dejavu_metrics")))
        found["a decode step"].append(
            (run(NEW_TOKENS) - found[f"prompt, 1 in {DEFAULT}"][-1]) / (NEW_TOKENS - 1)
        )
    table = Table(args.output / "metrics_cost.csv")
    base = found["prompt, never sampled"]
    for what, times in found.items():
        ratios = [a / b for a, b in zip(times, base, strict=True)] if what.startswith("prompt") else []
        table.add(
            benchmark="metrics cost",
            model=Path(args.model).resolve().name,
            what=what,
            ms=1e3 * median(times),
            ms_p20=1e3 * percentile(times, 0.2),
            ms_p80=1e3 * percentile(times, 0.8),
            ratio=median(ratios) if ratios else None,
            ratio_p20=percentile(ratios, 0.2) if ratios else None,
            ratio_p80=percentile(ratios, 0.8) if ratios else None,
            repeats=args.repeats,
            prompt_tokens=PROMPT,
        )
    print_rows(table.rows, ("what", "ms", "ms_p20", "ms_p80", "ratio", "ratio_p20", "ratio_p80"))


if __name__ == "__main__":
    main()
