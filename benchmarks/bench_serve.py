"""Servers under load, stock vLLM against dejavu: `vllm bench serve` at Poisson rates, from idle to
saturation. A measurement.

    python benchmarks/bench_serve.py --model DIR --text FILE.txt --output results/
    python benchmarks/bench_serve.py --model DIR --rates 1 4 16 inf --output results/
        -- --tensor-parallel-size 2
    python benchmarks/bench_serve.py --model DIR --sides w8a8 dejavu-int8 --output results/
    python benchmarks/bench_serve.py --dry-run --output /tmp/out  # few requests to a tiny model: no times
    python benchmarks/bench_serve.py --report --output results/   # table and picture again

One server at a time (scripts/server.py), with the same settings on both sides but what makes the side
(engine_sides.py); for one that serves a quantized checkpoint, it is made (quantized.py). Sides alternate,
and their order changes from repeat to repeat. Every server gets every rate, idle in between. The client is
vLLM's own, in a process of its own; it sends the same prompts at the same times to both sides, others in
the next repeat. Prompts are random tokens, or with --text real text: what predictors select depends on it.
Answers have a fixed length. A failed request ends the run.

Rates are requests a second; `inf` sends all at once, which is saturation. TPOT is a request's mean time per
token after its first, so prompts of others that are read meanwhile are in it; percentiles are over requests.
Steps and densities are what our server counted during the rate. Ratios are above 1 where ours is better; each
is taken within a repeat, then the median.

On a CPU vLLM binds the worker to all cores but one, which its scheduler, front end and this client share
(VLLM_CPU_OMP_THREADS_BIND and OMP_NUM_THREADS are passed on). Writes serve.csv, a row a rate, side and
repeat, serve-ratios.csv, a row a rate, and serve.png; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import ROOT, Table
from engine_columns import BUSY_CORES
from engine_sides import SIDES
from serve_client import ClientError, client_options, counts, parse_result, run_client, tail, write_prompts
from serve_options import parse_args
from serve_report import report
from serve_server import Neighbours, length_of, make_server, shape_of, warm_up

from vllm_dejavu.families import Geometry
from vllm_dejavu.metrics import summarize

sys.path.append(str(ROOT / "scripts"))
from server import ServerError  # noqa: E402


def schedule(sides: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """(repeat, side) of each server, in order: neither side always comes first."""
    return [
        (repeat, side) for repeat in range(repeats) for side in (sides if repeat % 2 == 0 else sides[::-1])
    ]


class Turn(NamedTuple):
    """One server. prompts: the file of its repeat; None: random tokens."""

    repeat: int
    side: str
    prompts: Path | None


def serve(args: argparse.Namespace, shape: Geometry, turn: Turn, work: Path, table: Table) -> None:
    """All rates of one server; a row each. work: where the client's result goes.

    Raises:
        ClientError: requests failed, and --allow-failures was not given. ServerError: the server did not
        start or died.
    """
    (repeat, side, prompts), logs = turn, args.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    shared = {
        "model": args.model.resolve().name,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "temperature": args.temperature,
        "dtype": args.dtype,
        "prompts": "random tokens" if args.text is None else args.text.name,
        "seed": args.seed,
        "max_num_seqs": args.max_num_seqs,
        "weight_bits": SIDES[side].bits,
        "lm_head_bits": SIDES[side].head_bits,
        "kv_cache_dtype": SIDES[side].cache,
        "server_options": " ".join(args.server),
        "weights": "checkpoint",
        "synthetic": False,
        "dry_run": args.dry_run,
    }
    with make_server(args, shape, side, logs / f"serve-{side}-{repeat}.log") as server:
        server.start()
        start_s = server.wait_until_healthy(args.timeout_s)
        warm_up(server, args, shape)
        print(f"{side} repeat {repeat}: ready after {start_s:.0f} s", flush=True)
        for rate in args.rates:
            if SIDES[side].counts:
                server.post("/collective_rpc", {"method": "dejavu_reset_metrics"})
            result, log = work / "result.json", logs / f"serve-{side}-{repeat}-rate{rate:g}.log"
            others = Neighbours(server)
            found = run_client(
                client_options(args, server, rate, args.seed + repeat, prompts, result),
                result,
                log,
                args.timeout_s + args.requests / rate,
            )
            row = parse_result(found, args.requests, args.output_len)
            row["others_cores"] = others.cores()
            if SIDES[side].counts:
                row |= counts(summarize(server.metrics()), row["output_tokens"])
            table.add(
                benchmark="serve",
                side=side,
                repeat=repeat,
                request_rate=rate,
                **row,
                start_s=start_s,
                **shared,
            )
            print(f"    rate {rate:g}: {line(row, args.device)}", flush=True)
            if row["status"] != "ok" and not args.allow_failures:
                raise ClientError(
                    f"{side} at rate {rate:g}: {row['status']} (--allow-failures goes on). The end of"
                    f" {log}:\n{tail(log)}"
                )


def line(row: Mapping[str, Any], device: str) -> str:
    if row["tpot_p50_ms"] is None:
        return row["status"]
    busy = row["others_cores"]
    note = (
        f"  NOT ALONE: other processes kept {busy:.2f} cores busy"
        if device == "cpu" and busy > BUSY_CORES
        else ""
    )
    share = "" if row.get("sparse_step_share") is None else f", sparse steps {row['sparse_step_share']:.0%}"
    return (
        f"{row['request_rate_achieved']:.2f} requests/s, TPOT {row['tpot_p50_ms']:.1f} ms, TTFT"
        f" {row['ttft_p50_ms']:.0f} ms, {row['output_tokens_per_s']:.0f} tokens/s{share};"
        f" {row['status']}{note}"
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All servers; the rows of serve.csv."""
    shape, table = shape_of(args.model), Table(args.output / "serve.csv")
    length_of(args, shape)
    with tempfile.TemporaryDirectory(prefix="dejavu-serve-") as work:
        prompts: dict[int, Path | None] = {}
        for repeat, side in schedule(args.sides, args.repeats):
            if repeat not in prompts:
                prompts[repeat] = None if args.text is None else write_prompts(args, repeat, Path(work))
            serve(args, shape, Turn(repeat, side, prompts[repeat]), Path(work), table)
    return table.rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.report:
        return report(args.output)
    try:
        run(args)
    except (ClientError, ServerError, ValueError, OSError) as e:
        raise SystemExit(f"bench_serve: {e}") from e
    report(args.output)
    if args.dry_run:
        print("DRY RUN: everything ran; its times are no measurement")


if __name__ == "__main__":
    main()
