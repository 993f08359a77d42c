"""Many HTTP clients at once, each with a counted end: what the load tests ask a server with.

Standard library only, like scripts/server.py. One thread a client; nothing is retried, so nothing is hidden.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

# Silence of a connection after which a client gives up. It only turns a hang into a failure, so it is long:
# the machine may be busy.
SILENCE_S = 300

# How a request can end.
DONE = "done"  # answered: a stream up to [DONE], or a whole answer
ABORTED = "aborted"  # the client closed the connection, as it was told to
REFUSED = "refused"  # a status other than 200, or no connection
ERROR = "error"  # an error in the middle of a stream
CUT = "cut"  # the connection ended before the answer did
SILENT = "silent"  # nothing came any more
FAILED = (REFUSED, ERROR, CUT)  # ends that tell the client that there is no answer


@dataclass(frozen=True)
class Ask:
    """One greedy completion.

    Attributes:
        abort_after: close the connection after so many tokens; 0: before the answer begins; None: never.
        stream: false asks for one whole answer.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    abort_after: int | None = None
    stream: bool = True

    def body(self, model: str) -> dict[str, Any]:
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": self.stream,
        }


@dataclass
class Outcome:
    """How a request ended, and what came before that. `detail`: the error as the client saw it."""

    ask: Ask
    end: str = SILENT
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    detail: str = ""


def ends(outcomes: Sequence[Outcome]) -> Counter[str]:
    return Counter(outcome.end for outcome in outcomes)


def random_asks(
    count: int,
    seed: int,
    *,
    vocab: int,
    prompt: tuple[int, int],
    tokens: tuple[int, int],
    abort_share: float = 0.25,
) -> list[Ask]:
    """Requests of random lengths; `prompt` and `tokens` are (shortest, longest). The same for the same
    arguments.

    The share that is aborted is met exactly, half-way through its tokens at the latest, and every fifth of it
    before the answer begins.
    """
    rng = random.Random(seed)
    asks = []
    for number in range(count):
        text = (2, *(rng.randrange(3, vocab) for _ in range(rng.randint(*prompt) - 1)))
        wanted = rng.randint(*tokens)
        abort = None
        if number < round(abort_share * count):
            abort = 0 if number % 5 == 4 else rng.randint(1, max(1, wanted // 2))
        asks.append(Ask(text, wanted, abort))
    rng.shuffle(asks)
    return asks


def run(server: Any, model: str, asks: Sequence[Ask]) -> list[Outcome]:
    """Send all at once, one connection each, and wait until every one has ended. In the order of `asks`."""
    barrier = threading.Barrier(len(asks))

    def client(asked: Ask) -> Outcome:
        barrier.wait()
        return ask(server, model, asked)

    with ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(client, asks))


def ask(server: Any, model: str, asked: Ask) -> Outcome:
    """Send one request and follow it to its end. Never raises for what the server does."""
    outcome = Outcome(asked)
    connection = http.client.HTTPConnection(server.host, server.port, timeout=SILENCE_S)
    try:
        try:
            connection.request(
                "POST", "/v1/completions", json.dumps(asked.body(model)), {"Content-Type": "application/json"}
            )
            if asked.abort_after == 0:
                outcome.end = ABORTED
                return outcome
            response = connection.getresponse()
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as e:
            outcome.end, outcome.detail = REFUSED, repr(e)
            return outcome
        if response.status != 200:
            outcome.end, outcome.detail = REFUSED, f"{response.status}: {response.read().decode()}"
        elif asked.stream:
            _follow(response, outcome)
        else:
            _take(json.loads(response.read()), outcome)
            outcome.end = DONE
    except TimeoutError:
        outcome.end = SILENT
    except (OSError, http.client.HTTPException) as e:
        outcome.end, outcome.detail = CUT, repr(e)
    finally:
        _close(connection)
    return outcome


def _follow(response: http.client.HTTPResponse, outcome: Outcome) -> None:
    """Read a stream of server-sent events to its end, or to where it is to be aborted."""
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            if outcome.end != ERROR:  # vLLM sends it after an error too
                outcome.end = DONE
            return
        if not data:
            continue
        event = json.loads(data)
        if "error" in event:
            outcome.end, outcome.detail = ERROR, json.dumps(event["error"])
            continue
        _take(event, outcome)
        if outcome.ask.abort_after is not None and len(outcome.tokens) >= outcome.ask.abort_after:
            outcome.end = ABORTED
            return
    if outcome.end != ERROR:
        outcome.end, outcome.detail = CUT, f"after {len(outcome.tokens)} tokens"


def _take(answer: dict[str, Any], outcome: Outcome) -> None:
    for choice in answer["choices"]:
        outcome.tokens += choice.get("token_ids") or []
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason


def _close(connection: http.client.HTTPConnection) -> None:
    """Close at once: the response holds the socket too, so that closing the connection alone may leave it
    open.
    """
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def send(server: Any, method: str, path: str, payload: bytes | None = None) -> tuple[int, str]:
    """Send bytes as they are, called JSON. Returns (status, body)."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=SILENCE_S)
    try:
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
