"""Options of bench_serve.py, and what follows from the device."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import ROOT
from engine_options import DTYPE
from engine_sides import SIDES, STOCK

# By the device: a 2-core CPU with a model of 1.3B's width, OPT from 6.7B on a GPU.
RATES = {"cuda": (1.0, 4.0, 8.0, 16.0, math.inf), "cpu": (0.5, 1.0, 2.0, 4.0, math.inf)}
REQUESTS = {"cuda": 256, "cpu": 64}
INPUT_LEN = {"cuda": 256, "cpu": 128}
OUTPUT_LEN = {"cuda": 128, "cpu": 64}
MAX_NUM_SEQS = {"cuda": None, "cpu": 64}  # None: vLLM's own
DRY_RUN = {
    "rates": (4.0, math.inf),
    "requests": 4,
    "input_len": 16,
    "output_len": 8,
    "repeats": 1,
    "max_num_seqs": 8,
    "dtype": "float32",
}
LONGEST_TEXT = 1000  # vLLM's client drops prompts of a file that are longer than 1024 tokens
OURS = ("--model", "--model-impl", "--kv-cache-dtype", "--additional-config", "--host", "--port")


def rate_of(text: str) -> float:
    rate = float(text)
    if not rate > 0:  # also NaN
        raise argparse.ArgumentTypeError(
            f"{text} is out of range: requests a second are positive; inf sends all at once"
        )
    return rate


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Dense vLLM servers against dejavu under load.",
        epilog="Options after -- go to both servers, e.g. -- --gpu-memory-utilization 0.8",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "examples" / "opt-books-7m",
        help="a directory with an OPT model and its tokenizer (%(default)s)",
    )
    parser.add_argument("--predictor", type=Path, help="its predictor artifact (not given: MODEL/dejavu)")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="prompts: .txt or .jsonl, also .xz, .gz (not given: random tokens)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=rate_of,
        help="requests a second; inf: all at once (not given: 1 4 8 16 inf; 0.5 1 2 4 inf on a CPU)",
    )
    parser.add_argument("--requests", type=int, help="of each rate (not given: 256; 64 on a CPU)")
    parser.add_argument("--input-len", type=int, help="tokens of a prompt (not given: 256; 128 on a CPU)")
    parser.add_argument("--output-len", type=int, help="tokens of an answer (not given: 128; 64 on a CPU)")
    parser.add_argument(
        "--sides",
        nargs=2,
        choices=[name for name, side in SIDES.items() if side.impl != "hf"],
        default=["dense", "dejavu"],
        metavar=("STOCK", "OURS"),
        help="see engine_sides.py (not given: dense dejavu)",
    )
    parser.add_argument("--repeats", type=int, help="servers of each side (not given: 3)")
    parser.add_argument(
        "--max-num-seqs",
        type=int,
        help="requests that a server runs at once (not given: vLLM's own; 64 on a CPU)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of weights and KV cache (not given: float16; bfloat16 on a CPU)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of the sampling (%(default)s; greedy text repeats itself)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of prompts and arrivals in the first repeat; the next takes the next one",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=1800,
        help="for a server to start, and for a rate beyond its last arrival",
    )
    parser.add_argument(
        "--allow-failures",
        action="store_true",
        help="go on after failed requests; no ratio is taken of such a rate",
    )
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "dejavu-bench",
        help="quantized checkpoints (%(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="few requests, two rates, eager: the script, not the speed"
    )
    parser.add_argument(
        "--report", action="store_true", help="instead: table and picture of what --output has"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = options()
    args = parser.parse_args(argv[:split])
    args.server = argv[split + 1 :]
    for option in args.server:
        if (name := option.partition("=")[0]) in OURS:
            parser.error(f"{name} is set for each side here: leave it out behind --")
    if args.sides[0] not in STOCK or args.sides[1] in STOCK:
        parser.error(
            f"--sides {' '.join(args.sides)}: expected one of stock vLLM ({', '.join(STOCK)}), then ours"
        )
    import torch

    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = {
        "rates": RATES,
        "requests": REQUESTS,
        "input_len": INPUT_LEN,
        "output_len": OUTPUT_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        "dtype": DTYPE,
    }
    for name, by_device in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, DRY_RUN[name] if args.dry_run else by_device[args.device])
    if args.repeats is None:
        args.repeats = DRY_RUN["repeats"] if args.dry_run else 3
    for name in ("requests", "input_len", "output_len", "repeats"):
        # a request of one token has no time per token
        if getattr(args, name) < (least := 2 if name in ("input_len", "output_len") else 1):
            parser.error(
                f"--{name.replace('_', '-')} {getattr(args, name)} is too small: expected at least {least}"
            )
    if args.max_num_seqs is not None and args.max_num_seqs < 1:
        parser.error(f"--max-num-seqs {args.max_num_seqs} is too small: expected at least 1")
    if args.text is not None and args.input_len > LONGEST_TEXT:
        parser.error(
            f"--input-len {args.input_len} is too large with --text: vLLM's client leaves out prompts of a"
            f" file above 1024 tokens; at most {LONGEST_TEXT} here"
        )
    args.rates = sorted(set(args.rates))
    return args
