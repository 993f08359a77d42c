"""CTranslate2's INT8 on an OPT geometry: milliseconds a token, beside bench_engine's. A measurement.

    pip install ctranslate2
    python benchmarks/studies/peer_ctranslate2.py --geometry 1.3b --tokenizer DIR --batch 1 4 16 --context 128
        --output benchmarks/results/cpu

Weights are random (speed only): a checkpoint of the geometry is written, converted with `--quantization
int8` (weights and LM head in 8 bits, inputs rounded for each token) and decoded greedily on all cores. A
token's time is that of `--steps` more tokens: of two calls, which differ in length alone, so that prompts
cancel; median of the repeats' differences. DIR: an OPT tokenizer, which the converter wants to see.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import Table, geometry, median, print_rows  # noqa: E402

from vllm_dejavu.published import GEOMETRIES  # noqa: E402

FEW = 4  # tokens of the shorter call


def write_checkpoint(name: str, tokenizer: Path, to: Path) -> None:
    """A random OPT of a geometry, bf16, with a tokenizer."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    g = geometry(name)
    config = OPTConfig(
        vocab_size=g.vocab_size,
        hidden_size=g.hidden_size,
        word_embed_proj_dim=g.hidden_size,
        ffn_dim=g.ffn_dim,
        num_hidden_layers=g.num_layers,
        num_attention_heads=g.num_heads,
        max_position_embeddings=g.max_positions,
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(to)
    for file in tokenizer.iterdir():
        shutil.copy(file, to)


def convert(checkpoint: Path, to: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint), load_as_float16=True).convert(str(to), quantization="int8")


def times_of(generator: object, prompts: list[list[str]], steps: int, repeats: int) -> list[float]:
    """Milliseconds a token, one of each repeat."""

    def took(tokens: int) -> float:
        began = time.perf_counter()
        results = generator.generate_batch(  # type: ignore[attr-defined]
            prompts,
            min_length=tokens,
            max_length=tokens,
            include_prompt_in_result=False,
            max_batch_size=len(prompts),
        )
        assert all(len(r.sequences_ids[0]) == tokens for r in results), "not as many tokens as asked for"
        return time.perf_counter() - began

    took(FEW)
    return [1e3 * (took(FEW + steps) - took(FEW)) / steps for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description="CTranslate2's INT8 on an OPT geometry.")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="1.3b")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    import ctranslate2

    cores = len(os.sched_getaffinity(0))
    table = Table(args.output / f"peer-ctranslate2-{args.geometry}.csv")
    with tempfile.TemporaryDirectory() as work:
        write_checkpoint(args.geometry, args.tokenizer, Path(work) / "checkpoint")
        convert(Path(work) / "checkpoint", Path(work) / "int8")
        generator = ctranslate2.Generator(
            f"{work}/int8", device="cpu", compute_type="int8", inter_threads=1, intra_threads=cores
        )
        vocabulary = ["\u0120the", "\u0120of", "\u0120and", "\u0120ship", "\u0120was"]
        numbers = random.Random(0)
        for batch in args.batch:
            prompts = [["</s>", *numbers.choices(vocabulary, k=args.context - 1)] for _ in range(batch)]
            ms = times_of(generator, prompts, args.steps, args.repeats)
            table.add(
                benchmark="peer",
                peer=f"CTranslate2 {ctranslate2.__version__}",
                compute_type=generator.compute_type,
                geometry=args.geometry,
                synthetic=True,
                batch=batch,
                context=args.context,
                threads=cores,
                ms=median(ms),
                ms_min=min(ms),
                ms_max=max(ms),
            )
    print_rows(table.rows, ("peer", "compute_type", "geometry", "batch", "context", "ms", "ms_min", "ms_max"))


if __name__ == "__main__":
    main()
