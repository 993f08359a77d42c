"""A vLLM server as a child process: start, wait for health, ask over HTTP, and always stop. Used by the demo
and the tests.

Standard library only, so that what is tested is what any HTTP client sees.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

API_SERVER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
# Small and quick to start; several fit beside each other on a small machine.
SMALL = (
    "--enforce-eager",
    "--max-model-len",
    "512",
    "--max-num-seqs",
    "8",
    "--kv-cache-memory-bytes",
    "256M",
    "--gpu-memory-utilization",
    "0.3",
)
ENV = {
    "VLLM_SERVER_DEV_MODE": "1",  # POST /collective_rpc, which is how the metrics of the workers are read
    # Small models on shared cores: with a thread per core, OpenMP's barriers wait for whoever else has the
    # cores (48 tokens of opt-books-7m took 17 s beside two busy processes on 2 cores; 0.5 s so).
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
}
# Set by in-process tests or by users for other servers; here they would change what is started.
UNSET = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "VLLM_PLUGINS", "VLLM_API_KEY")
# A shell that outlives us if we are killed: its standard input ends when we do, and it then ends the server's
# group.
GUARD = 'read _; kill -s TERM -- "-$1"; sleep 5; kill -s KILL -- "-$1"'


class ServerError(RuntimeError):
    """The server did not start, died, or answered with an error; the message holds the end of its log."""


class Server:
    """One OpenAI-compatible vLLM server in a process group of its own.

    Use as a context manager: leaving it stops the whole group, whatever happened inside.

        with Server(model, "--model-impl", "dejavu", log=path) as server:
            server.start()
            server.wait_until_healthy()
            server.post("/v1/completions", {...})
    """

    def __init__(
        self,
        model: Path | str,
        *args: str,
        log: Path,
        command: tuple[str, ...] = API_SERVER,
        env: dict[str, str] | None = None,
    ):
        self.host = "127.0.0.1"
        self.reserved = reserve_port(self.host)
        self.port = self.reserved.getsockname()[1]
        self.command = [*command, str(model), *args, "--host", self.host, "--port", str(self.port)]
        self.log = log
        self.env = {k: v for k, v in os.environ.items() if k not in UNSET} | ENV | (env or {})
        self.process: subprocess.Popen | None = None
        self.guard: subprocess.Popen | None = None
        self.ready = self.stopped = False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # Life and death

    def start(self) -> None:
        assert self.process is None, "a Server is started once"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.guard = subprocess.Popen(
            ["sh", "-c", GUARD, "guard", str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def wait_until_healthy(
        self, timeout_s: float = 240, progress: Callable[[float], None] | None = None
    ) -> float:
        """Wait for GET /health; calls `progress(elapsed_s)` about once a second. Returns the seconds it took.

        Raises:
            ServerError: the process ended, or the time is up; with the end of the log.
        """
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < timeout_s:
            if (code := self.process.poll()) is not None:
                raise ServerError(
                    f"The server ended with exit code {code} before it was ready. The end of"
                    f" {self.log}:\n{self.log_tail()}"
                )
            try:
                if self._request("GET", "/health", timeout_s=5)[0] == 200:
                    self.ready = True
                    return elapsed
            except OSError:
                pass  # not listening yet
            if progress is not None:
                progress(elapsed)
            time.sleep(1)
        raise ServerError(
            f"The server was not ready after {timeout_s:.0f} s. The end of {self.log}:\n{self.log_tail()}"
        )

    def stop(self, grace_s: float = 10) -> None:
        """End the process group: SIGTERM, then SIGKILL to whatever is left. Safe to call again.

        With a client still connected vLLM 0.32 may end its workers at once but then wait for that client for
        ever.

        Raises:
            ServerError: a process of the group is still there.
        """
        self.reserved.close()
        if self.process is None or self.stopped:
            return
        if not self.ready:
            grace_s = min(grace_s, 2)  # until it is ready, vLLM's front end ignores SIGTERM
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 60)):
            deadline = time.monotonic() + wait_s
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            while self.processes() and time.monotonic() < deadline:
                self.process.poll()  # reaps it
                time.sleep(0.1)
        if left := self.processes():
            raise ServerError(f"Processes {left} of the server survived SIGKILL.")
        self.process.wait()
        if self.guard is not None:
            self.guard.kill()
            self.guard.communicate()
        self.stopped = True

    def processes(self) -> list[int]:
        """The living processes of the server's group."""
        return [] if self.process is None else group_members(self.process.pid)

    # Its log

    def log_lines(self) -> list[str]:
        return (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        )

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_lines()[-lines:])

    # HTTP

    def get(self, path: str) -> str:
        status, body = self._request("GET", path)
        return self._checked(path, status, body)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST JSON, return the answer's JSON.

        Raises:
            ServerError: an answer other than 200.
        """
        status, text = self._request("POST", path, body)
        return json.loads(self._checked(path, status, text))

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """POST with "stream": true and yield the events as they come; closing the generator closes the
        connection.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        try:
            connection.request(
                "POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                self._checked(path, response.status, response.read().decode())
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data:
                    event = json.loads(data)
                    if "error" in event:
                        raise ServerError(f"POST {path}: {event['error']}")
                    yield event
        finally:
            connection.close()

    def metrics(self) -> list[dict[str, Any]]:
        """`dejavu_metrics()` of every worker, for `vllm_dejavu.metrics.summarize`."""
        return self.post("/collective_rpc", {"method": "dejavu_metrics"})["results"]

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 120
    ) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"} if payload else {})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _checked(self, path: str, status: int, body: str) -> str:
        if status != 200:
            raise ServerError(f"{path} answered {status}: {body[:2000]}")
        return body


def reserve_port(host: str) -> socket.socket:
    """A socket bound to a free port, which nobody else is given while it is open.

    It never listens, so that on Linux a server that sets SO_REUSEADDR, as vLLM does, can bind the same port
    and listen.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((host, 0))
    return reserved


def group_members(group: int) -> list[int]:
    """Processes of a process group that are not zombies, read from /proc."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "PID (NAME) STATE PPID PGRP ..."; the name may hold spaces and parentheses.
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # ended meanwhile
        if int(pgrp) == group and state not in "ZX":
            members.append(int(stat.parent.name))
    return sorted(members)
