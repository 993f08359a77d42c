"""What the host costs a step on a CPU: a random OPT too small for its products to count, 24 layers deep. A
measurement.

    python benchmarks/host_time.py --batch 1 4 --repeats 3 --output OUT

Stock vLLM and dejavu (MLP and attention gated, half of each selected) in turns, an engine in a process each,
compiled; milliseconds of a decode step as the difference of a long and a short request, so that the prompt
cancels. With --context the prompts are longer, and the attention counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Table, median, print_rows
from engine_side import environment

LAYERS, LONG, SHORT = 24, 129, 1


def step_ms(work: Path, impl: str, batch: int, context: int) -> list[float]:
    """Of five pairs of requests; the model and its predictors are made in `work`."""
    sys.path.append(str(ROOT / "tests"))
    from tiny import make_artifact, make_opt
    from vllm import LLM, SamplingParams

    model = make_opt(work / "model", layers=LAYERS, positions=context + LONG + 16)
    options = {}
    if impl == "dejavu":
        artifact = make_artifact(work / "artifact", model, density=0.5)
        options = {"additional_config": {"dejavu": {"predictor": str(artifact), "crossover": 1.0}}}
    llm = LLM(
        str(model),
        model_impl=impl,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        disable_log_stats=True,
        max_num_seqs=max(2, batch),
        enable_prefix_caching=False,
        kv_cache_memory_bytes=512 << 20,
        **options,
    )
    prompts = [{"prompt_token_ids": [5 + i] * context} for i in range(batch)]

    def took(tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    took(8)
    return [1e3 * (took(LONG) - took(SHORT)) / (LONG - SHORT) for _ in range(5)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of a decode step on a CPU.")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument("--side", choices=["vllm", "dejavu"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(environment(False))
    if args.side:
        with tempfile.TemporaryDirectory() as work:
            print("\n" + json.dumps(step_ms(Path(work), args.side, args.batch[0], args.context)), flush=True)
        os._exit(0)
    table = Table(args.output / "host-time.csv")
    for batch in args.batch:
        found: dict[str, list[float]] = {"vllm": [], "dejavu": []}
        for repeat in range(args.repeats):
            for side in sorted(found, reverse=repeat % 2 == 0):
                command = [sys.executable, __file__, "--side", side, "--batch", str(batch)]
                command += ["--context", str(args.context)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[side].append(median(json.loads(done.stdout.splitlines()[-1])))
        ratios = [a / b for a, b in zip(found["dejavu"], found["vllm"], strict=True)]
        table.add(
            benchmark="host time",
            batch=batch,
            context=args.context,
            layers=LAYERS,
            vllm_ms=median(found["vllm"]),
            dejavu_ms=median(found["dejavu"]),
            ratio=median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
            repeats=args.repeats,
        )
    columns = ("batch", "context", "vllm_ms", "dejavu_ms", "ratio", "ratio_min", "ratio_max", "repeats")
    print_rows(table.rows, columns)


if __name__ == "__main__":
    main()
