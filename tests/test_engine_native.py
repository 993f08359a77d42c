"""The native ops run a step as Python's ops do, bit by bit, and without them."""

from __future__ import annotations

import pytest
import torch
from engine import engine, metrics_of, model_of, random_prompt, run_requests

from vllm_dejavu import native
from vllm_dejavu.attention import GatedAttention
from vllm_dejavu.compat import key_and_value_cache
from vllm_dejavu.kernels import cpu
from vllm_dejavu.mlp import GatedMLP
from vllm_dejavu.models import base
from vllm_dejavu.recall import SAMPLED_ROWS

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.MISSING)
LAYERS, NAN = 3, float("nan")
# One that decodes alone, three together, prompts that arrive in between, so that steps are mixed; one of them
# long enough for recall to be sampled.
ARRIVALS = {0: {"a": random_prompt(9)}, 4: {"b": random_prompt(80, 1), "c": random_prompt(5)}}
DENSE_FROM_TWO_ON = {
    "attention": "previous",
    "union_density": {"1": {"mean": 0.1, "upper": 0.1}, "2": {"mean": 0.9, "upper": 0.9}},
}
CASES = {
    "alone": {},
    "recall": {"artifact": {"attention": "previous"}, "dejavu": {"sample_recall": 2}},
    "riding": {"artifact": {"attention": "previous"}},
    "bf16": {"artifact": {"attention": "previous"}, "options": {"dtype": "bfloat16"}},
    "int8": {"artifact": {"dtype": "int8"}, "dejavu": {"weight_bits": 8}},
    "compiled": {"artifact": {"attention": "previous"}, "options": {"enforce_eager": False}},
    "rows-of-their-own": {"dejavu": {"row_exact": True}},
    "prompts-too": {"dejavu": {"apply_to": "all"}},
    "prompts-too-in-pieces": {
        "dejavu": {"apply_to": "all"},
        "options": {"max_num_batched_tokens": 16, "enable_prefix_caching": True},
    },
    "layers-without-gates": {"artifact": {"attention": "previous", "dense_layers": (1,)}},
    "mlp-alone": {"dejavu": {"blocks": ["mlp"]}},
    "attention-alone": {"dejavu": {"blocks": ["attention"]}},
    "dense-from-two-on": {"artifact": DENSE_FROM_TWO_ON, "dejavu": {"crossover": 0.5}},
    "selected-cache": {"artifact": {"attention": "previous"}, "dejavu": {"cache_crossover": 0}},
    "selected-cache-dense-projections": {
        "artifact": DENSE_FROM_TWO_ON,
        "dejavu": {"crossover": 0.5, "cache_crossover": 0},
    },
    "selected-cache-in-fp8": {
        "artifact": {"attention": "previous"},
        "dejavu": {"cache_crossover": 0},
        "options": {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
    },
}


def served(model, artifact, monkeypatch, *, natively, dejavu, options):
    """Logits of every step, tokens, counts, those of each gate, and how often Python ran a block."""
    calls = {GatedMLP: 0, GatedAttention: 0}

    def counted(cls):
        run = cls.run

        def counting(self, *args):
            calls[cls] += 1
            return run(self, *args)

        return counting

    with monkeypatch.context() as patch:
        for cls in calls:
            patch.setattr(cls, "run", counted(cls))
        if not natively:
            patch.setattr(base, "native_blocks", lambda *_: None)
        with engine(model, dejavu={"predictor": artifact, **dejavu}, **options) as llm:
            assert (model_of(llm).native is not None) == natively
            if not natively and "cache_crossover" in dejavu:  # which Python cannot, and then selects likewise
                for gate in model_of(llm).gates:
                    gate.least_cached = dejavu["cache_crossover"] if gate.block == "attention" else None
            metrics_of(llm, reset=True)
            calls.update(dict.fromkeys(calls, 0))
            compute, logits = model_of(llm).compute_logits, []
            model_of(llm).compute_logits = lambda states: logits.append(compute(states)) or logits[-1].clone()
            tokens = run_requests(llm, ARRIVALS, 12)
            raw = llm.collective_rpc("dejavu_metrics")[0]["gates"]
            return logits, tokens, metrics_of(llm), raw, calls


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_python_runs_it(opt, predictors, monkeypatch, case):
    model = opt(layers=LAYERS)
    artifact = predictors(model, **case.get("artifact", {}))
    options = {"dejavu": case.get("dejavu", {}), "options": case.get("options", {})}
    logits, tokens, counts, raw, calls = served(model, artifact, monkeypatch, natively=True, **options)
    expected, expected_tokens, expected_counts, expected_raw, python = served(
        model, artifact, monkeypatch, natively=False, **options
    )
    assert tokens == expected_tokens and len(logits) == len(expected)
    for a, b in zip(logits, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert counts["steps"] == expected_counts["steps"] and counts["steps"]["sparse"] > 0
    assert all(counts[key] == expected_counts[key] for key in ("mlp_density", "head_density"))
    held, read = (sum(gate.pop(key) for gate in raw) for key in ("cache_held", "cache_read"))
    assert held == sum(gate.pop("cache_held") for gate in expected_raw)
    assert held == sum(gate.pop("cache_read") for gate in expected_raw), "Python reads all"
    assert read < held if "cache_crossover" in case.get("dejavu", {}) else read == held
    assert raw == expected_raw
    for cls, block in ((GatedMLP, "mlp"), (GatedAttention, "attention")):
        gates = [gate for gate in raw if gate["block"] == block]
        sampled = sum(gate["sampled_rows"] for gate in gates) // SAMPLED_ROWS
        assert calls[cls] == sampled, f"{cls.__name__} ran in Python"
        assert python[cls] == len(gates) * sum(counts["steps"].values())
        assert sampled or case is not CASES["recall"]


@pytest.mark.parametrize("cache", ["auto", "fp8"])
@pytest.mark.parametrize("crossover", [1.0, 0.5], ids=["sparse-projections", "dense-projections"])
def test_nothing_is_read_of_the_other_heads_cache(opt, predictors, monkeypatch, crossover, cache):
    """Their keys and values are NaN from the first decode step on, behind a prompt of 300 tokens."""
    model = opt(layers=LAYERS, hidden=128, heads=4, positions=512)
    artifact = predictors(model, **DENSE_FROM_TWO_ON)
    requests = {0: {"a": random_prompt(300), "b": random_prompt(270, 1)}}
    begin = native.NativeBlocks.begin
    chosen = [1, 2]  # by every row
    others = [h for h in range(4) if h not in chosen]

    def run(poison):
        poisoned = []

        def poisoning(self, step, num_tokens):
            begin(self, step, num_tokens)
            if poison and not poisoned and step is not None and step.sparse:
                for attention in self.attentions.values():
                    memory = attention.attn.kv_cache[:, others]
                    # in fp8 a byte of ones is NaN
                    attention.attn.kv_cache[:, others] = memory.new_full((), 255 if cache == "fp8" else NAN)
                    poisoned.append(attention)

        monkeypatch.setattr(native.NativeBlocks, "begin", poisoning)
        settings = {"predictor": artifact, "cache_crossover": 0, "crossover": crossover}
        with engine(model, dejavu=settings, kv_cache_dtype=cache, max_model_len=512) as llm:
            for gate in model_of(llm).gates:
                if gate.block == "attention":
                    gate.predictor.bias.fill_(-1e9)
                    gate.predictor.bias[chosen] = 1e9
            compute, logits = model_of(llm).compute_logits, []
            model_of(llm).compute_logits = lambda states: logits.append(compute(states)) or logits[-1].clone()
            tokens = run_requests(llm, requests, 12)
            assert len(poisoned) == (LAYERS if poison else 0)
            counts = [layer["attention"] for layer in metrics_of(llm)["layers"]]
            assert {c["cache_density"] for c in counts} == {c["density"] for c in counts} == {0.5}
            assert {c["read_density"] for c in counts} == {0.5 if crossover == 1 else 1.0}
            return tokens, torch.cat(logits)

    (tokens, logits), (expected, expected_logits) = run(True), run(False)
    assert tokens == expected and torch.equal(logits, expected_logits) and logits.isfinite().all()


def test_python_attends_where_one_layer_s_cache_is_another(opt, predictors, monkeypatch):
    """In all layers: what a pass is told is for all of them."""
    model = opt(layers=LAYERS)
    artifact = predictors(model, attention="previous")
    seen = []

    def last_is_another(*args):
        seen.append(args)
        return key_and_value_cache(*args) if len(seen) % LAYERS else None

    monkeypatch.setattr(native, "key_and_value_cache", last_is_another)
    options = {"dejavu": {}, "options": {}}
    logits, _, counts, raw, calls = served(model, artifact, monkeypatch, natively=True, **options)
    expected, _, _, expected_raw, python = served(model, artifact, monkeypatch, natively=False, **options)
    assert len(seen) == LAYERS and calls == {GatedMLP: 0, GatedAttention: python[GatedAttention]}
    assert raw == expected_raw and counts["steps"]["sparse"] > 0
    assert all(map(torch.equal, logits, expected))


def test_a_recorder_is_served_by_python(opt, predictors):
    """Which sees every selection, from the step on in which it comes."""
    model = opt(layers=LAYERS)
    seen = []
    with engine(model, dejavu={"predictor": predictors(model)}) as llm:
        model_of(llm).set_recorder(lambda layer, block, mask, valid: seen.append((layer, block, mask)))
        run_requests(llm, {0: {"a": random_prompt(9)}}, 4)
        model_of(llm).set_recorder(None)
        several = len(seen)
        run_requests(llm, {0: {"b": random_prompt(9)}}, 4)
    assert sum(mask is not None for *_, mask in seen) == 3 * 2 * LAYERS and len(seen) == several


def test_a_recorder_of_one_gate_is_enough(opt, predictors):
    model = opt(layers=LAYERS)
    seen = []
    with engine(model, dejavu={"predictor": predictors(model)}) as llm:
        model_of(llm).native.gates[-1].recorder = lambda layer, block, mask, valid: seen.append(mask)
        run_requests(llm, {0: {"a": random_prompt(9)}}, 4)
    assert sum(mask is not None for mask in seen) == 3


def test_controls_and_measurements_are_python_s(opt, predictors):
    model = opt(layers=LAYERS)
    for settings in ({"mode": "oracle"}, {"mode": "random"}, {"measure": True}):
        with engine(model, dejavu={"predictor": predictors(model), **settings}) as llm:
            assert model_of(llm).native is None
            run_requests(llm, {0: {"a": random_prompt(9)}}, 4)
            assert metrics_of(llm)["steps"]["sparse"] > 0


def test_a_block_outside_of_a_forward_pass_is_an_error():
    x = torch.zeros(1, 8)
    with pytest.raises(RuntimeError, match="outside of its model's forward pass"):
        torch.ops.dejavu_cpu.mlp(x, x, torch.zeros(1, dtype=torch.int64), None, 0, 0)


def test_a_cache_laid_out_otherwise_is_python_s():
    cache = torch.arange(5.0 * 2 * 3 * 8).view(5, 2, 3, 8)
    key, value = key_and_value_cache(cache, kv_heads=2, head_size=4)
    assert key.shape == value.shape == (5, 2, 3, 4)
    whole = cache.view(5, 2, 6, 4)
    assert torch.equal(key, whole[:, :, :3]) and torch.equal(value, whole[:, :, 3:])
    assert key.data_ptr() == cache.data_ptr()
    for other in (cache[0], cache[None], cache.transpose(1, 2), cache.transpose(2, 3)):
        assert key_and_value_cache(other, kv_heads=2, head_size=4) is None
