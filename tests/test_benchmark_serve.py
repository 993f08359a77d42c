"""bench_serve.py: vLLM's result, counts and ratios by hand, the same load for both sides in turns, failures;
a dry run of it all.
"""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import HANG_S

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_serve  # noqa: E402
from bench_serve import ClientError, ServerError  # noqa: E402

from vllm_dejavu.metrics import GATE_COUNTERS, STEP_REASONS, summarize  # noqa: E402

MODEL = ROOT / "examples" / "opt-books-7m"
# As vLLM 0.32 saves it, for 4 requests of 8 tokens.
RESULT = {
    "date": "20260101-000000",
    "endpoint_type": "openai",
    "backend": "openai",
    "label": None,
    "model_id": "m",
    "tokenizer_id": "m",
    "num_prompts": 4,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 2.0,
    "completed": 4,
    "failed": 0,
    "total_input_tokens": 64,
    "total_output_tokens": 32,
    "request_throughput": 2.0,
    "request_goodput": None,
    "output_throughput": 16.0,
    "total_token_throughput": 48.0,
    "max_output_tokens_per_s": 20.0,
    "max_concurrent_requests": 4,
    "rtfx": 0.0,
    **{
        f"{kind}_{what}_ms": value
        for what, value in (("ttft", 100.0), ("tpot", 10.0), ("itl", 11.0))
        for kind in ("mean", "median", "std", "p50")
    },
    "p99_ttft_ms": 190.0,
    "p99_tpot_ms": 19.0,
    "p99_itl_ms": 21.0,
}
PROVENANCE = {"device", "commit", "torch", "triton", "vllm", "transformers"}
COLUMNS = {
    "benchmark",
    "side",
    "repeat",
    "request_rate",
    "requests",
    "completed",
    "failed",
    "duration_s",
    "request_rate_achieved",
    "input_tokens",
    "output_tokens",
    "output_tokens_per_s",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "itl_p50_ms",
    "itl_p99_ms",
    "peak_requests",
    "status",
    "others_cores",
    "start_s",
    "model",
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
    *PROVENANCE,
}
COUNTED = {
    "sparse_step_share",
    "mlp_density",
    "mlp_union_density",
    "head_density",
    "head_union_density",
    "survivors",
    "steps_sparse",
    "steps_prefill_or_mixed",
    "steps_other",
    "tokens_per_step",
}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# vLLM's result.


def test_result_of_the_client():
    row = bench_serve.parse_result(RESULT, requests=4, output_len=8)
    assert row == {
        "requests": 4,
        "completed": 4,
        "failed": 0,
        "duration_s": 2.0,
        "request_rate_achieved": 2.0,
        "input_tokens": 64,
        "output_tokens": 32,
        "output_tokens_per_s": 16.0,
        "tpot_p50_ms": 10.0,
        "tpot_p99_ms": 19.0,
        "ttft_p50_ms": 100.0,
        "ttft_p99_ms": 190.0,
        "itl_p50_ms": 11.0,
        "itl_p99_ms": 21.0,
        "peak_requests": 4,
        "status": "ok",
    }


@pytest.mark.parametrize(
    ("changes", "failed", "status"),
    [
        pytest.param(
            {"failed": 1, "completed": 3, "total_output_tokens": 24},
            1,
            "1 of 4 requests failed",
            id="counted",
        ),
        pytest.param(
            {"failed": None, "completed": 3, "total_output_tokens": 24},
            1,
            "1 of 4 requests failed",
            id="not-counted",
        ),
        pytest.param({"failed": 2}, 2, "2 of 4 requests failed", id="counts-disagree"),
        pytest.param({"total_output_tokens": 31}, 0, "31 output tokens, expected 32", id="short-answers"),
    ],
)
def test_failures_are_counted(changes, failed, status):
    row = bench_serve.parse_result({**RESULT, **changes}, requests=4, output_len=8)
    assert (row["failed"], row["status"], row["tpot_p50_ms"]) == (failed, status, 10.0)


def test_a_result_of_an_older_version():
    result = {k: v for k, v in RESULT.items() if k not in ("failed", "max_concurrent_requests")}
    row = bench_serve.parse_result(result, requests=4, output_len=8)
    assert (row["failed"], row["status"], row["peak_requests"]) == (0, "ok", None)


def test_no_times_of_no_request():
    """vLLM says 0 ms then, which would look like a fast server."""
    zeros = {k: 0.0 for k in RESULT if k.endswith("_ms")}
    row = bench_serve.parse_result(
        {**RESULT, **zeros, "completed": 0, "failed": 4, "total_output_tokens": 0}, requests=4, output_len=8
    )
    assert row["status"] == "4 of 4 requests failed"
    assert {row[k] for k in row if k.endswith("_ms")} == {None}


@pytest.mark.parametrize("value", [None, "fast", float("nan"), float("inf")], ids=str)
def test_a_result_without_its_numbers(value):
    with pytest.raises(ClientError, match="'p99_tpot_ms', expected a number"):
        bench_serve.parse_result({**RESULT, "p99_tpot_ms": value}, requests=4, output_len=8)


# The server's counts.


def rank(sparse: int = 6, mixed: int = 3, piecewise: int = 1) -> dict:
    """One worker's counters: layer 0 gated, layer 1 dense."""
    steps = dict.fromkeys(STEP_REASONS, 0) | {
        "sparse": sparse,
        "prefill_or_mixed": mixed,
        "piecewise_graph": piecewise,
    }
    shared = dict.fromkeys(GATE_COUNTERS, 0) | {"layer": 0, "steps": sparse, "rows": 2 * sparse}
    gates = [
        {
            **shared,
            "block": "mlp",
            "units": 10,
            "selected": 4 * sparse,
            "read": 3 * sparse,
            "survived": 2 * sparse,
        },
        {**shared, "block": "attention", "units": 4, "selected": 4 * sparse, "read": 3 * sparse},
    ]
    return {
        "steps": steps,
        "num_layers": 2,
        "gates": gates,
        "artifact": {},
        "mode": "sparse",
        "dense_switch": False,
        "predictor_bytes": 0,
    }


def test_counts_of_a_rate():
    row = bench_serve.counts(summarize([rank()]), output_tokens=25)
    assert set(row) == COUNTED
    assert (
        row["sparse_step_share"],
        row["steps_sparse"],
        row["steps_prefill_or_mixed"],
        row["steps_other"],
        row["tokens_per_step"],
    ) == (0.6, 6, 3, 1, 2.5)
    assert (row["mlp_density"], row["mlp_union_density"]) == pytest.approx(((0.2 + 1) / 2, (0.3 + 1) / 2))
    assert (row["head_density"], row["head_union_density"]) == pytest.approx(((0.5 + 1) / 2, (0.75 + 1) / 2))


def test_counts_where_no_step_ran():
    row = bench_serve.counts(summarize([rank(0, 0, 0)]), output_tokens=0)
    assert (row["sparse_step_share"], row["mlp_density"], row["tokens_per_step"]) == (None, None, None)


# Ratios.


def served(side, repeat, rate, tpot, ttft=100, tokens_per_s=50, **kwargs):
    row = {
        "side": side,
        "repeat": repeat,
        "request_rate": rate,
        "status": "ok",
        "failed": 0,
        "tpot_p50_ms": tpot,
        "tpot_p99_ms": 2 * tpot,
        "ttft_p50_ms": ttft,
        "ttft_p99_ms": 3 * ttft,
        "output_tokens_per_s": tokens_per_s,
        "request_rate_achieved": 0.9 * rate,
        "others_cores": 0.1,
        "device": "CPU",
        "commit": "abc",
        "model": "m",
        "dtype": "bfloat16",
        "requests": 4,
        "input_len": 16,
        "output_len": 8,
        "prompts": "text.txt",
        "dry_run": False,
    }
    return row | ({"sparse_step_share": 0.8, "mlp_density": 0.1} if side == "dejavu" else {}) | kwargs


ROWS = [
    served("dense", 0, 1.0, 100),
    served("dejavu", 0, 1.0, 50, ttft=125, tokens_per_s=75, sparse_step_share=0.9),
    served("dense", 1, 1.0, 120, ttft=80),
    served("dejavu", 1, 1.0, 80, ttft=160, tokens_per_s=60),
    served("dense", 2, 1.0, 90),
    served("dejavu", 2, 1.0, 30, status="1 of 4 requests failed", failed=1),
    served("dejavu", 0, math.inf, 20, others_cores=0.7),
    served("dense", 1, math.inf, 10),
    served("dense", 0, 0.5, 10),
    served("dejavu", 0, 0.5, 40),
]


@pytest.mark.parametrize("as_text", [False, True], ids=["numbers", "text"])
def test_ratios_are_taken_within_repeats(as_text):
    rows = [{k: str(v) for k, v in row.items()} for row in ROWS] if as_text else ROWS
    idle, one, saturated = bench_serve.ratios(rows)
    assert (idle["request_rate"], one["request_rate"], saturated["request_rate"]) == (0.5, 1.0, math.inf)
    assert one["repeats"] == 2, "the repeat with a failure is left out"
    assert (one["tpot_p50_ratio"], one["tpot_p50_ratio_min"], one["tpot_p50_ratio_max"]) == (1.75, 1.5, 2.0)
    assert (one["tpot_p99_ratio"], one["ttft_p50_ratio"], one["ttft_p99_ratio"]) == pytest.approx(
        (1.75, 0.65, 0.65)
    )
    # more tokens a second are better: the other way round
    assert (
        one["output_tokens_per_s_ratio"],
        one["output_tokens_per_s_ratio_min"],
        one["output_tokens_per_s_ratio_max"],
    ) == pytest.approx((1.35, 1.2, 1.5))
    assert (one["dense_tpot_p50_ms"], one["dejavu_tpot_p50_ms"], one["dense_request_rate_achieved"]) == (
        100,
        65,
        0.9,
    )
    assert one["sparse_step_share"] == pytest.approx(0.85) and one["mlp_density"] == 0.1
    assert (one["dense_failed"], one["dejavu_failed"], one["device"]) == (0, 1, "CPU")
    assert (idle["tpot_p50_ratio"], idle["repeats"]) == (0.25, 1)
    assert (
        saturated["repeats"],
        saturated["tpot_p50_ratio"],
        saturated["dense_tpot_p50_ms"],
        saturated["dejavu_tpot_p50_ms"],
    ) == (0, None, 10, 20), "sides of different repeats"
    assert saturated["others_cores"] == 0.7


def test_markdown():
    text = bench_serve.markdown(bench_serve.ratios(ROWS))
    about, _, *table = text.splitlines()
    assert (
        about
        == "m, bfloat16; 4 requests of 16 + 8 tokens, text.txt; CPU; 2 repeats; NOT ALONE: other processes"
        " kept up to 0.70 cores busy"
    )
    for quiet in ({"others_cores": 0.05}, {"device": "NVIDIA H100"}):
        assert "NOT ALONE" not in bench_serve.markdown(bench_serve.ratios([row | quiet for row in ROWS]))
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert table[3].startswith("| 1 | 0.90 | 0.90 | 100.0 | 65.0 | **1.75x** (1.50-2.00) |") and table[
        3
    ].endswith("| 85% | 0.10 (-) | - (-) | 1 |")
    assert table[4].startswith("| all at once |") and "| 10.0 | 20.0 | - |" in table[4]
    assert "DRY RUN" in bench_serve.markdown(bench_serve.ratios([{**row, "dry_run": "True"} for row in ROWS]))


# What is started.


@pytest.mark.parametrize(
    ("repeats", "order"),
    [
        pytest.param(1, [(0, "dense"), (0, "dejavu")], id="1"),
        pytest.param(
            3, [(0, "dense"), (0, "dejavu"), (1, "dejavu"), (1, "dense"), (2, "dense"), (2, "dejavu")], id="3"
        ),
    ],
)
def test_sides_alternate(repeats, order):
    assert bench_serve.schedule(("dense", "dejavu"), repeats) == order


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def parse(*arguments: str):
    return bench_serve.parse_args([*arguments])


def value_of(options: list[str], name: str) -> str:
    """The one that counts: the last."""
    return options[len(options) - options[::-1].index(name)]


def test_defaults_by_device(cpu, monkeypatch):
    args = parse()
    assert (args.rates, args.requests, args.input_len, args.output_len) == (
        [0.5, 1, 2, 4, math.inf],
        64,
        128,
        64,
    )
    assert (args.repeats, args.dtype, args.max_num_seqs, args.model, args.server) == (
        3,
        "bfloat16",
        64,
        MODEL,
        [],
    )
    assert parse("--rates", "inf", "2", "2", "0.5").rates == [0.5, 2, math.inf]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    args = parse()
    assert (args.rates[-1], args.dtype, args.max_num_seqs) == (math.inf, "float16", None) and args.rates[
        0
    ] == 1
    args = parse("--dry-run", "--requests", "3")
    assert (len(args.rates), args.requests, args.repeats) == (2, 3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--rates", "0"], "0 is out of range", id="rate-0"),
        pytest.param(["--rates", "nan"], "nan is out of range", id="rate-nan"),
        pytest.param(["--requests", "0"], "--requests 0 is too small", id="no-requests"),
        pytest.param(
            ["--output-len", "1"], "--output-len 1 is too small: expected at least 2", id="one-token"
        ),
        pytest.param(["--max-num-seqs", "0"], "--max-num-seqs 0 is too small", id="no-seqs"),
        pytest.param(["--text", "a.txt", "--input-len", "1100"], "at most 1000 here", id="long-text"),
        pytest.param(["--", "--model-impl", "dejavu"], "--model-impl is set for each side", id="model-impl"),
        pytest.param(
            ["--", "--additional-config={}"],
            "--additional-config is set for each side",
            id="additional-config",
        ),
    ],
)
def test_refusals(cpu, capsys, arguments, message):
    with pytest.raises(SystemExit) as failed:
        parse(*arguments)
    assert failed.value.code == 2 and message in capsys.readouterr().err


def test_sides_differ_in_the_model_alone(cpu):
    args = parse("--predictor", "P", "--", "--max-num-seqs", "5", "--tensor-parallel-size=2")
    shape = bench_serve.shape_of(args.model)
    dense, ours = (bench_serve.server_options(args, shape, side) for side in ("dense", "dejavu"))
    assert value_of(dense, "--model-impl") == "vllm" and value_of(ours, "--model-impl") == "dejavu"
    assert json.loads(value_of(ours, "--additional-config")) == {"dejavu": {"predictor": "P"}}
    at = ours.index("--additional-config")
    assert [o for o in dense if o != "vllm"] == [o for o in ours[:at] + ours[at + 2 :] if o != "dejavu"]
    assert "--no-enable-prefix-caching" in dense and "--enforce-eager" not in dense
    assert value_of(dense, "--max-num-seqs") == "5" and dense[-1] == "--tensor-parallel-size=2", (
        "options behind -- come last"
    )
    # 64 requests of 2 blocks and vLLM's own, keys and values in bfloat16
    assert value_of(dense, "--kv-cache-memory-bytes") == str((64 * 2 + 2) * 128 * 2 * 256 * 2 * 6)
    assert value_of(dense, "--max-model-len") == str(128 + 64 + 16)


def test_requests_must_fit_the_model(cpu):
    args = parse("--input-len", "480", "--output-len", "32")
    shape = bench_serve.shape_of(args.model)
    assert bench_serve.length_of(args, shape) == 512
    with pytest.raises(
        ValueError,
        match="--input-len 481 and --output-len 32 make 513 tokens; opt-books-7m has 512 positions",
    ):
        bench_serve.length_of(parse("--input-len", "481", "--output-len", "32"), shape)


def test_threads_are_vllms_own_or_the_users(cpu, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    args = parse()
    shape = bench_serve.shape_of(args.model)
    env = bench_serve.make_server(args, shape, "dense", tmp_path / "log").env
    assert (
        "OMP_NUM_THREADS" not in env
        and env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
        and env["VLLM_SERVER_DEV_MODE"] == "1"
    )
    dry = bench_serve.make_server(parse("--dry-run"), shape, "dense", tmp_path / "log").env
    assert (dry["OMP_NUM_THREADS"], dry["VLLM_CPU_OMP_THREADS_BIND"]) == ("1", "nobind")


def test_prompts_out_of_a_text(cpu, tmp_path):
    """Of the length that was asked for with the BOS that the server adds; others in the next repeat."""
    from transformers import AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text(
        " ".join(f"In the year {n} the ship came back, and nobody spoke of it." for n in range(400)),
        encoding="utf-8",
    )
    args = parse("--text", str(text), "--input-len", "24", "--requests", "6")
    found = [
        json.loads(bench_serve.write_prompts(args, repeat, tmp_path).read_text(encoding="utf-8"))
        for repeat in (0, 1, 0)
    ]
    assert found[0] == found[2] != found[1]
    prompts = [entry["conversations"][0]["value"] for entry in found[0]]
    assert len(prompts) == len(set(prompts)) == 6 and all(
        len(entry["conversations"]) == 2 for entry in found[0]
    )
    assert all(prompt.strip() in text.read_text(encoding="utf-8") for prompt in prompts)
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(MODEL)(prompts).input_ids]
    assert all(abs(length - 24) <= 2 for length in lengths), lengths


def test_processor_time():
    tick = 2 / os.sysconf("SC_CLK_TCK")  # user and system time are each cut to a tick
    before, found, after = sum(os.times()[:2]), bench_serve.cpu_s(os.getpid()), sum(os.times()[:2])
    assert 0 < before - tick <= found <= after + tick
    assert bench_serve.cpu_s(2**30) == 0


def test_a_server_is_no_neighbour(monkeypatch):
    """Others' time is all time less this process's, its ended children's and the server's."""
    times = iter([(0.0, 100.0, 10.0), (10.0, 118.0, 11.0)])
    children = iter(
        [
            SimpleNamespace(children_user=1.0, children_system=0.0),
            SimpleNamespace(children_user=4.0, children_system=1.0),
        ]
    )
    spent = iter([5.0, 1.0, 13.0, 2.0])
    monkeypatch.setattr(bench_serve.Others, "_now", staticmethod(lambda: next(times)))
    monkeypatch.setattr(bench_serve.os, "times", lambda: next(children))
    monkeypatch.setattr(bench_serve, "cpu_s", lambda process: next(spent))
    neighbours = bench_serve.Neighbours(SimpleNamespace(processes=lambda: [7, 8]))
    assert neighbours.cores() == pytest.approx((18 - 1 - 4 - 9) / 10)


# The client's process.


@pytest.mark.parametrize(
    ("client", "timeout_s", "message"),
    [
        pytest.param(
            "print('no such dataset'); raise SystemExit(3)",
            HANG_S,
            r"exit code 3.*no such dataset",
            id="failed",
        ),
        pytest.param("print('all well')", HANG_S, r"saved no result, exit code 0.*all well", id="no-result"),
        pytest.param("import time; time.sleep(10**6)", 1, r"exit code none within 1 s", id="too-long"),
    ],
)
def test_a_client_that_fails(tmp_path, monkeypatch, client, timeout_s, message):
    monkeypatch.setattr(bench_serve, "CLIENT", client)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ClientError, match=f"(?s){message}"):
        bench_serve.run_client([], tmp_path / "result.json", tmp_path / "log", timeout_s)


def test_a_client_gets_its_options_and_no_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setattr(
        bench_serve,
        "CLIENT",
        "import json, os, sys; json.dump([sys.argv[1:], os.environ['no_proxy']], open(sys.argv[1], 'w'))",
    )
    result = tmp_path / "result.json"
    assert bench_serve.run_client(
        [str(result), "--seed", "1"], result, tmp_path / "log", timeout_s=HANG_S
    ) == [[str(result), "--seed", "1"], "127.0.0.1"]


# The whole of it, without servers.


class FakeServer:
    """Notes what happens to servers, in order."""

    events: list[tuple] = []
    port = 50000

    def __init__(self, model, *options, log):
        impl = options[options.index("--model-impl") + 1]
        self.side, self.host, self.env = {"vllm": "dense"}.get(impl, impl), "host", {}
        FakeServer.port += 1
        self.port = FakeServer.port

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.events.append(("stop", self.side))

    def start(self):
        self.events.append(("start", self.side))

    def wait_until_healthy(self, timeout_s):
        return 3.0

    def post(self, path, body):
        self.events.append((body.get("method", path), self.side))

    def metrics(self):
        self.events.append(("read", self.side))
        return [rank()]

    def processes(self):
        return []


@pytest.fixture
def servers(cpu, monkeypatch):
    """The events of servers and clients; `fail` names the (side, rate) whose requests fail."""
    state = SimpleNamespace(events=[], loads=[], fail=None)
    FakeServer.events = state.events
    monkeypatch.setattr(bench_serve, "Server", FakeServer)

    def client(options, result, log, timeout_s):
        side, rate = state.events[-1][1], value_of(options, "--request-rate")
        state.events.append((rate, side))
        state.loads.append((side, options))
        return {**RESULT, **({"completed": 3, "failed": 1} if (side, rate) == state.fail else {})}

    monkeypatch.setattr(bench_serve, "run_client", client)
    return state


ARGUMENTS = ("--rates", "inf", "2", "--requests", "4", "--input-len", "16", "--output-len", "8")


def test_a_run_of_two_repeats(servers, tmp_path, capsys):
    bench_serve.main([*ARGUMENTS, "--repeats", "2", "--output", str(tmp_path), "--", "--swap-space", "0"])
    warm = "/v1/completions"
    dense = [(what, "dense") for what in ("start", warm, warm, "2.0", "inf", "stop")]
    ours = [
        (what, "dejavu")
        for what in (
            "start",
            warm,
            warm,
            "dejavu_reset_metrics",
            "2.0",
            "read",
            "dejavu_reset_metrics",
            "inf",
            "read",
            "stop",
        )
    ]
    assert servers.events == [
        *dense,
        *ours,
        *ours,
        *dense,
    ], "one server at a time, in turns, counted rate by rate"

    def load(side, repeat):
        """What the clients of one server were told, without its port."""
        of_side = [options for s, options in servers.loads if s == side]
        ports = [value_of(options, "--port") for options in of_side[2 * repeat : 2 * repeat + 2]]
        return [[o for o in options if o not in ports] for options in of_side[2 * repeat : 2 * repeat + 2]]

    assert load("dense", 0) == load("dejavu", 0) and load("dense", 1) == load("dejavu", 1), (
        "sides had different loads"
    )
    assert load("dense", 0) != load("dense", 1), "both repeats sent the same requests at the same times"
    assert [value_of(options, "--seed") for options in load("dense", 0) + load("dense", 1)] == [
        "0",
        "0",
        "1",
        "1",
    ]

    rows = read(tmp_path / "serve.csv")
    assert set(rows[0]) == COLUMNS | COUNTED
    assert [(r["repeat"], r["side"], r["request_rate"]) for r in rows] == [
        (repeat, side, rate)
        for repeat, side in (("0", "dense"), ("0", "dejavu"), ("1", "dejavu"), ("1", "dense"))
        for rate in ("2", "inf")
    ]
    assert {(r["status"], r["failed"], r["server_options"], r["prompts"], r["synthetic"]) for r in rows} == {
        ("ok", "0", "--swap-space 0", "random tokens", "False")
    }
    assert {r["sparse_step_share"] for r in rows if r["side"] == "dense"} == {""} and {
        r["sparse_step_share"] for r in rows if r["side"] == "dejavu"
    } == {"0.6"}
    pairs = read(tmp_path / "serve-ratios.csv")
    assert [
        (r["request_rate"], r["repeats"], r["tpot_p50_ratio"], r["sparse_step_share"]) for r in pairs
    ] == [("2", "2", "1", "0.6"), ("inf", "2", "1", "0.6")]
    assert PROVENANCE - {"triton"} <= set(pairs[0])
    printed = capsys.readouterr().out
    assert (
        "opt-books-7m, bfloat16; 4 requests of 16 + 8 tokens, random tokens" in printed
        and "| all at once |" in printed
        and "DRY RUN" not in printed
    )
    assert (tmp_path / "serve.png").exists() or "matplotlib is not installed" in printed
    # table and picture again, from the files alone
    servers.events.clear()
    bench_serve.main(["--report", "--output", str(tmp_path)])
    assert "| all at once |" in capsys.readouterr().out and servers.events == []


def test_failed_requests_end_the_run(servers, tmp_path):
    servers.fail = ("dejavu", "2.0")
    with pytest.raises(SystemExit, match="dejavu at rate 2: 1 of 4 requests failed"):
        bench_serve.main([*ARGUMENTS, "--repeats", "2", "--output", str(tmp_path)])
    assert servers.events[-1] == ("stop", "dejavu")
    rows = read(tmp_path / "serve.csv")
    assert [(r["side"], r["failed"], r["status"]) for r in rows] == [
        ("dense", "0", "ok"),
        ("dense", "0", "ok"),
        ("dejavu", "1", "1 of 4 requests failed"),
    ]


def test_failed_requests_allowed(servers, tmp_path, capsys):
    servers.fail = ("dejavu", "2.0")
    bench_serve.main([*ARGUMENTS, "--repeats", "1", "--output", str(tmp_path), "--allow-failures"])
    two, saturated = read(tmp_path / "serve-ratios.csv")
    assert (two["dejavu_failed"], two["tpot_p50_ratio"], two["repeats"]) == (
        "1",
        "",
        "0",
    ), "a ratio of a server that dropped requests"
    assert (saturated["dejavu_failed"], saturated["tpot_p50_ratio"]) == ("0", "1")


@pytest.mark.parametrize(
    "error",
    [ServerError("died"), ClientError("no result"), ValueError("too long")],
    ids=lambda e: type(e).__name__,
)
def test_errors_are_lines_and_servers_are_stopped(servers, tmp_path, monkeypatch, error):
    def client(*_):
        raise error

    monkeypatch.setattr(bench_serve, "run_client", client)
    with pytest.raises(SystemExit, match=f"bench_serve: {error}"):
        bench_serve.main([*ARGUMENTS, "--output", str(tmp_path)])
    assert servers.events[-1] == ("stop", "dense")


# With servers.


@pytest.mark.on_demand
def test_dry_run(tmp_path):
    """vLLM's own client against real servers of both sides."""
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "bench_serve.py"),
            "--dry-run",
            "--output",
            str(out),
            "--",
            "--kv-cache-memory-bytes",
            "64M",
        ],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN" in done.stdout and "no measurement" in done.stdout
    rows = read(out / "serve.csv")
    assert [(r["side"], r["request_rate"]) for r in rows] == [
        (side, rate) for side in ("dense", "dejavu") for rate in ("4", "inf")
    ]
    for row in rows:
        assert (row["status"], row["completed"], row["failed"], row["output_tokens"], row["dry_run"]) == (
            "ok",
            "4",
            "0",
            "32",
            "True",
        )
        assert 4 * 14 <= int(row["input_tokens"]) <= 4 * 18, "prompts of another length"
        assert all(
            float(row[name]) > 0
            for name in (
                "tpot_p50_ms",
                "tpot_p99_ms",
                "ttft_p50_ms",
                "request_rate_achieved",
                "output_tokens_per_s",
            )
        )
    for row in rows[2:]:
        steps = [int(row[f"steps_{reason}"]) for reason in ("sparse", "prefill_or_mixed", "other")]
        # 4 answers of 8 tokens; warm-up is not counted
        assert steps[0] > 0 and 8 <= sum(steps) <= 32 and steps[1] <= 4
        assert 0 < float(row["sparse_step_share"]) < 1 and 0 < float(row["mlp_density"]) < 0.5
    ratios = read(out / "serve-ratios.csv")
    assert [r["request_rate"] for r in ratios] == ["4", "inf"] and all(
        float(r["tpot_p50_ratio"]) > 0 and r["repeats"] == "1" for r in ratios
    )
    assert (out / "serve.png").exists() or "not installed" in done.stdout
