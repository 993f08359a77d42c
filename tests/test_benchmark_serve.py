"""bench_serve.py as a whole: ratios by hand, the same load for both sides in turns, failures, a dry run."""

import math
import subprocess
import sys
from types import SimpleNamespace

import bench_serve
import pytest
import serve_report
import serve_server
from conftest import HANG_S
from serve_client import ClientError
from serve_run import COUNTED, RESULT, ROOT, rank, read, value_of
from server import ServerError

BENCHMARKS = ROOT / "benchmarks"

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
    "weight_bits",
    "lm_head_bits",
    "kv_cache_dtype",
    "server_options",
    "weights",
    "synthetic",
    "dry_run",
    *PROVENANCE,
}


# vLLM's result.


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
    idle, one, saturated = serve_report.ratios(rows)
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
    assert (one["stock_tpot_p50_ms"], one["ours_tpot_p50_ms"], one["stock_request_rate_achieved"]) == (
        100,
        65,
        0.9,
    )
    assert one["sparse_step_share"] == pytest.approx(0.85) and one["mlp_density"] == 0.1
    assert (one["stock_failed"], one["ours_failed"], one["device"]) == (0, 1, "CPU")
    assert (idle["tpot_p50_ratio"], idle["repeats"]) == (0.25, 1)
    assert (
        saturated["repeats"],
        saturated["tpot_p50_ratio"],
        saturated["stock_tpot_p50_ms"],
        saturated["ours_tpot_p50_ms"],
    ) == (0, None, 10, 20), "sides of different repeats"
    assert saturated["others_cores"] == 0.7


def test_markdown():
    text = serve_report.markdown(serve_report.ratios(ROWS))
    about, _, *table = text.splitlines()
    assert (
        about
        == "m, bfloat16; 4 requests of 16 + 8 tokens, text.txt; CPU; 2 repeats; NOT ALONE: other processes"
        " kept up to 0.70 cores busy"
    )
    for quiet in ({"others_cores": 0.05}, {"device": "NVIDIA H100"}):
        assert "NOT ALONE" not in serve_report.markdown(serve_report.ratios([row | quiet for row in ROWS]))
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1
    assert table[3].startswith("| 1 | 0.90 | 0.90 | 100.0 | 65.0 | **1.75x** (1.50-2.00) |") and table[
        3
    ].endswith("| 85% | 0.10 (-) | - (-) | 1 |")
    assert table[4].startswith("| all at once |") and "| 10.0 | 20.0 | - |" in table[4]
    assert "DRY RUN" in serve_report.markdown(
        serve_report.ratios([{**row, "dry_run": "True"} for row in ROWS])
    )


def test_report_names_the_sides():
    rows = [{**row, "side": {"dense": "w8a8", "dejavu": "dejavu-int8"}[row["side"]]} for row in ROWS]
    found = serve_report.ratios(rows)
    assert {(row["stock"], row["ours"]) for row in found} == {("w8a8", "dejavu-int8")}
    assert found[1]["tpot_p50_ratio"] == 1.75
    text = serve_report.markdown(found)
    assert "w8a8 / dejavu-int8 (range)" in text and "dejavu-int8 / w8a8 (range)" in text
    with pytest.raises(ValueError, match=r"sides \['dense', 'dejavu', 'w8a8'\], expected one of stock vLLM"):
        serve_report.ratios([*ROWS, served("w8a8", 3, 1.0, 10)])


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
    monkeypatch.setattr(serve_server, "Server", FakeServer)

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
    assert (two["ours_failed"], two["tpot_p50_ratio"], two["repeats"]) == (
        "1",
        "",
        "0",
    ), "a ratio of a server that dropped requests"
    assert (saturated["ours_failed"], saturated["tpot_p50_ratio"]) == ("0", "1")


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
