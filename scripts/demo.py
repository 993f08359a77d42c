"""The demonstration: a real vLLM server with predictor-gated sparse OPT, beside dense vLLM; `make demo` runs
this.

Starts the server with `--model-impl dejavu`, streams completions from it, reads what its sparse path really
did, asks dense vLLM the same, and compares. Fails unless steps ran sparse, something was skipped, and the
predictors belong to these weights. Stops its servers always: on success, failure, Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server import SMALL, Server, ServerError

from vllm_dejavu.metrics import summarize

MODEL = Path(__file__).resolve().parent.parent / "examples" / "opt-books-7m"
PROMPTS = (
    "It was late in the evening when the old gentleman",
    "The ship had been three weeks at sea, and",
    "My dear sister, I have received your letter and",
)
MAX_TOKENS = 48
WIDTH = min(shutil.get_terminal_size((110, 24)).columns, 130)


class DemoError(Exception):
    """What the demonstration promises did not happen."""


@dataclass
class Completion:
    text: str
    token_ids: list[int]


class Progress:
    """Shows that a wait goes on: one line that is rewritten on a terminal, a line every 10 seconds
    elsewhere.
    """

    # The lines of vLLM's log that tell a newcomer how far it is.
    MILESTONE = re.compile(
        r"\] (Initializing a V1 LLM engine \S+|(?:Resolved architecture|Starting to load model|dejavu:"
        r" |Loading weights|init engine|Starting vLLM).*)"
    )

    def __init__(self, server: Server):
        self.server, self.tty, self.next_s = server, sys.stdout.isatty(), 0.0

    def __call__(self, elapsed_s: float) -> None:
        if not self.tty and elapsed_s < self.next_s:
            return
        self.next_s = elapsed_s + 10
        line = f"  {elapsed_s:3.0f} s  {self.last_message()}"[: WIDTH - 1]
        print(f"\r{line:<{WIDTH - 1}}" if self.tty else line, end="" if self.tty else "\n", flush=True)

    def last_message(self) -> str:
        found = (self.MILESTONE.search(line) for line in reversed(self.server.log_lines()))
        return next((m[1] for m in found if m), "Python starts")

    def done(self, seconds: float) -> None:
        line = f"  ready after {seconds:.0f} s, at http://{self.server.host}:{self.server.port}"
        print(f"\r{line:<{WIDTH - 1}}" if self.tty else line, flush=True)


def start(server: Server) -> None:
    """Start a server and wait until it answers."""
    server.start()
    print("  " + shlex.join(["python", *server.command[1:]]))
    progress = Progress(server)
    progress.done(server.wait_until_healthy(progress=progress))


def request(prompt: str | list[str]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def stream(server: Server, prompt: str, model: str) -> Completion:
    """One greedy completion, printed as it arrives."""
    print(f"\n  {prompt}", end="", flush=True)
    text, token_ids, column = "", [], 2 + len(prompt)
    for event in server.stream("/v1/completions", {"model": model, **request(prompt)}):
        for choice in event["choices"]:
            piece = choice["text"]
            text += piece
            token_ids += choice.get("token_ids") or []
            shown = piece.replace("\n", " ")
            if column + len(shown) > WIDTH and shown.startswith(" "):
                print("\n ", end="")
                column = 2
            print(shown, end="", flush=True)
            column += len(shown)
    print(flush=True)
    return Completion(text, token_ids)


def run_sparse(server: Server, model: str) -> tuple[list[Completion], dict[str, Any], dict[str, Any]]:
    """Completions one after another, and what the model counted: one request at a time, then all at once."""
    start(server)
    check_plugin(server)
    print("\nCompletions as the sparse server streams them:")
    server.post("/collective_rpc", {"method": "dejavu_reset_metrics"})
    completions = [stream(server, prompt, model) for prompt in PROMPTS]
    single = summarize(server.metrics())
    server.post("/collective_rpc", {"method": "dejavu_reset_metrics"})
    server.post("/v1/completions", {"model": model, **request(list(PROMPTS))})
    return completions, single, summarize(server.metrics())


def run_dense(server: Server, model: str) -> list[Completion]:
    start(server)
    choices = [
        server.post("/v1/completions", {"model": model, **request(prompt)})["choices"][0]
        for prompt in PROMPTS
    ]
    return [Completion(choice["text"], choice["token_ids"]) for choice in choices]


def check_plugin(server: Server) -> None:
    """vLLM takes any value of --model-impl in silence; make sure that it was ours which answered."""
    if not any("Resolved architecture: DejaVuOPTForCausalLM" in line for line in server.log_lines()):
        raise DemoError(
            "vLLM serves its own OPT: it did not load the plugin. `.venv/bin/vllm-dejavu doctor` says why."
        )


def check(single: dict[str, Any]) -> None:
    """What the demonstration promises.

    Raises:
        DemoError: a step ran dense that should not, nothing was skipped, or the predictors are for other
        weights.
    """
    if not single["steps"]["sparse"]:
        raise DemoError(f"No step ran sparse: {single['steps']}.")
    gated = [block["density"] for layer in single["layers"] for block in layer.values() if block["gated"]]
    if not any(density is not None and density < 1 for density in gated):
        raise DemoError(
            f"Nothing was skipped: the realised density is 1 in all of {len(gated)} gated blocks."
        )
    if not single["artifact"]["fingerprint_verified"]:
        raise DemoError(f"The predictors are not verified to belong to these weights: {single['artifact']}.")


def leading_agreement(a: list[int], b: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def print_texts(sparse: list[Completion], dense: list[Completion]) -> None:
    half = (WIDTH - 7) // 2
    print(f"\n  {'sparse (--model-impl dejavu)':<{half}} | dense vLLM")
    for prompt, left, right in zip(PROMPTS, sparse, dense, strict=True):
        print(f"  {'-' * half}-+-{'-' * half}")
        columns = [textwrap.wrap(" ".join((prompt + c.text).split()), half) for c in (left, right)]
        for i in range(max(map(len, columns))):
            a, b = (column[i] if i < len(column) else "" for column in columns)
            print(f"  {a:<{half}} | {b}".rstrip())
        agree = leading_agreement(left.token_ids, right.token_ids)
        print(f"  leading tokens that agree: {agree}/{len(left.token_ids)}")


def print_densities(single: dict[str, Any], batch: dict[str, Any]) -> None:
    """Realised densities, counted while serving: what a token selected, and what a step of several requests
    read.
    """

    def cell(block: dict[str, Any], key: str) -> str:
        return "dense" if not block["gated"] else number(block[key])

    def number(value: float | None) -> str:  # None: the gate took part in no step
        return "-" if value is None else f"{value:.3f}"

    def mean_read(block: str) -> float | None:
        values = [layer[block]["read_density"] for layer in batch["layers"]]
        return None if None in values else sum(values) / len(values)

    together = f"read, batch {len(PROMPTS)}"
    print(f"\n  Realised density (1 = all is read)\n  {'':5} | {'MLP neurons':^25} | {'attention heads':>20}")
    print(f"  layer | {'per token':>10} {together:>14} | {'per token':>10} {together:>14}")
    for i, (one, three) in enumerate(zip(single["layers"], batch["layers"], strict=True)):
        cells = [(cell(one[b], "density"), cell(three[b], "read_density")) for b in ("mlp", "attention")]
        print(f"  {i:5} | " + " | ".join(f"{a:>10} {b:>14}" for a, b in cells))
    means = [
        (number(single[key]), number(mean_read(block)))
        for key, block in (("mlp_density", "mlp"), ("head_density", "attention"))
    ]
    print("  mean  | " + " | ".join(f"{a:>10} {b:>14}" for a, b in means))


def print_steps(single: dict[str, Any]) -> None:
    steps, artifact = single["steps"], single["artifact"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in steps.items() if count)
    print(
        f"\n  sparse steps: {steps['sparse']} of {sum(steps.values())} ({single['sparse_step_share']:.0%});"
        f" by kind: {reasons}"
    )
    state = "matches the weights served" if artifact["fingerprint_verified"] else "NOT VERIFIED"
    print(
        f"  predictor artifact {artifact['path']}\n  fingerprint {artifact['fingerprint'][:23]}...: {state}"
    )


def run(model: Path, predictor: Path | None, logs: Path) -> None:
    settings = (
        ()
        if predictor is None
        else ("--additional-config", json.dumps({"dejavu": {"predictor": str(predictor)}}))
    )
    name = str(model)
    print(f"\n1. vLLM with --model-impl dejavu on {model.name}")
    with Server(model, "--model-impl", "dejavu", *settings, *SMALL, log=logs / "sparse.log") as server:
        sparse, single, batch = run_sparse(server, name)
    print("\n2. Dense vLLM, the same prompts")
    with Server(model, *SMALL, log=logs / "dense.log") as server:
        dense = run_dense(server, name)
    print("\n3. Side by side")
    print_texts(sparse, dense)
    check(single)
    print_densities(single, batch)
    print_steps(single)


def stop_on_signal(number: int, _frame: object) -> None:
    """Unwind, so that the servers are stopped; what comes after must not interrupt the stopping."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    print(f"\n{signal.Signals(number).name}: stopping the servers ...", flush=True)
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a directory with a served model")
    parser.add_argument("--predictor", type=Path, help="a predictor artifact; default: MODEL/dejavu/")
    args = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, stop_on_signal)
    started = time.monotonic()
    logs = Path(tempfile.mkdtemp(prefix="dejavu-demo-"))
    try:
        run(args.model.absolute(), args.predictor and args.predictor.absolute(), logs)
    except (DemoError, ServerError, OSError) as e:
        sys.exit(f"\nThe demo failed: {e}\nThe servers' logs are in {logs}.")
    except SystemExit:  # a signal
        shutil.rmtree(logs)
        raise
    shutil.rmtree(logs)
    print(f"\nDone in {time.monotonic() - started:.0f} s; both servers are stopped.")


if __name__ == "__main__":
    main()
