"""benchmarks/profile_cpu.py: every millisecond of a step is somewhere, once; no time is asserted."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = str(Path(__file__).resolve().parent.parent / "benchmarks")


@pytest.fixture()
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("profile_cpu", None)
    import profile_cpu

    return profile_cpu


def event(ms, count=2):
    return SimpleNamespace(self_cpu_time_total=1e3 * ms, count=count)


EVENTS = {
    "dejavu_cpu::sparse_mlp": event(40),
    "_C::cpu_attention_with_kv_cache": event(20),
    "dejavu::python_mlp": event(4),
    "aten::view": event(0.05),
    "aten::empty": event(0.04),
}


def test_shares_sum_to_the_wall_clock(bench):
    rows = bench.rows_of(EVENTS, wall=100.0, plain=45.0, steps=2)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["ms"] for row in rows) == pytest.approx(50)
    found = {row["operator"]: row for row in rows}
    assert found["dejavu_cpu::sparse_mlp"]["ms"] == 20 and found["dejavu_cpu::sparse_mlp"]["calls"] == 1
    assert found["(others)"]["ms"] == pytest.approx(0.045)  # below a thousandth of the wall clock each
    assert found["(outside)"]["share"] == pytest.approx(1 - 0.6409)
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)


class Requests:
    """An engine that reads all prompts in two steps, and gives a token a step."""

    def __init__(self, count, tokens):
        self.left, self.steps = dict.fromkeys(count, tokens), 0
        self.llm_engine = self

    def has_unfinished_requests(self):
        return bool(self.left)

    def step(self):
        self.steps += 1
        ready = list(self.left)[:1] if self.steps == 1 else list(self.left)
        for request in ready:
            self.left[request] -= 1
            if not self.left[request]:
                del self.left[request]
        return [SimpleNamespace(request_id=request) for request in ready]


def test_requests_at_once_are_two_phases(bench, monkeypatch):
    """Until the last one's first token, and the rest."""
    monkeypatch.setattr(bench, "prompts_of", lambda spec, batch, context: [[1] * context] * batch)
    monkeypatch.setattr(bench, "start_requests", lambda llm, prompts, tokens, spec: ["a", "b", "c"])
    events = []
    profiles = [
        SimpleNamespace(
            start=lambda i=i: events.append(("start", i)), stop=lambda i=i: events.append(("stop", i))
        )
        for i in range(2)
    ]
    found = bench.answer(Requests("abc", 5), 3, 16, 5, {}, profiles)
    assert [steps for steps, _ in found] == [2, 4], "a is one token ahead, b and c need four more"
    assert events == [("start", 0), ("stop", 0), ("start", 1), ("stop", 1)]


def test_kinds(bench):
    rows = bench.rows_of(EVENTS, wall=100.0, plain=45.0, steps=2)
    kinds = {row["kind"]: row for row in bench.by_kind([{"side": "dejavu", **row} for row in rows])}
    assert kinds["attention"]["share"] == pytest.approx(0.2)
    assert kinds["host of our operators"]["ms"] == 2
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
    names = {
        "dejavu_cpu::dense_mlp": "MLP",
        "dejavu_cpu::transposed_out_proj": "projections",
        "_C::onednn_scaled_mm": "linears",
        "_C::dynamic_scaled_int8_quant": "rounding of inputs",
        "vllm::unified_attention_with_output": "host of vLLM's operators",
        "dejavu_cpu::mlp": "host of our operators",
        "aten::add": "other operators",
    }
    assert {name: bench.kind_of(name) for name in names} == names
