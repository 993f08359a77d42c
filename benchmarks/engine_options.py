"""Options of bench_engine.py, and what follows from the device."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import synthetic
from common import ENGINE_GEOMETRIES
from engine_sides import SIDES

# Tokens of one step. An engine starts with a step of this size, which on 2 cores takes 1.3B in bf16 some
# seconds a thousand.
PREFILL_TOKENS = {"cuda": 8192, "cpu": 1024}
DTYPE = {"cuda": "float16", "cpu": "bfloat16"}
PREDICTOR_DTYPE = {"cuda": "float16", "cpu": "int8"}  # int8 is what `vllm-dejavu train` makes
PREFILLS = {"cuda": 0, "cpu": 3}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Dense vLLM against dejavu, whole engines.")
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        help="(not given: cuda where torch finds one; a dry run rehearses a GPU's)",
    )
    parser.add_argument("--geometry", nargs="+", choices=ENGINE_GEOMETRIES, default=["6.7b"])
    parser.add_argument(
        "--model",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="instead: a checkpoint with tokenizer and artifact (DIR/dejavu); takes --text",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="prompts for --model: .txt or .jsonl, also .xz, .gz"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="of the sampling (not given: 0; 1 with --model, lest greedy text repeat itself)",
    )
    parser.add_argument(
        "--mlp-density",
        type=float,
        help="neurons that one token selects (not given: the geometry's preset); unions are scaled with it",
    )
    parser.add_argument(
        "--head-density", type=float, help="heads that one token selects; 1: attention is not gated"
    )
    parser.add_argument(
        "--predictor-dtype", choices=synthetic.PREDICTOR_DTYPES, help="(not given: float16; int8 on a CPU)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of weights and KV cache (not given: float16; bfloat16 on a CPU)",
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--context", nargs="+", type=int, default=[256, 1920], help="prompt tokens")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["dense", "dejavu"])
    parser.add_argument("--side", choices=SIDES, help="this side alone, once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps of a point")
    parser.add_argument("--warmup", type=int, default=8, help="decode steps before them")
    parser.add_argument(
        "--prefill",
        type=int,
        metavar="TIMES",
        help="also time a lone prompt of each context, so often (not given: 0; 3 on a CPU)",
    )
    parser.add_argument(
        "--hf-points",
        choices=["first", "all"],
        default="first",
        help="(batch, context) that hf is measured at",
    )
    parser.add_argument("--blocks", nargs="+", choices=["mlp", "attention"], default=["mlp", "attention"])
    parser.add_argument("--mlp-lookahead", choices=["self", "attn_input"], default="self")
    parser.add_argument(
        "--overlap", action="store_true", help="predict on a side stream; takes --mlp-lookahead attn_input"
    )
    parser.add_argument(
        "--survive", type=float, default=1.0, help="share of neurons that fc1 brings out positive for a token"
    )
    parser.add_argument(
        "--true-rates",
        action="store_true",
        help="draw fc1's biases so that each neuron comes out positive as often as its predictor selects it:"
        " what mode exact skips; --survive does not hold then",
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="of the MLP predictor; a small one shows what its bytes cost (not given: 3%% of the MLP)",
    )
    parser.add_argument("--spread", type=float, default=0.0, help="densities of layers vary by this share")
    parser.add_argument(
        "--dense-projections",
        action="store_true",
        help="ablation: Q and out_proj read every head; head densities are not counted then",
    )
    parser.add_argument(
        "--async-scheduling",
        choices=["default", "on", "off"],
        default="default",
        help="on both sides (%(default)s: vLLM's)",
    )
    parser.add_argument("--memory", type=float, default=0.9, help="gpu_memory_utilization (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="put into file names and rows: the name of an ablation")
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "dejavu-bench",
        help="synthetic models (%(default)s)",
    )
    parser.add_argument(
        "--budget-s", type=float, help="stop starting points after this; they are reported as not run"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny geometry on the CPU, eager: the script, not the speed"
    )
    parser.add_argument(
        "--smoke", type=Path, metavar="MODEL", help="instead: both sides answer a prompt of this model"
    )
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """With every option: callers such as profile_step.py name a few; and with what follows from the
    device.
    """
    args = argparse.Namespace(**{**vars(options().parse_args([])), **vars(args)})
    if args.device is None:
        import torch

        # a dry run rehearses the GPU suite, unless told otherwise
        args.device = "cuda" if args.dry_run or torch.cuda.is_available() else "cpu"
    for name, defaults in {"dtype": DTYPE, "predictor_dtype": PREDICTOR_DTYPE, "prefill": PREFILLS}.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.device])
    if args.temperature is None:
        args.temperature = 1.0 if args.model else 0.0
    return args


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options()
    args = complete(parser.parse_args(argv))
    for name in ("mlp_density", "head_density"):
        if (density := getattr(args, name)) is not None and not 0 < density <= 1:
            parser.error(
                f"--{name.replace('_', '-')} {density} is out of range: a density is a share kept, in (0, 1]"
            )
    if args.model and not args.text:
        parser.error("--model needs --text FILE: its prompts")
    if args.model and (args.dry_run or args.mlp_density or args.head_density):
        parser.error(
            "--model brings its own geometry and densities: leave out --dry-run, --mlp-density and"
            " --head-density"
        )
    if args.overlap and args.mlp_lookahead == "self":
        parser.error(
            "--overlap needs --mlp-lookahead attn_input: what reads the MLP's own input cannot run before it"
        )
    if args.side:
        args.sides, args.repeats = [args.side], 1
    if args.dry_run:
        args.geometry, args.batch, args.context = (
            ["tiny"],
            [b for b in args.batch if b <= 8],
            [min(64, args.context[0])],
        )
        args.prefill = min(args.prefill, 2)
        args.steps, args.warmup, args.repeats = min(args.steps, 8), min(args.warmup, 2), min(args.repeats, 2)
    return args
