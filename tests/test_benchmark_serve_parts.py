"""bench_serve.py part by part: the client's result, what a server counted, options, a server and a client."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import serve_client
import serve_server
from conftest import HANG_S
from serve_client import ClientError
from serve_run import COUNTED, MODEL, RESULT, parse, rank, value_of

from vllm_dejavu.metrics import summarize


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_result_of_the_client():
    row = serve_client.parse_result(RESULT, requests=4, output_len=8)
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
    row = serve_client.parse_result({**RESULT, **changes}, requests=4, output_len=8)
    assert (row["failed"], row["status"], row["tpot_p50_ms"]) == (failed, status, 10.0)


def test_a_result_of_an_older_version():
    result = {k: v for k, v in RESULT.items() if k not in ("failed", "max_concurrent_requests")}
    row = serve_client.parse_result(result, requests=4, output_len=8)
    assert (row["failed"], row["status"], row["peak_requests"]) == (0, "ok", None)


def test_no_times_of_no_request():
    """vLLM says 0 ms then, which would look like a fast server."""
    zeros = {k: 0.0 for k in RESULT if k.endswith("_ms")}
    row = serve_client.parse_result(
        {**RESULT, **zeros, "completed": 0, "failed": 4, "total_output_tokens": 0}, requests=4, output_len=8
    )
    assert row["status"] == "4 of 4 requests failed"
    assert {row[k] for k in row if k.endswith("_ms")} == {None}


@pytest.mark.parametrize("value", [None, "fast", float("nan"), float("inf")], ids=str)
def test_a_result_without_its_numbers(value):
    with pytest.raises(ClientError, match="'p99_tpot_ms', expected a number"):
        serve_client.parse_result({**RESULT, "p99_tpot_ms": value}, requests=4, output_len=8)


def test_counts_of_a_rate():
    row = serve_client.counts(summarize([rank()]), output_tokens=25)
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
    row = serve_client.counts(summarize([rank(0, 0, 0)]), output_tokens=0)
    assert (row["sparse_step_share"], row["mlp_density"], row["tokens_per_step"]) == (None, None, None)


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
        pytest.param(
            ["--sides", "dejavu", "dense"],
            "--sides dejavu dense: expected one of stock vLLM (dense, w8a8, w8a8-fp8, w4a16), then ours",
            id="sides",
        ),
    ],
)
def test_refusals(cpu, capsys, arguments, message):
    with pytest.raises(SystemExit) as failed:
        parse(*arguments)
    assert failed.value.code == 2 and message in capsys.readouterr().err


def test_sides_differ_in_the_model_alone(cpu):
    args = parse("--predictor", "P", "--", "--max-num-seqs", "5", "--tensor-parallel-size=2")
    shape = serve_server.shape_of(args.model)
    dense, ours = (serve_server.server_options(args, shape, side) for side in ("dense", "dejavu"))
    assert value_of(dense, "--model-impl") == "vllm" and value_of(ours, "--model-impl") == "dejavu"
    assert json.loads(value_of(ours, "--additional-config")) == {
        "dejavu": {"mode": "sparse", "predictor": "P"}
    }
    at = ours.index("--additional-config")
    assert [o for o in dense if o != "vllm"] == [o for o in ours[:at] + ours[at + 2 :] if o != "dejavu"]
    assert "--no-enable-prefix-caching" in dense and "--enforce-eager" not in dense
    assert value_of(dense, "--max-num-seqs") == "5" and dense[-1] == "--tensor-parallel-size=2", (
        "options behind -- come last"
    )
    # 64 requests of 2 blocks and vLLM's own, keys and values in bfloat16
    assert value_of(dense, "--kv-cache-memory-bytes") == str((64 * 2 + 2) * 128 * 2 * 256 * 2 * 6)
    assert value_of(dense, "--max-model-len") == str(128 + 64 + 16)


def test_a_side_of_a_quantized_checkpoint(cpu, tmp_path):
    args = parse("--sides", "w8a8-fp8", "dejavu-int8", "--predictor", "P", "--work", str(tmp_path))
    shape = serve_server.shape_of(args.model)
    stock, ours = (
        serve_server.make_server(args, shape, side, tmp_path / f"{side}.log").command for side in args.sides
    )
    copy = tmp_path / "opt-books-7m-w8a8"
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert str(copy) in stock and value_of(stock, "--kv-cache-dtype") == "fp8"
    # one name for the client, whatever directory
    assert value_of(stock, "--served-model-name") == str(args.model)
    assert str(args.model) in ours and "--served-model-name" not in ours
    assert json.loads(value_of(ours, "--additional-config")) == {
        "dejavu": {"mode": "sparse", "weight_bits": 8, "predictor": "P"}
    }


def test_requests_must_fit_the_model(cpu):
    args = parse("--input-len", "480", "--output-len", "32")
    shape = serve_server.shape_of(args.model)
    assert serve_server.length_of(args, shape) == 512
    with pytest.raises(
        ValueError,
        match="--input-len 481 and --output-len 32 make 513 tokens; opt-books-7m has 512 positions",
    ):
        serve_server.length_of(parse("--input-len", "481", "--output-len", "32"), shape)


def test_threads_are_vllms_own_or_the_users(cpu, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    args = parse()
    shape = serve_server.shape_of(args.model)
    env = serve_server.make_server(args, shape, "dense", tmp_path / "log").env
    assert (
        "OMP_NUM_THREADS" not in env
        and env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
        and env["VLLM_SERVER_DEV_MODE"] == "1"
    )
    dry = serve_server.make_server(parse("--dry-run"), shape, "dense", tmp_path / "log").env
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
        json.loads(serve_client.write_prompts(args, repeat, tmp_path).read_text(encoding="utf-8"))
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
    before, found, after = sum(os.times()[:2]), serve_server.cpu_s(os.getpid()), sum(os.times()[:2])
    assert 0 < before - tick <= found <= after + tick
    assert serve_server.cpu_s(2**30) == 0


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
    monkeypatch.setattr(serve_server.Others, "_now", staticmethod(lambda: next(times)))
    monkeypatch.setattr(serve_server.os, "times", lambda: next(children))
    monkeypatch.setattr(serve_server, "cpu_s", lambda process: next(spent))
    neighbours = serve_server.Neighbours(SimpleNamespace(processes=lambda: [7, 8]))
    assert neighbours.cores() == pytest.approx((18 - 1 - 4 - 9) / 10)


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
    monkeypatch.setattr(serve_client, "CLIENT", client)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ClientError, match=f"(?s){message}"):
        serve_client.run_client([], tmp_path / "result.json", tmp_path / "log", timeout_s)


def test_a_client_gets_its_options_and_no_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    monkeypatch.setattr(
        serve_client,
        "CLIENT",
        "import json, os, sys; json.dump([sys.argv[1:], os.environ['no_proxy']], open(sys.argv[1], 'w'))",
    )
    result = tmp_path / "result.json"
    assert serve_client.run_client(
        [str(result), "--seed", "1"], result, tmp_path / "log", timeout_s=HANG_S
    ) == [[str(result), "--seed", "1"], "127.0.0.1"]
