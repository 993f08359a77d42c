"""The server over HTTP, as users start it: a real process, its front end, engine and worker, and our plugin in each."""
from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, make_artifact, make_opt
from transformers import OPTForCausalLM

from vllm_dejavu.metrics import summarize

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
from server import API_SERVER, SMALL, Server, ServerError, group_members  # noqa: E402

POSITIONS = 2048  # so that a request which is not aborted would run for long
OPTIONS = ("--model-impl", "dejavu", *SMALL, "--max-model-len", str(POSITIONS), "--skip-tokenizer-init")
PROMPT = [2, 17, 101, 5, 77, 30]
VLLM_COMMAND = Path(sys.executable).with_name("vllm")  # beside the Python of this environment


def settings(predictor: Path) -> tuple[str, str]:
    return "--additional-config", json.dumps({"dejavu": {"predictor": str(predictor)}})


def has_vllm_command() -> bool:
    try:
        return bool(metadata.version("vllm")) and VLLM_COMMAND.exists()
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_opt(tmp_path_factory.mktemp("model"), positions=POSITIONS)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, model):
    return make_artifact(tmp_path_factory.mktemp("artifact"), model, density=0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory, model, predictor):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with Server(model, *OPTIONS, *settings(predictor), "--served-model-name", "tiny", log=log, env={"VLLM_LOG_STATS_INTERVAL": "1"}) as server:
        server.start()
        server.wait_until_healthy()
        yield server


def request(prompt=PROMPT, max_tokens=24) -> dict:
    return {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


def complete(server, **kwargs) -> list[int]:
    choice = server.post("/v1/completions", request(**kwargs))["choices"][0]
    assert choice["finish_reason"] == "length"
    return choice["token_ids"]


def counted(server) -> dict:
    return summarize(server.metrics())


def gauge(server, name: str) -> float:
    """The sum of one of vLLM's Prometheus metrics."""
    return sum(float(v) for v in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", server.get("/metrics"), re.M))


def wait_until(condition, timeout_s: float = 15) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return met


def server_of(model: Path) -> int | None:
    """The process id, which is its group too, of the server of a model."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = file.read_bytes().decode(errors="replace")
            if str(model) in line and "vllm.entrypoints" in line:
                return int(file.parent.name)
    return None


def test_serves_our_architecture(server):
    assert any("Resolved architecture: DejaVuOPTForCausalLM" in line for line in server.log_lines())


def test_completion_ran_sparse(server, model, predictor):
    """Goes red if vLLM served its own OPT (no such metrics) or the sparse path ran dense (tokens, counts)."""
    before = counted(server)["steps"]
    tokens = complete(server, max_tokens=24)
    after = counted(server)
    assert after["steps"]["sparse"] - before["sparse"] == 23, "every step but the prompt's is sparse"
    assert after["steps"]["prefill_or_mixed"] - before["prefill_or_mixed"] == 1
    for layer in after["layers"]:
        assert 0 < layer["mlp"]["density"] < 1
    assert 0 < after["head_density"] < 1
    assert after["artifact"]["fingerprint_verified"] and after["artifact"]["path"] == str(predictor)

    hf = OPTForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        dense = hf.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0, len(PROMPT):].tolist()
    assert tokens[0] == dense[0], "the prompt's step is dense"
    assert tokens != dense, "half of the units skipped at random must show in the tokens"


def test_metrics_of_the_workers_are_in_prometheus(server):
    complete(server, max_tokens=8)
    steps = sum(counted(server)["steps"].values())
    assert wait_until(lambda: gauge(server, "vllm:dejavu_steps_total") == steps), server.get("/metrics")
    selected, selectable = (gauge(server, f"vllm:dejavu_{what}_units_total") for what in ("selected", "selectable"))
    assert 0 < selected < selectable
    assert 'vllm:dejavu_info{artifact_digest="' in server.get("/metrics")


def test_dense_switch_over_http(server, model):
    sparse = complete(server)
    hf = OPTForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        dense = hf.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0, len(PROMPT):].tolist()
    for switch, expected in ((True, dense), (False, sparse)):
        server.post("/collective_rpc", {"method": "dejavu_set_dense", "args": [switch]})
        server.post("/reset_prefix_cache?reset_running_requests=true", {})
        assert complete(server) == expected


def test_stream_gives_the_same_tokens_in_pieces(server):
    events = list(server.stream("/v1/completions", request()))
    pieces = [choice["token_ids"] for event in events for choice in event["choices"] if choice.get("token_ids")]
    assert len(pieces) > 1
    assert sum(pieces, []) == complete(server)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_8_concurrent_requests(server):
    gate = counted(server)["layers"][0]["mlp"]
    prompts = [[2, *((i * 37 + j * 11) % VOCAB for j in range(1 + 9 * i))] for i in range(8)]
    barrier = threading.Barrier(len(prompts))

    def ask(prompt):
        barrier.wait()
        return complete(server, prompt=prompt, max_tokens=100)

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, prompts))
    assert [len(answer) for answer in answers] == [100] * 8
    after = counted(server)["layers"][0]["mlp"]
    assert after["rows"] - gate["rows"] > 2 * (after["steps"] - gate["steps"]), "requests shared sparse steps"


def test_aborted_streams_free_their_requests(server):
    """The client closes mid-way: the requests end, and the server goes on answering."""
    expected = complete(server)
    tokens_before = gauge(server, "vllm:generation_tokens_total")
    streams = [server.stream("/v1/completions", request(max_tokens=POSITIONS - 100)) for _ in range(3)]
    for stream in streams:
        for _ in range(3):
            next(stream)
    # A step says how many it ran when it has ended.
    assert wait_until(lambda: gauge(server, "vllm:num_requests_running") == 3, 30), gauge(server, "vllm:num_requests_running")
    for stream in streams:
        stream.close()
    assert wait_until(lambda: gauge(server, "vllm:num_requests_running") == 0)
    assert gauge(server, "vllm:generation_tokens_total") - tokens_before < 3 * (POSITIONS - 100), "they ran to their end"
    assert complete(server) == expected


def test_stops_clean(server):
    """Stops the module's server, so it is the last test that uses it."""
    assert len(server.processes()) > 1, "front end and engine"
    server.stop()
    assert server.process.returncode == 0, "SIGTERM was enough"
    assert server.processes() == []
    with pytest.raises(OSError):
        server.get("/health")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(API_SERVER, id="api_server"),
        pytest.param(
            (str(VLLM_COMMAND), "serve"), id="vllm_serve",
            marks=pytest.mark.skipif(not has_vllm_command(), reason="no metadata of a distribution `vllm`: its command cannot run; see scripts/install.py"),
        ),
    ],
)  # fmt: skip
def test_missing_artifact_is_refused_at_start(tmp_path, model, command):
    """Both entry points come as far as our class, whose check speaks before any worker starts."""
    missing = tmp_path / "nowhere"
    with Server(model, *OPTIONS, *settings(missing), log=tmp_path / "server.log", command=command) as server:
        server.start()
        with pytest.raises(ServerError, match=f"No predictor artifact at {re.escape(str(missing))}"):
            server.wait_until_healthy()
        assert any("Resolved architecture: DejaVuOPTForCausalLM" in line for line in server.log_lines())
        assert wait_until(lambda: server.processes() == [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_demo_leaves_no_server_behind(tmp_path, number):
    """Ctrl-C, and even SIGKILL, of the demo while its server starts: vLLM 0.32 then ignores SIGTERM, so it must be killed."""
    model = make_opt(tmp_path / "model", layers=1, positions=512)
    make_artifact(model / "dejavu", model)
    demo = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "demo.py"), "--model", str(model)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert wait_until(lambda: server_of(model) is not None, 30), "the demo started no server"
        group = server_of(model)
        assert wait_until(lambda: len(group_members(group)) > 2, 60), "the server started no engine"
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=40)
    finally:
        demo.kill()
    assert demo.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    assert wait_until(lambda: not group_members(group))
