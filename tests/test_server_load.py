"""The server under load and when things go wrong: every request is answered or fails with an error, nothing
is lost.

DEJAVU_LOAD_CLIENTS sets the number of concurrent clients (default 64; 200 on demand). DEJAVU_SOAK_S runs the
soak test, which is skipped otherwise, for about that many seconds.

Tests that use one server come in the order of the file: the last of them breaks it, after which a new one is
started for whoever asks. `served.place`, where the artifact lies, goes through all of it: served, deleted,
replaced by another.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from load_client import (
    ABORTED,
    DONE,
    ERROR,
    FAILED,
    REFUSED,
    Ask,
    Outcome,
    ask,
    ends,
    random_asks,
    run,
    send,
)
from serving import (
    COMMON,
    MAX_SEQS,
    PROMPT,
    ROOMY,
    SCRIPTS,
    TINY,
    WAIT_S,
    assert_idle,
    complete,
    counted,
    dejavu,
    gauge,
    held,
    start,
    wait_until,
)
from tiny import VOCAB, make_artifact

from vllm_dejavu import artifact

sys.path.insert(0, str(SCRIPTS))
from malformed_requests import GREEDY, MALFORMED, QUESTION
from server import Server  # noqa: E402

CLIENTS = int(os.environ.get("DEJAVU_LOAD_CLIENTS", "64"))
SOAK_S = float(os.environ.get("DEJAVU_SOAK_S", "0"))
SOAK_GROWTH_MB = 64  # of all processes together, after warm-up

# One request of 512 tokens needs 16 blocks of 32, and 16 requests of 220 need 112.
CRAMPED = ("--max-model-len", "512", "--kv-cache-memory-bytes", "256M", "--num-gpu-blocks-override", "24")
BURSTS = 20  # at most, until requests were preempted


@pytest.fixture(scope="module")
def first_digest(served):
    """Of the artifact that lies there before any test replaces it."""
    served.running()
    return artifact.load(served.place).digest


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt"
        " %}assistant:{% endif %}"
    )
    return path


@pytest.fixture(scope="module")
def restarted(tmp_path_factory, served, template):
    """The same place with another artifact, served by a new process, with prompts sparse too, KV blocks for
    three requests, and the tokenizer."""
    served.stop()
    served.make_artifact(seed=1)
    log = tmp_path_factory.mktemp("log") / "restarted.log"
    options = (*COMMON, *CRAMPED, *dejavu(served.place, apply_to="all"), "--chat-template", str(template))
    with Server(served.model, *options, log=log) as server:
        yield start(server)


def load(server: Server, clients: int, seed: int) -> list:
    """A burst of random requests, a quarter of them aborted. Asserts that each ended as it should.

    Returns:
        The outcomes of those that were not aborted.
    """
    before = counted(server)["steps"]
    asks = random_asks(clients, seed, vocab=VOCAB, prompt=(1, 48), tokens=(8, 48))
    succeeded = gauge(server, "vllm:request_success_total")
    outcomes = run(server, "tiny", asks)
    aborted = sum(a.abort_after is not None for a in asks)
    assert 0 < aborted < clients
    assert ends(outcomes) == {DONE: clients - aborted, ABORTED: aborted}, [
        o for o in outcomes if o.end not in (DONE, ABORTED)
    ]
    whole = [o for o in outcomes if o.end == DONE]
    assert all(
        o.ask.abort_after is None and len(o.tokens) == o.ask.max_tokens and o.finish_reason == "length"
        for o in whole
    )
    assert all(len(o.tokens) >= o.ask.abort_after for o in outcomes if o.end == ABORTED)
    # Not more than were sent; an aborted one may run to its end before vLLM notices that its client has left.
    assert wait_until(lambda: gauge(server, "vllm:request_success_total") - succeeded >= len(whole))
    assert gauge(server, "vllm:request_success_total") - succeeded <= clients
    assert counted(server)["steps"]["sparse"] > before["sparse"]
    return whole


def test_load_with_aborts(server):
    """Every stream that is not aborted ends with its number of tokens and [DONE].

    Only counted: in a step that takes in a prompt every request runs dense, so with `apply_to` at its default
    the tokens depend on who arrives when. `test_load_gives_what_each_request_gives_alone` compares them.
    """
    expected = complete(server)
    with held(server, [PROMPT, PROMPT[:3]]):
        first = counted(server)["layers"][0]["mlp"]
        whole = load(server, CLIENTS, seed=1)
        last = counted(server)["layers"][0]["mlp"]
    # The two that are held are in every step; whoever of the others came last made sparse steps beside them.
    assert last["rows"] - first["rows"] > 2 * (last["steps"] - first["steps"]) > 0
    assert 0 < last["density"] < 1
    assert complete(server) == expected
    assert len({tuple(o.tokens) for o in whole}) > len(whole) // 2, (
        "as good as every request asks for something else"
    )


def test_a_deleted_artifact_is_not_missed(server, served, first_digest):
    """The tensors are in memory."""
    expected = complete(server)
    shutil.rmtree(served.place)
    steps = counted(server)["steps"]["sparse"]
    assert complete(server) == expected
    assert ask(server, "tiny", Ask(tuple(PROMPT), 24)).tokens == expected
    after = counted(server)
    assert after["steps"]["sparse"] - steps == 2 * 23
    assert after["artifact"]["digest"] == first_digest and after["artifact"]["fingerprint_verified"]


def names(server: Server) -> dict[int, str]:
    """Process id -> what vLLM calls each process of the server."""
    return {
        pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        for pid in server.processes()
    }


def kill_process(server: Server, name: str) -> None:
    """SIGKILL the one process of the server whose name begins so."""
    victim = [pid for pid, title in names(server).items() if title.startswith(name)]
    assert len(victim) == 1, names(server)
    os.kill(victim[0], signal.SIGKILL)


def break_amid_requests(server: Server, breaks: Callable[[], None], asks: list[Ask]) -> None:
    """Call `breaks` while requests run and wait. Whoever has an answer asks again, until there is none.

    So at any time each client has a request, however fast they are answered. Each must end with an error,
    unless it was answered in full before; then the server must end too.
    """
    given_up = threading.Event()

    def client(asked: Ask) -> list[Outcome]:
        outcomes = [ask(server, "tiny", asked)]
        while outcomes[-1].end == DONE and not given_up.is_set():
            outcomes.append(ask(server, "tiny", asked))
        return outcomes

    def running_and_waiting() -> bool:
        return (
            gauge(server, "vllm:num_requests_running") > 1 and gauge(server, "vllm:num_requests_waiting") > 0
        )

    with ThreadPoolExecutor(len(asks)) as pool:
        futures = [pool.submit(client, a) for a in asks]
        try:
            assert wait_until(running_and_waiting)
            breaks()
            outcomes = [future.result(WAIT_S) for future in futures]
        finally:
            given_up.set()
    answered, last = [o for some in outcomes for o in some[:-1]], [some[-1] for some in outcomes]
    assert all(o.end in FAILED for o in last), last
    assert all(len(o.tokens) == o.ask.max_tokens for o in answered)
    # the rest found the connection closed
    told = [o.detail for o in last if o.end == ERROR or o.detail.startswith("500")]
    assert told and all("EngineCore" in detail for detail in told), told[:3]
    assert wait_until(lambda: not healthy(server))
    assert ask(server, "tiny", Ask((2, 5), 4)).end == REFUSED, "who comes later is told at once"
    assert wait_until(lambda: server.process.poll() is not None), "the server outlived its engine"
    assert any(
        re.search(r"ERROR.*(died unexpectedly|EngineDeadError|Engine core proc|WorkerProc)", line)
        for line in server.log_lines()
    )
    server.stop()
    assert server.processes() == []


def healthy(server: Server) -> bool:
    try:
        return send(server, "GET", "/health")[0] == 200
    except OSError:
        return False


def test_a_killed_worker_fails_every_request(server):
    """Breaks the server, so it is the last test that uses it."""
    asks = [Ask((2, *range(10, 20 + i)), 500, stream=i % 4 > 0) for i in range(MAX_SEQS + 4)]
    break_amid_requests(server, lambda: kill_process(server, "VLLM::Worker"), asks)


def test_a_restart_serves_the_artifact_that_lies_there_then(first_digest, restarted, served):
    found = counted(restarted)["artifact"]
    assert found["path"] == str(served.place) and found["fingerprint_verified"]
    assert found["digest"] == artifact.load(served.place).digest != first_digest


def until_preempted(server: Server) -> Iterator[int]:
    """Numbers of bursts, 0 on, until the server has preempted a request; whether it must in one depends on
    how fast it is.
    """
    before = gauge(server, "vllm:num_preemptions_total")
    for number in range(BURSTS):
        yield number
        if gauge(server, "vllm:num_preemptions_total") > before:
            return
    raise AssertionError(f"no request was preempted in {BURSTS} bursts")


def test_load_gives_what_each_request_gives_alone(restarted):
    """With `row_exact` and `apply_to="all"` each token has its own selection, whoever else is in the step and
    wherever prompts end; being preempted and computed again changes nothing either.

    One of the requests may differ: sums are ordered by the size of the batch, and a score within rounding
    (1e-7) of its threshold, or two equally likely tokens, then fall the other way.
    """
    different, compared = [], 0
    for number in until_preempted(restarted):
        whole = load(restarted, CLIENTS, seed=2 + number)
        assert_idle(restarted)
        for o in whole:
            alone = complete(restarted, prompt=list(o.ask.prompt), max_tokens=o.ask.max_tokens)
            different += [(o.ask, o.tokens, alone)] if o.tokens != alone else []
        compared += len(whole)
        assert len(different) <= 1, f"{len(different)} of {compared}: {different[:2]}"
    assert counted(restarted)["steps"]["prefill_or_mixed"] == 0


def test_preempted_requests_complete(restarted):
    """24 KV blocks, and 16 requests that grow to 7 or 8 blocks each: most are thrown out half-way, and
    computed again.
    """
    for _ in until_preempted(restarted):
        outcomes = run(
            restarted, "tiny", [Ask((2, *range(10, 20 + i)), 200, stream=i % 2 == 0) for i in range(MAX_SEQS)]
        )
        assert ends(outcomes) == {DONE: MAX_SEQS}, outcomes
        assert all(len(o.tokens) == 200 and o.finish_reason == "length" for o in outcomes)
        assert_idle(restarted)
    complete(restarted)


@pytest.mark.on_demand
def test_a_killed_engine_fails_every_request(tmp_path, served):
    predictor = make_artifact(tmp_path / "artifact", served.model, density=0.5)
    asks = [Ask((2, *range(10, 20 + i)), 480, stream=i % 4 > 0) for i in range(MAX_SEQS)]
    with Server(served.model, *TINY, *CRAMPED, *dejavu(predictor), log=tmp_path / "server.log") as server:
        start(server)
        break_amid_requests(server, lambda: kill_process(server, "VLLM::EngineCore"), asks)


@pytest.mark.on_demand
def test_data_parallel_engines_answer_and_count(tmp_path, served):
    """Two engines of their own behind one front end; each has its counts in /metrics. The dense switch
    reaches both.
    """
    predictor = make_artifact(tmp_path / "artifact", served.model, density=0.5)
    options = (*TINY, *ROOMY, *dejavu(predictor), "--data-parallel-size", "2")
    with Server(served.model, *options, log=tmp_path / "server.log") as server:
        start(server)
        outcomes = run(
            server, "tiny", [Ask((2, *range(10, 20 + i)), 24, stream=i % 2 == 0) for i in range(12)]
        )
        assert ends(outcomes) == {DONE: 12}

        def of_engines(metric: str) -> list[float]:
            lines = [line for line in server.get("/metrics").splitlines() if line.startswith(metric + "{")]
            return [
                sum(float(line.split()[-1]) for line in lines if f'engine="{i}"' in line) for i in range(2)
            ]

        answered = of_engines("vllm:request_success_total")
        assert sum(answered) == 12 and all(answered), answered
        # Each request has a prompt step, its own or shared, and 23 steps that add one token.
        assert wait_until(lambda: all(count >= 24 for count in of_engines("vllm:dejavu_steps_total"))), (
            of_engines("vllm:dejavu_steps_total")
        )
        server.post("/collective_rpc", {"method": "dejavu_set_dense", "args": [True]})
        assert wait_until(lambda: of_engines("vllm:dejavu_dense_switch") == [1, 1])


@contextlib.contextmanager
def ray_nodes(count: int) -> Iterator[Any]:
    """A Ray cluster of so many nodes on this host, each with its own raylet and room for one worker; yields
    it.
    """
    from ray.cluster_utils import Cluster

    # Sockets lie in it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        room = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 * 2**20}
        cluster = Cluster(
            initialize_head=True, head_node_args={**room, "temp_dir": directory, "include_dashboard": False}
        )
        try:
            for _ in range(count - 1):
                cluster.add_node(**room)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            cluster.shutdown()


@pytest.mark.on_demand
def test_a_lost_ray_node_fails_every_request(tmp_path, served, monkeypatch):
    """Tensor parallel over two nodes, of which one dies without a word."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'vllm-dejavu[ray]'")
    tests = Path(__file__).parent
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tests / "ray_cpu"), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    # For the raylets, whose workers inherit it, and for the server.
    for name, value in {
        "DEJAVU_TEST_RAY_CPU": "1",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }.items():
        monkeypatch.setenv(name, value)
    parallel = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "ray")
    predictor = make_artifact(tmp_path / "artifact", served.model, density=0.5)
    with ray_nodes(2) as cluster:
        env = {"RAY_ADDRESS": cluster.address}
        options = (*TINY, *ROOMY, *dejavu(predictor), *parallel)
        with Server(served.model, *options, log=tmp_path / "server.log", env=env) as server:
            start(server)
            assert len(server.metrics()) == 2
            complete(server)
            asks = [Ask((2, *range(10, 20 + i)), 500, stream=i % 4 > 0) for i in range(MAX_SEQS + 4)]
            lost = next(iter(cluster.worker_nodes))
            break_amid_requests(server, lambda: cluster.remove_node(lost, allow_graceful=False), asks)


@pytest.fixture(scope="module")
def expected(restarted):
    """Completion of the text that the template makes of QUESTION."""
    prompt = "system: Speak.\nuser: What did the old gentleman say?\nassistant:"
    return restarted.post("/v1/completions", {**GREEDY, "prompt": prompt, "add_special_tokens": False})[
        "choices"
    ][0]


def test_chat(restarted, expected):
    before = counted(restarted)["steps"]["sparse"]
    answer = restarted.post("/v1/chat/completions", {**GREEDY, "messages": QUESTION})
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"].strip()
    assert answer["prompt_token_ids"] == expected["prompt_token_ids"], "the template was used"
    assert choice["token_ids"] == expected["token_ids"] and choice["message"]["content"] == expected["text"]
    assert counted(restarted)["steps"]["sparse"] - before == 24, "the prompt's too"


def test_chat_streamed(restarted, expected):
    events = list(restarted.stream("/v1/chat/completions", {**GREEDY, "messages": QUESTION}))
    choices = [choice for event in events for choice in event["choices"]]
    # how many depends on how fast they are read
    texts = [choice["delta"].get("content") for choice in choices]
    assert "".join(t for t in texts if t) == expected["text"]
    assert choices[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused(restarted, name):
    path, payload = MALFORMED[name]
    status, body = send(restarted, "POST", path, payload)
    assert 400 <= status < 500, (status, body[:500])
    answer = json.loads(body)
    assert answer["error"]["message"] and answer["error"]["code"] == status
    assert healthy(restarted)


def test_malformed_requests_leave_nothing_behind(restarted, expected):
    """All of them at once, beside good ones, which get what they get alone."""
    good = {**GREEDY, "prompt": expected["prompt_token_ids"]}
    with ThreadPoolExecutor(16) as pool:
        bad = [pool.submit(send, restarted, "POST", *request) for request in MALFORMED.values()]
        answers = [pool.submit(restarted.post, "/v1/completions", good) for _ in range(4)]
        assert all(400 <= future.result()[0] < 500 for future in bad)
        assert all(len(future.result()["choices"][0]["token_ids"]) == 24 for future in answers)
    assert_idle(restarted)
    assert restarted.post("/v1/completions", good)["choices"][0]["token_ids"] == expected["token_ids"]


def test_stops_clean(restarted):
    """Stops the server, so it is the last test that uses it."""
    assert len(restarted.processes()) > 1, "front end and engine"
    restarted.stop(grace_s=WAIT_S)
    assert restarted.process.returncode == 0, "SIGTERM was enough"
    assert restarted.processes() == []
    with pytest.raises(OSError):
        restarted.get("/health")


def resident_mb(server: Server) -> float:
    """Resident memory of all processes of the server; what they share counts for each."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in server.processes())
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not SOAK_S, reason="a soak run, on demand: DEJAVU_SOAK_S=SECONDS")
def test_memory_stays_flat(tmp_path, served):
    """Bursts of random requests with aborts; memory after each is sampled. The first third is warm-up.

    The median of the last third may be at most SOAK_GROWTH_MB above that of the second.
    """
    predictor = make_artifact(tmp_path / "artifact", served.model, density=0.5)
    samples = []
    with Server(served.model, *TINY, *CRAMPED, *dejavu(predictor), log=tmp_path / "server.log") as server:
        start(server)
        end = time.monotonic() + SOAK_S
        while time.monotonic() < end or len(samples) < 9:
            load(server, CLIENTS, seed=len(samples))
            assert_idle(server)
            samples.append(resident_mb(server))
    third = len(samples) // 3
    growth = statistics.median(samples[-third:]) - statistics.median(samples[third : 2 * third])
    print(
        f"{len(samples)} bursts, MB: {samples[0]:.0f} at first, {samples[third]:.0f} after warm-up,"
        f" {samples[-1]:.0f} at last; growth {growth:.1f}"
    )
    assert growth < SOAK_GROWTH_MB, samples
