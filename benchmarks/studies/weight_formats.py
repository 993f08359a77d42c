"""Perplexity of every side of bench_engine on the same text: what weight formats cost, stock vLLM's and ours.

    python benchmarks/studies/weight_formats.py --model examples/opt-books-7m --data books_test.txt.xz
        --max-tokens 105000 --output benchmarks/results/quality

Each side in an engine of its own, eager, on the same windows; sparse sides with `apply_to: all`, every token
on the sparse path, in prompts of the model's context: int8 weights meet inputs in 8 bits then, as they do in
prompts and large batches. In small ones they meet more exact inputs: `--step-tokens 8` reads the text in
pieces of so many tokens.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import Table, print_rows  # noqa: E402
from engine_sides import SIDES  # noqa: E402
from quantized import write  # noqa: E402

from vllm_dejavu.families import geometry_of  # noqa: E402
from vllm_dejavu.predictor_training import data  # noqa: E402
from vllm_dejavu.predictor_training.evaluate import BATCH, cache_bytes, increase, score  # noqa: E402

COLUMNS = (
    "side",
    "weight_bits",
    "head_bits",
    "perplexity",
    "rise",
    "rise_stderr",
    "over_16_bits",
    "over_16_bits_stderr",
)


def options_of(name: str, model: Path, work: Path, dtype: str) -> dict[str, Any]:
    """Of vLLM's LLM."""
    side = SIDES[name]
    where = write(model, work / side.scheme, side.scheme) if side.scheme else model
    options: dict[str, Any] = {"model": str(where), "model_impl": side.impl, "dtype": dtype}
    if side.impl == "dejavu":
        settings = side.settings | ({"apply_to": "all"} if side.sparse else {})
        options["additional_config"] = {"dejavu": settings}
    return options


def perplexities(
    name: str, windows: torch.Tensor, options: dict[str, Any], cache: int, step_tokens: int | None
) -> torch.Tensor:
    """nll [windows, seq_len - 1] of a side."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        **options,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=min(BATCH, step_tokens or BATCH),
        max_num_batched_tokens=step_tokens,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        kv_cache_memory_bytes=cache,
    )
    try:
        return score(llm, windows, name)[0]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity by weight format, on the same text.")
    parser.add_argument("--model", type=Path, required=True, help="directory with one safetensors file")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--step-tokens", type=int, help="most tokens of a step (not given: vLLM's)")
    sides = [name for name, side in SIDES.items() if side.impl != "hf"]
    parser.add_argument(
        "--sides", nargs="+", choices=sides, default=sides, help="dense and dejavu among them"
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(args.model)
    geometry = geometry_of(config)
    texts = [text for source in args.data for text in data.read_documents(source)]
    tokens = data.tokenize(texts, AutoTokenizer.from_pretrained(args.model))
    windows = data.pack(
        tokens, min(2048, geometry.max_positions) - 1, config.bos_token_id, max_tokens=args.max_tokens, seed=0
    ).tokens
    found: dict[str, torch.Tensor] = {}
    pieces = f"-steps-of-{args.step_tokens}" if args.step_tokens else ""
    table = Table(args.output / f"weight-formats-{args.model.name}{pieces}.csv")
    with tempfile.TemporaryDirectory() as work:
        for name in args.sides:
            options = options_of(name, args.model.resolve(), Path(work), args.dtype)
            found[name] = nll = perplexities(name, windows, options, cache_bytes(geometry), args.step_tokens)
            row: dict[str, Any] = {
                "model": args.model.name,
                "side": name,
                "weight_bits": SIDES[name].bits,
                "head_bits": SIDES[name].head_bits,
                "tokens": windows.numel(),
                "step_tokens": args.step_tokens,
                "perplexity": math.exp(float(nll.mean())),
            }
            if "dense" in found:
                row |= increase("rise", nll, found["dense"])
            sixteen = found.get("dejavu" if SIDES[name].sparse else "dense")
            if sixteen is not None:
                row |= increase("over_16_bits", nll, sixteen)
            table.add(benchmark="weight formats", **row)
    print_rows(table.rows, COLUMNS)


if __name__ == "__main__":
    main()
