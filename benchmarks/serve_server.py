"""The servers of bench_serve.py: the same settings on both sides, a warm-up, who else is busy beside them."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path

import quantized
from common import ROOT
from engine_columns import Others
from engine_models import CPU_BLOCK
from engine_options import PREFILL_TOKENS
from engine_sides import SIDES

from vllm_dejavu.families import Geometry

sys.path.append(str(ROOT / "scripts"))
from server import Server  # noqa: E402

THREADS = ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")
MARGIN = 16  # positions: a prompt may come out of decoding and tokenizing again a little longer
WARMUP = (1, 8)  # requests at once


def shape_of(model: Path) -> Geometry:
    from vllm_dejavu.plan import find_model

    return find_model(str(model))[0]


def length_of(args: argparse.Namespace, shape: Geometry) -> int:
    """Positions a request may take.

    Raises:
        ValueError: more than the model has.
    """
    positions, needed = shape.max_positions, args.input_len + args.output_len
    if needed > positions:
        raise ValueError(
            f"--input-len {args.input_len} and --output-len {args.output_len} make {needed} tokens;"
            f" {args.model.name} has {positions} positions."
        )
    return min(positions, needed + MARGIN)


def server_options(args: argparse.Namespace, shape: Geometry, side: str) -> list[str]:
    """Of vLLM's server; what came after `--` stands last, where it wins."""
    length = length_of(args, shape)
    # All rates send the same prompts, which no cache may remember.
    options = [
        "--dtype",
        args.dtype,
        "--max-model-len",
        str(length),
        "--no-enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]
    if args.max_num_seqs is not None:
        options += ["--max-num-seqs", str(args.max_num_seqs)]
    if args.device == "cpu":
        itemsize = 4 if args.dtype == "float32" else 2
        blocks = args.max_num_seqs * -(-length // CPU_BLOCK) + 2  # vLLM keeps one for itself
        cache = blocks * CPU_BLOCK * 2 * shape.num_kv_heads * shape.head_size * itemsize * shape.num_layers
        options += [
            "--kv-cache-memory-bytes",
            str(cache),
            "--max-num-batched-tokens",
            str(max(PREFILL_TOKENS["cpu"], length, args.max_num_seqs)),
        ]
    if args.dry_run:
        options += ["--enforce-eager"]
    options += ["--model-impl", SIDES[side].impl, "--kv-cache-dtype", SIDES[side].cache]
    if SIDES[side].impl == "dejavu":
        settings = SIDES[side].settings
        if SIDES[side].sparse and args.predictor is not None:
            settings = settings | {"predictor": str(args.predictor)}
        options += ["--additional-config", json.dumps({"dejavu": settings})]
    return [*options, *args.server]


def make_server(args: argparse.Namespace, shape: Geometry, side: str, log: Path) -> Server:
    """With vLLM's own threads, unless the environment says otherwise; a dry run takes one, as tests do."""
    model, options, scheme = args.model, server_options(args, shape, side), SIDES[side].scheme
    if scheme:
        model = quantized.write(model, args.work / f"{model.resolve().name}-{scheme}", scheme)
        options += ["--served-model-name", str(args.model)]  # the client asks every side for the same
    server = Server(model, *options, log=log)
    if not args.dry_run:
        for name in THREADS:
            server.env.pop(name, None)
        server.env |= {name: os.environ[name] for name in THREADS if name in os.environ}
    return server


def warm_up(server: Server, args: argparse.Namespace, shape: Geometry) -> None:
    numbers = random.Random(args.seed)
    for count in WARMUP:
        prompts = [
            [2, *(numbers.randrange(4, shape.vocab_size) for _ in range(args.input_len - 1))]
            for _ in range(count)
        ]
        server.post(
            "/v1/completions",
            {
                "model": str(args.model),
                "prompt": prompts,
                "max_tokens": min(8, args.output_len),
                "temperature": 0,
                "ignore_eos": True,
            },
        )


class Neighbours(Others):
    """As `Others`, where a server and this process with its children that have ended count as ours."""

    def __init__(self, server: Server):
        self.server = server
        super().__init__()

    def _now(self) -> tuple[float, float, float]:
        wall, every, own = Others._now()
        children = os.times()
        return (
            wall,
            every,
            own
            + children.children_user
            + children.children_system
            + sum(map(cpu_s, self.server.processes())),
        )


def cpu_s(process: int) -> float:
    """Seconds that a process has computed; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
