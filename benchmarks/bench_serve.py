"""Servers under load, dense vLLM against dejavu: `vllm bench serve` at Poisson rates, from idle to
saturation. A measurement.

    python benchmarks/bench_serve.py --model DIR --text FILE.txt --output results/
    python benchmarks/bench_serve.py --model DIR --rates 1 4 16 inf --output results/ --
    --tensor-parallel-size 2 python benchmarks/bench_serve.py --dry-run --output /tmp/out       # few requests
    to a tiny model; times mean nothing python benchmarks/bench_serve.py --report --output results/        #
    table and picture again

One server at a time (scripts/server.py), with the same settings on both sides but --model-impl; sides
alternate, and their order changes from repeat to repeat. Every server gets every rate, idle in between. The
client is vLLM's own, in a process of its own; it sends the same prompts at the same times to both sides,
others in the next repeat. Prompts are random tokens, or with --text real text: what predictors select depends
on it. Answers have a fixed length. A failed request ends the run.

Rates are requests a second; `inf` sends all at once, which is saturation. TPOT is a request's mean time per
token after its first, so prompts of others that are read meanwhile are in it; percentiles are over requests.
Steps and densities are what the dejavu server counted during the rate. Ratios are above 1 where dejavu is
better; each is taken within a repeat, then the median.

On a CPU vLLM binds the worker to all cores but one, which its scheduler, front end and this client share
(VLLM_CPU_OMP_THREADS_BIND and OMP_NUM_THREADS are passed on). Writes serve.csv, a row a rate, side and
repeat, serve-ratios.csv, a row a rate, and serve.png; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_engine import BUSY_CORES, CPU_BLOCK, DTYPE, PREFILL_TOKENS, PROVENANCE, text_prompts
from common import ROOT, Table, median, number, pyplot, read_rows, write_rows
from engine_side import Others, densities

sys.path.append(str(ROOT / "scripts"))
from server import Server, ServerError  # noqa: E402

from vllm_dejavu.metrics import summarize  # noqa: E402
from vllm_dejavu.roofline import Geometry  # noqa: E402

SIDES = ("dense", "dejavu")
# What `vllm bench serve` runs; the command itself asks for metadata of a distribution `vllm`, which vllm-cpu
# does not bring.
CLIENT = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
CLIENT_ENV = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "NO_COLOR": "1",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",  # its HTTP library asks proxies for anything else
}
THREADS = ("VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")
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
MARGIN = 16  # positions: a prompt may come out of decoding and tokenizing again a little longer
LONGEST_TEXT = 1000  # vLLM's client drops prompts of a file that are longer than 1024 tokens
WARMUP = (1, 8)  # requests at once
OURS = ("--model", "--model-impl", "--additional-config", "--host", "--port")
TIMES = ("tpot_p50_ms", "tpot_p99_ms", "ttft_p50_ms", "ttft_p99_ms")


def schedule(sides: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """(repeat, side) of each server, in order: neither side always comes first."""
    return [
        (repeat, side) for repeat in range(repeats) for side in (sides if repeat % 2 == 0 else sides[::-1])
    ]


# --- a server
# ----------------------------------------------------------------------------------------------------


def shape_of(model: Path) -> Geometry:
    from vllm_dejavu.plan import find_model

    return find_model(str(model))[0]


def length_of(args: argparse.Namespace, shape: Geometry) -> int:
    """Positions a request may take.

    Raises:
        ValueError: more than the model has.
    """
    positions, needed = shape.positions - 2, args.input_len + args.output_len
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
        cache = blocks * CPU_BLOCK * 2 * shape.hidden * itemsize * shape.num_layers
        options += [
            "--kv-cache-memory-bytes",
            str(cache),
            "--max-num-batched-tokens",
            str(max(PREFILL_TOKENS["cpu"], length, args.max_num_seqs)),
        ]
    if args.dry_run:
        options += ["--enforce-eager"]
    options += ["--model-impl", "vllm" if side == "dense" else "dejavu"]
    if side == "dejavu" and args.predictor is not None:
        options += ["--additional-config", json.dumps({"dejavu": {"predictor": str(args.predictor)}})]
    return [*options, *args.server]


def make_server(args: argparse.Namespace, shape: Geometry, side: str, log: Path) -> Server:
    """With vLLM's own threads, unless the environment says otherwise; a dry run takes one, as tests do."""
    server = Server(args.model, *server_options(args, shape, side), log=log)
    if not args.dry_run:
        for name in THREADS:
            server.env.pop(name, None)
        server.env |= {name: os.environ[name] for name in THREADS if name in os.environ}
    return server


def warm_up(server: Server, args: argparse.Namespace, shape: Geometry) -> None:
    numbers = random.Random(args.seed)
    for count in WARMUP:
        prompts = [
            [2, *(numbers.randrange(4, shape.vocab) for _ in range(args.input_len - 1))] for _ in range(count)
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


# --- the client
# ----------------------------------------------------------------------------------------------------


class ClientError(RuntimeError):
    """vLLM's client failed, or its result is not what was asked for."""


def write_prompts(args: argparse.Namespace, repeat: int, directory: Path) -> Path:
    """Prompts of a repeat out of the text, in the only kind of file that vLLM's client reads without
    pandas.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = text_prompts(args.model, args.text, args.input_len, args.requests, args.seed + repeat)
    prompts = tokenizer.batch_decode([window[1:] for window in windows])  # the server puts BOS in front
    path = directory / f"prompts-{repeat}.json"
    path.write_text(
        json.dumps([{"conversations": [{"value": prompt}, {"value": ""}]} for prompt in prompts]),
        encoding="utf-8",
    )
    return path


def client_options(
    args: argparse.Namespace, rate: float, seed: int, host: str, port: int, prompts: Path | None, result: Path
) -> list[str]:
    """Of `vllm bench serve`."""
    if prompts is None:
        dataset = [
            "--dataset-name",
            "random",
            "--random-input-len",
            str(args.input_len),
            "--random-output-len",
            str(args.output_len),
        ]
    else:
        dataset = [
            "--dataset-name",
            "sharegpt",
            "--dataset-path",
            str(prompts),
            "--sharegpt-output-len",
            str(args.output_len),
        ]
    return [
        "--backend",
        "openai",
        "--host",
        host,
        "--port",
        str(port),
        "--model",
        str(args.model),
        *dataset,
        "--num-prompts",
        str(args.requests),
        "--request-rate",
        str(rate),
        "--seed",
        str(seed),
        "--ignore-eos",
        "--temperature",
        str(args.temperature),
        # A request sent before the others would be in the server's counts.
        "--num-warmups",
        "0",
        "--ready-check-timeout-sec",
        "0",
        "--disable-tqdm",
        "--percentile-metrics",
        "ttft,tpot,itl",
        "--metric-percentiles",
        "50,99",
        "--save-result",
        "--result-dir",
        str(result.parent),
        "--result-filename",
        result.name,
    ]


def run_client(options: Sequence[str], result: Path, log: Path, timeout_s: float) -> dict[str, Any]:
    """One run of `vllm bench serve`: the JSON it saves.

    Raises:
        ClientError: it failed or took too long; with the end of its log.
    """
    result.unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"} | CLIENT_ENV
    with log.open("w", encoding="utf-8") as file:
        try:
            code: int | str = subprocess.run(
                [sys.executable, "-c", CLIENT, *options],
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"none within {timeout_s:.0f} s"
    if code or not result.is_file():
        raise ClientError(
            f"vllm bench serve saved no result, exit code {code}. The end of {log}:\n{tail(log)}"
        )
    return json.loads(result.read_text(encoding="utf-8"))


def tail(log: Path, lines: int = 25) -> str:
    return (
        "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        if log.exists()
        else ""
    )


def parse_result(result: Mapping[str, Any], requests: int, output_len: int) -> dict[str, Any]:
    """Columns out of the JSON of `vllm bench serve`. Times of failed requests are in none of them.

    Returns:
        status: "ok", or what went wrong; request_rate_achieved: requests finished a second, from the first
            that was sent to the last that was answered.

    Raises:
        ClientError: a value is missing or no number.
    """

    def value(name: str) -> float:
        found = number(result, name)
        if found is None or not math.isfinite(found):
            raise ClientError(
                f"The result of vllm bench serve has {result.get(name)!r} as {name!r}, expected a number. Its"
                " version may have renamed it."
            )
        return found

    completed = int(value("completed"))
    # Older versions count only those that completed.
    failed = max(requests - completed, int(result.get("failed") or 0))
    row: dict[str, Any] = {
        "requests": requests,
        "completed": completed,
        "failed": failed,
        "duration_s": value("duration"),
        "request_rate_achieved": value("request_throughput"),
        "input_tokens": int(value("total_input_tokens")),
        "output_tokens": int(value("total_output_tokens")),
        "output_tokens_per_s": value("output_throughput"),
    }
    # Of no request at all it says 0.
    row |= {
        f"{what}_p{p}_ms": value(f"p{p}_{what}_ms") if completed else None
        for what in ("tpot", "ttft", "itl")
        for p in (50, 99)
    }
    row["peak_requests"] = number(result, "max_concurrent_requests")
    row["status"] = "ok"
    if failed:
        row["status"] = f"{failed} of {requests} requests failed"
    elif row["output_tokens"] != completed * output_len:
        row["status"] = f"{row['output_tokens']} output tokens, expected {completed * output_len}"
    return row


def counts(summary: Mapping[str, Any], output_tokens: int) -> dict[str, Any]:
    """Columns out of what the dejavu server counted: `densities`, steps by kind, and how many tokens a step
    gave.
    """
    steps = summary["steps"]
    total, known = sum(steps.values()), ("sparse", "prefill_or_mixed")
    return {
        **densities(dict(summary)),
        **{f"steps_{reason}": steps[reason] for reason in known},
        "steps_other": total - sum(steps[reason] for reason in known),
        "tokens_per_step": output_tokens / total if total else None,
    }


# --- the runs
# ----------------------------------------------------------------------------------------------------


def serve(
    args: argparse.Namespace,
    shape: Geometry,
    repeat: int,
    side: str,
    prompts: Path | None,
    work: Path,
    table: Table,
) -> None:
    """All rates of one server; a row each.

    Raises:
        ClientError: requests failed, and --allow-failures was not given. ServerError: the server did not
        start or died.
    """
    logs = args.output / "logs"
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
            if side == "dejavu":
                server.post("/collective_rpc", {"method": "dejavu_reset_metrics"})
            result, log = work / "result.json", logs / f"serve-{side}-{repeat}-rate{rate:g}.log"
            others = Neighbours(server)
            found = run_client(
                client_options(args, rate, args.seed + repeat, server.host, server.port, prompts, result),
                result,
                log,
                args.timeout_s + args.requests / rate,
            )
            row = parse_result(found, args.requests, args.output_len)
            row["others_cores"] = others.cores()
            if side == "dejavu":
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
        for repeat, side in schedule(SIDES, args.repeats):
            if repeat not in prompts:
                prompts[repeat] = None if args.text is None else write_prompts(args, repeat, Path(work))
            serve(args, shape, repeat, side, prompts[repeat], Path(work), table)
    return table.rows


# --- what is shown
# ----------------------------------------------------------------------------------------------------


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a rate, both sides beside each other.

    Args:
        rows: of serve.csv, values as numbers or as text; those without status ok are left out, but for their
            failed requests.

    Returns:
        Columns: dense_*, dejavu_*: medians over repeats; *_ratio, with _min and _max over repeats: dense /
        dejavu of times, dejavu / dense of output_tokens_per_s. None where no repeat has both sides.
    """
    out = []
    for rate in sorted({float(row["request_rate"]) for row in rows}):
        every = [row for row in rows if float(row["request_rate"]) == rate]
        at = [row for row in every if row["status"] == "ok"]
        sides = {side: {int(row["repeat"]): row for row in at if row["side"] == side} for side in SIDES}
        dense, ours = sides["dense"], sides["dejavu"]
        pairs = [(dense[repeat], ours[repeat]) for repeat in sorted(dense.keys() & ours.keys())]

        def middle(side: str, what: str) -> float | None:
            values = [v for row in sides[side].values() if (v := number(row, what)) is not None]  # noqa: B023
            return median(values) if values else None

        result: dict[str, Any] = {"request_rate": rate, "repeats": len(pairs)}
        for what in (*TIMES, "output_tokens_per_s", "request_rate_achieved"):
            result |= {f"{side}_{what}": middle(side, what) for side in SIDES}
        for what in (*TIMES, "output_tokens_per_s"):
            above, below = (1, 0) if what == "output_tokens_per_s" else (0, 1)
            values = [
                a / b
                for pair in pairs
                if (a := number(pair[above], what)) is not None and (b := number(pair[below], what))
            ]
            name = what.removesuffix("_ms")
            result |= {
                f"{name}_ratio": median(values) if values else None,
                f"{name}_ratio_min": min(values, default=None),
                f"{name}_ratio_max": max(values, default=None),
            }
        for what in (
            "sparse_step_share",
            "mlp_density",
            "mlp_union_density",
            "head_density",
            "head_union_density",
            "survivors",
            "tokens_per_step",
        ):
            result[what] = middle("dejavu", what)
        result |= {
            f"{side}_failed": sum(int(row["failed"]) for row in every if row["side"] == side)
            for side in SIDES
        }
        result["others_cores"] = max(
            (v for row in at if (v := number(row, "others_cores")) is not None), default=None
        )
        kept = (
            "requests",
            "input_len",
            "output_len",
            "temperature",
            "dtype",
            "prompts",
            "seed",
            "max_num_seqs",
            "server_options",
            "weights",
            "synthetic",
            "dry_run",
        )
        result |= {
            "benchmark": "serve ratio",
            "model": every[0].get("model"),
            **{k: every[0].get(k) for k in kept},
        }
        result |= {
            k: ", ".join(dict.fromkeys(str(row[k]) for row in every if row.get(k))) for k in PROVENANCE
        }
        out.append(result)
    return out


def cell(row: Mapping[str, Any], key: str, form: str) -> str:
    value = number(row, key)
    return "-" if value is None else format(value, form)


def ranged(row: Mapping[str, Any], name: str) -> str:
    if number(row, name) is None:
        return "-"
    return (
        f"**{cell(row, name, '.2f')}x** ({cell(row, f'{name}_min', '.2f')}-{cell(row, f'{name}_max', '.2f')})"
    )


COLUMNS = (
    (
        "requests/s",
        lambda r: "all at once" if math.isinf(float(r["request_rate"])) else f"{float(r['request_rate']):g}",
    ),
    ("achieved, dense", lambda r: cell(r, "dense_request_rate_achieved", ".2f")),
    ("dejavu", lambda r: cell(r, "dejavu_request_rate_achieved", ".2f")),
    ("TPOT p50 ms, dense", lambda r: cell(r, "dense_tpot_p50_ms", ".1f")),
    ("dejavu", lambda r: cell(r, "dejavu_tpot_p50_ms", ".1f")),
    ("dense / dejavu (range)", lambda r: ranged(r, "tpot_p50_ratio")),
    ("p99", lambda r: ranged(r, "tpot_p99_ratio")),
    ("TTFT p50 ms, dense", lambda r: cell(r, "dense_ttft_p50_ms", ".0f")),
    ("dejavu", lambda r: cell(r, "dejavu_ttft_p50_ms", ".0f")),
    ("dense / dejavu (range)", lambda r: ranged(r, "ttft_p50_ratio")),
    ("p99", lambda r: ranged(r, "ttft_p99_ratio")),
    ("tokens/s, dense", lambda r: cell(r, "dense_output_tokens_per_s", ".1f")),
    ("dejavu", lambda r: cell(r, "dejavu_output_tokens_per_s", ".1f")),
    ("dejavu / dense (range)", lambda r: ranged(r, "output_tokens_per_s_ratio")),
    ("sparse steps", lambda r: cell(r, "sparse_step_share", ".0%")),
    (
        "MLP density (union)",
        lambda r: f"{cell(r, 'mlp_density', '.2f')} ({cell(r, 'mlp_union_density', '.2f')})",
    ),
    (
        "head density (union)",
        lambda r: f"{cell(r, 'head_density', '.2f')} ({cell(r, 'head_union_density', '.2f')})",
    ),
    ("failed", lambda r: str(int(number(r, "dense_failed") or 0) + int(number(r, "dejavu_failed") or 0))),
)


def alone(rows: Sequence[Mapping[str, Any]]) -> str:
    """A warning where others were busy on the CPU that was measured."""
    busy = max((number(row, "others_cores") or 0.0 for row in rows), default=0.0)
    return (
        f"; NOT ALONE: other processes kept up to {busy:.2f} cores busy"
        if busy > BUSY_CORES and any(str(r["device"]).startswith("CPU") for r in rows)
        else ""
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of `ratios`, with a line of what was served."""
    first = rows[0]
    about = (
        f"{first['model']}, {first['dtype']}; {first['requests']} requests of {first['input_len']} +"
        f" {first['output_len']} tokens, {first['prompts']}; {first['device']};"
        f" {max(int(r['repeats']) for r in rows)} repeats"
    )
    about += alone(rows)
    if str(first["dry_run"]) == "True":
        about += "; DRY RUN, no measurement"
    lines = [
        [name for name, _ in COLUMNS],
        ["---"] * len(COLUMNS),
        *([form(row) for _, form in COLUMNS] for row in rows),
    ]
    return "\n".join([about, "", *("| " + " | ".join(cells) + " |" for cells in lines)])


def plot(directory: Path, pyplot: Any) -> None:
    """TPOT and TTFT by request rate, bars from the fastest to the slowest repeat; share of sparse steps and
    densities.
    """
    rows = [row for row in read_rows("serve.csv", directory) if row["status"] == "ok"]
    if not rows:
        return
    rates = sorted({float(row["request_rate"]) for row in rows})
    groups = defaultdict(list)
    for row in rows:
        groups[row["side"], rates.index(float(row["request_rate"]))].append(row)
    figure, axes = pyplot.subplots(1, 3, figsize=(13.5, 4), layout="constrained")

    def curve(axis: Any, side: str, what: str, label: str, **style: Any) -> None:
        points = []
        for place in range(len(rates)):
            values = [v for row in groups.get((side, place), ()) if (v := number(row, what)) is not None]
            if values:
                points.append((place, median(values), min(values), max(values)))
        if points:
            places, middle, low, high = zip(*points, strict=True)
            spread = [
                [m - v for m, v in zip(middle, low, strict=True)],
                [v - m for m, v in zip(middle, high, strict=True)],
            ]
            axis.errorbar(places, middle, yerr=spread, marker="o", capsize=3, label=label, **style)

    for axis, what, name in zip(
        axes,
        ("tpot_p50_ms", "ttft_p50_ms"),
        ("time per output token, p50, ms", "time to first token, p50, ms"),
        strict=False,
    ):
        for side in SIDES:
            curve(axis, side, what, side)
        axis.set(title=name)
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")  # at saturation requests queue
    for each in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
        each("{x:g}")
    curve(axes[2], "dejavu", "sparse_step_share", "sparse steps", color="black")
    for what, label in (
        ("mlp_density", "neurons per token"),
        ("mlp_union_density", "neurons per step"),
        ("head_density", "heads per token"),
        ("head_union_density", "heads per step"),
    ):
        curve(axes[2], "dejavu", what, label, linestyle=":")
    axes[2].set(title="shares: sparse steps, densities in them", ylim=(0, 1.05))
    for axis in axes:
        axis.set_xticks(
            range(len(rates)), ["all at once" if math.isinf(rate) else f"{rate:g}" for rate in rates]
        )
        axis.set_xlabel("requests a second")
        axis.legend(fontsize=7)
    first, dry = rows[0], "DRY RUN, NO MEASUREMENT; " if any(r["dry_run"] == "True" for r in rows) else ""
    where = (
        ", ".join(sorted({r["device"] for r in rows}))
        + "; commit "
        + ", ".join(sorted({r["commit"] for r in rows}))
    )
    figure.suptitle(
        f"{dry}Serving {first['model']}, {first['dtype']}, {first['input_len']} + {first['output_len']}"
        f" tokens\nprompts: {first['prompts']}\n{where}{alone(rows)}",
        fontsize=9,
    )
    figure.savefig(directory / "serve.png", dpi=130)
    print(directory / "serve.png")


def report(directory: Path) -> None:
    """serve-ratios.csv, the Markdown table and the picture of a folder's serve.csv."""
    rows = read_rows("serve.csv", directory)
    if not rows:
        print(f"bench_serve: {directory}/serve.csv has no rows")
        return
    table = ratios(rows)
    write_rows(directory / "serve-ratios.csv", table)
    print("\n" + markdown(table))
    if (plt := pyplot()) is not None:
        plot(directory, plt)


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
