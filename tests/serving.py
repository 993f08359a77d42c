"""The server that the server tests share, and how they ask it: a real process with its front end, engine and
worker.

Nothing here waits for a time: whatever must overlap is held open until it was seen to (`Held`), and `WAIT_S`
only turns a hang into a failure.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tiny import make_artifact, make_opt

from vllm_dejavu.metrics import summarize

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
from server import API_SERVER, Server  # noqa: E402

WAIT_S = 300  # only ever waited for in full when something is broken: the machine may be busy
MAX_SEQS = 16
POSITIONS = 1 << 16  # so many that a request of ENDLESS tokens does not end before it is aborted
ENDLESS = POSITIONS - 1024
PROMPT = [2, 17, 101, 5, 77, 30]

# A served model's name is always "tiny".
COMMON = (
    *("--model-impl", "dejavu", "--enforce-eager", "--dtype", "float32"),
    *("--max-num-seqs", str(MAX_SEQS), "--block-size", "32", "--gpu-memory-utilization", "0.3"),
    *("--served-model-name", "tiny"),
)
TINY = (*COMMON, "--skip-tokenizer-init")
ROOMY = ("--max-model-len", str(POSITIONS), "--kv-cache-memory-bytes", "512M")
LOGGING = {"VLLM_LOG_STATS_INTERVAL": "1"}  # /metrics follow the workers' counts when vLLM logs


def dejavu(predictor: Path, **changes: Any) -> tuple[str, str]:
    """The plugin's settings. With `row_exact` neighbours in a decode step do not change a request's
    tokens.
    """
    settings = {"predictor": str(predictor), "row_exact": True, **changes}
    return "--additional-config", json.dumps({"dejavu": settings})


def start(server: Server) -> Server:
    server.start()
    server.wait_until_healthy(2 * WAIT_S)
    return server


def vllm_command() -> tuple[str, ...] | None:
    """`vllm serve` of this environment; None where no distribution is called vllm, without which it does not
    run.
    """
    command = Path(sys.executable).with_name("vllm")
    try:
        return (str(command), "serve") if metadata.version("vllm") and command.exists() else None
    except metadata.PackageNotFoundError:
        return None


class Served:
    """One server of a tiny model for all files that need one; a new one takes the place of one that a test
    broke.

    Started by `vllm serve`, as users do, where that runs.

    Attributes:
        model: the checkpoint, random, with a real tokenizer. place: where the served artifact lies; tests may
            replace it.
    """

    def __init__(self, directory: Path):
        self.directory, self.place = directory, directory / "artifact"
        # Untied: with tied embeddings a random model repeats one token, and tokens then say little.
        self.model = make_opt(directory / "model", vocab=8192, positions=POSITIONS, tied=False)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "examples" / "opt-books-7m" / name, self.model / name)
        self._server: Server | None = None
        self._started = 0

    def running(self) -> Server:
        if self._server is None or self._server.process.poll() is not None:
            self.stop()
            self.make_artifact(seed=0)
            self._started += 1
            log, command = self.directory / f"server-{self._started}.log", vllm_command() or API_SERVER
            options = (*TINY, *ROOMY, *dejavu(self.place))
            self._server = Server(self.model, *options, log=log, command=command, env=LOGGING)
            start(self._server)
        return self._server

    def make_artifact(self, seed: int) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        make_artifact(self.place, self.model, density=0.5, seed=seed)

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def request(prompt: list[int] = PROMPT, max_tokens: int = 24) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def complete(server: Server, **kwargs: Any) -> list[int]:
    """The tokens of one request, asked alone unless others are held."""
    choice = server.post("/v1/completions", request(**kwargs))["choices"][0]
    assert choice["finish_reason"] == "length"
    return choice["token_ids"]


@contextlib.contextmanager
def held(server: Server, prompts: list[list[int]]) -> Iterator[list[Iterator[dict[str, Any]]]]:
    """Requests that run, all of them, from the first line of the body to its last.

    Each is a stream without an end in sight that has given a token. Leaving the body aborts them, and waits
    until the server noticed.
    """
    streams = [server.stream("/v1/completions", request(prompt, ENDLESS)) for prompt in prompts]
    try:
        for stream in streams:
            next(stream)
        yield streams
    finally:
        for stream in streams:
            stream.close()
    assert_idle(server)


def counted(server: Server) -> dict[str, Any]:
    return summarize(server.metrics())


def gauge(server: Server, name: str) -> float:
    """The sum of one of vLLM's Prometheus metrics, as of the last step: ask by `wait_until`."""
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", server.get("/metrics"), re.M)
    return sum(map(float, values))


def assert_idle(server: Server) -> None:
    """No request is left behind, in the engine or in the cache."""
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    left = {}

    def idle() -> bool:
        left.update({name: gauge(server, name) for name in gauges})
        return not any(left.values())

    assert wait_until(idle), left


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met
