"""The server over HTTP, as users start it: a real process, its front end, engine and worker, and our plugin in each."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from serving import (
    ENDLESS,
    PROMPT,
    ROOMY,
    SCRIPTS,
    TINY,
    WAIT_S,
    complete,
    counted,
    dejavu,
    gauge,
    held,
    request,
    vllm_command,
    wait_until,
)
from tiny import VOCAB, make_artifact, make_opt
from transformers import OPTForCausalLM

from vllm_dejavu import artifact

sys.path.insert(0, str(SCRIPTS))
from server import API_SERVER, Server, ServerError, group_members  # noqa: E402


@pytest.fixture(scope="module")
def dense(served) -> list[int]:
    """What transformers writes after PROMPT."""
    hf = OPTForCausalLM.from_pretrained(served.model).eval()
    with torch.no_grad():
        tokens = hf.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    return tokens[0, len(PROMPT) :].tolist()


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


def test_completion_ran_sparse(server, served, dense):
    """Goes red if vLLM served its own OPT (no such metrics) or the sparse path ran dense (tokens, counts)."""
    before = counted(server)["steps"]
    tokens = complete(server, max_tokens=24)
    after = counted(server)
    assert after["steps"]["sparse"] - before["sparse"] == 23, "every step but the prompt's is sparse"
    assert after["steps"]["prefill_or_mixed"] - before["prefill_or_mixed"] == 1
    for layer in after["layers"]:
        assert 0 < layer["mlp"]["density"] < 1
    assert 0 < after["head_density"] < 1
    assert after["artifact"]["fingerprint_verified"] and after["artifact"]["path"] == str(served.place)
    assert tokens[0] == dense[0], "the prompt's step is dense"
    assert tokens != dense, "half of the units skipped at random must show in the tokens"


def test_metrics_of_the_workers_are_in_prometheus(server):
    complete(server, max_tokens=8)

    def followed() -> bool:
        return gauge(server, "vllm:dejavu_steps_total") == sum(counted(server)["steps"].values()) > 0

    assert wait_until(followed), server.get("/metrics")
    selected, selectable = (gauge(server, f"vllm:dejavu_{what}_units_total") for what in ("selected", "selectable"))
    assert 0 < selected < selectable
    assert 'vllm:dejavu_info{artifact_digest="' in server.get("/metrics")


def test_dense_switch_over_http(server, dense):
    sparse = complete(server)
    for switch, expected in ((True, dense), (False, sparse)):
        server.post("/collective_rpc", {"method": "dejavu_set_dense", "args": [switch]})
        server.post("/reset_prefix_cache?reset_running_requests=true", {})
        assert complete(server) == expected


def tokens_of(events) -> list[list[int]]:
    """The tokens of each event that holds any."""
    return [choice["token_ids"] for event in events for choice in event["choices"] if choice.get("token_ids")]


def test_stream_gives_the_same_tokens(server):
    events = list(server.stream("/v1/completions", request()))
    assert sum(tokens_of(events), []) == complete(server)
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_stream_comes_in_pieces(server):
    """Before the request has ended; how many tokens a piece holds depends on how fast the client reads."""
    with held(server, [PROMPT]) as [stream]:
        [piece] = tokens_of([next(stream)])
        assert len(piece) < ENDLESS


def test_8_concurrent_requests_share_every_step(server):
    """Exactly: between two readings, while all of them run, a step has a row of each.

    Once went red on a fast machine, where a request of 100 tokens was over before the next had come.
    """
    prompts = [[2, *((i * 37 + j * 11) % VOCAB for j in range(1 + 9 * i))] for i in range(8)]
    with held(server, prompts) as streams:
        before = counted(server)
        for stream in streams:
            assert next(stream)["choices"][0]["finish_reason"] is None
        # What a stream gives may have been written before the first reading: steps are waited for.
        assert wait_until(lambda: counted(server)["steps"]["sparse"] > before["steps"]["sparse"])
        after = counted(server)
    first, last = before["layers"][0]["mlp"], after["layers"][0]["mlp"]
    assert last["rows"] - first["rows"] == 8 * (last["steps"] - first["steps"]) > 0
    assert after["steps"]["prefill_or_mixed"] == before["steps"]["prefill_or_mixed"]
    assert 0 < last["density"] < last["read_density"] <= 1, "each row selects its own, a step reads their union"


def test_aborted_streams_free_their_requests(server):
    """The client closes mid-way: the requests end, and the server goes on answering.

    Once went red on a fast machine, where the streams were over before they were aborted.
    """
    expected = complete(server)
    tokens_before = gauge(server, "vllm:generation_tokens_total")
    with held(server, [PROMPT] * 3) as streams:
        for stream in streams:
            next(stream)
        # A step says how many it ran when it has ended.
        assert wait_until(lambda: gauge(server, "vllm:num_requests_running") == 3)
    written = gauge(server, "vllm:generation_tokens_total") - tokens_before
    assert 0 < written < 3 * ENDLESS, "they ran to their end"
    assert complete(server) == expected


def missing(tmp_path: Path, model: Path) -> tuple[Path, str]:
    path = tmp_path / "nowhere"
    return path, f"No predictor artifact at {re.escape(str(path))}"


def half_replaced(tmp_path: Path, model: Path) -> tuple[Path, str]:
    """The copy of another artifact stopped between its two files."""
    path = make_artifact(tmp_path / "artifact", model, seed=1)
    shutil.copy(make_artifact(tmp_path / "other", model, seed=2) / artifact.TENSORS_FILE, path)
    return path, f"{re.escape(str(path))}.*The two files are not of the same artifact"


@pytest.mark.on_demand
@pytest.mark.parametrize("command", [API_SERVER, vllm_command()], ids=["api_server", "vllm_serve"])
@pytest.mark.parametrize("fault", [missing, half_replaced])
def test_a_faulty_artifact_is_refused_at_start(tmp_path, served, command, fault):
    """Both entry points come as far as our class, whose check speaks before any worker starts."""
    if command is None:
        pytest.skip("no metadata of a distribution `vllm`: its command cannot run; see scripts/install.py")
    path, message = fault(tmp_path, served.model)
    options = (*TINY, *ROOMY, *dejavu(path))
    with Server(served.model, *options, log=tmp_path / "server.log", command=command) as server:
        server.start()
        with pytest.raises(ServerError, match=message):
            server.wait_until_healthy(2 * WAIT_S)
        assert server.process.returncode > 0
        assert any("Resolved architecture: DejaVuOPTForCausalLM" in line for line in server.log_lines())
        assert wait_until(lambda: server.processes() == [])


@pytest.mark.on_demand
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_demo_leaves_no_server_behind(tmp_path, number):
    """Ctrl-C, and even SIGKILL, of the demo while its server starts: vLLM 0.32 then ignores SIGTERM, so it must be killed."""
    model = make_opt(tmp_path / "model", layers=1, positions=512)
    make_artifact(model / "dejavu", model)
    command = [sys.executable, str(SCRIPTS / "demo.py"), "--model", str(model)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert wait_until(lambda: server_of(model) is not None), "the demo started no server"
        group = server_of(model)
        assert wait_until(lambda: len(group_members(group)) > 2), "the server started no engine"
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=WAIT_S)
    finally:
        demo.kill()
    assert demo.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    assert wait_until(lambda: not group_members(group))


OWNER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell starts without
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from server import Server
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(3600)"
with Server("model", log=Path(sys.argv[2]), command=(sys.executable, "-c", stubborn)) as server:
    server.start()
    print(server.process.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_a_server_ends_with_its_owner(tmp_path, number):
    """Ctrl-C in whoever started it, or SIGKILL, which no handler sees: even a server that ignores SIGTERM."""
    command = [sys.executable, "-c", OWNER, str(SCRIPTS), str(tmp_path / "log")]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        group = int(owner.stdout.readline())
        assert wait_until(lambda: "deaf" in (tmp_path / "log").read_text()), "it did not start"
        assert group_members(group)
        owner.send_signal(number)
        _, said = owner.communicate(timeout=WAIT_S)
    finally:
        owner.kill()
    assert owner.returncode == -number, said
    assert wait_until(lambda: not group_members(group))
