"""What an engine says of itself while it serves: counters after warm-up, recall on prompts, the dense switch,
Prometheus.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from engine import engine, greedy, metrics_of, model_of, random_prompt
from prometheus_client import REGISTRY
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_dejavu import control, metrics, monitoring, warm_up
from vllm_dejavu.attention import GatedAttention
from vllm_dejavu.recall import LONG_PASS, SAMPLED_ROWS
from vllm_dejavu.selection import head_contributions, head_grams
from vllm_dejavu.steps import Step


def tokens_of(llm, prompt, max_tokens=12):
    return (
        llm.generate({"prompt_token_ids": prompt}, greedy(max_tokens), use_tqdm=False)[0].outputs[0].token_ids
    )


def gate_counts(llm):
    return {(g["layer"], g["block"]): g for g in llm.collective_rpc("dejavu_metrics")[0]["gates"]}


def test_sampled_recall_is_prediction_against_truth(opt, predictors, monkeypatch):
    """Counted from the modules' own inputs, by other code than the ops'."""
    model, length = opt(), 100
    attention_outputs, inputs = {}, {}
    stock_attention = GatedAttention.stock_attention

    def spy(self, *args):
        attn = stock_attention(self, *args)
        attention_outputs.setdefault(self.gate.layer, attn.clone())
        return attn

    monkeypatch.setattr(GatedAttention, "stock_attention", spy)
    with engine(model, dejavu={"predictor": predictors(model), "sample_recall": 1}) as llm:
        attention_outputs.clear()  # of warm-up, in vLLM 0.26
        layers = list(model_of(llm).model.decoder.local_layers())
        for i, layer in enumerate(layers):
            for block, module in (("mlp", layer.mlp), ("attention", layer.self_attn)):
                module.register_forward_pre_hook(
                    lambda _, args, key=(i, block): inputs.setdefault(key, args[0].clone()) is None or None
                )
        tokens_of(llm, random_prompt(length), max_tokens=4)
        counted = gate_counts(llm)
        rows = [i * length // SAMPLED_ROWS for i in range(SAMPLED_ROWS)]
        for i, layer in enumerate(layers):
            for block, module in (("mlp", layer.mlp), ("attention", layer.self_attn)):
                x = inputs[i, block][rows]
                chosen = module.gate.predictor.scores(x) > 0
                if block == "mlp":
                    active = torch.relu(x @ module.fc1.weight.t() + module.fc1.bias) > 0
                else:
                    grams = head_grams(module.out_proj.weight, module.units)
                    active = head_contributions(attention_outputs[i][rows], grams) > module.threshold
                expected = [SAMPLED_ROWS, int(chosen.sum()), int(active.sum()), int((chosen & active).sum())]
                assert [
                    counted[i, block][f"sampled_{n}"] for n in ("rows", "selected", "active", "hit")
                ] == expected
                assert counted[i, block]["active"] == 0, "counts of sparse steps are not touched"
        summary = metrics_of(llm)["layers"][1]["mlp"]
        assert 0 < summary["sampled_recall"] < 1 and 0 < summary["sampled_density"] < 1


@pytest.mark.parametrize(
    ("settings", "lengths", "samples"),
    [
        ({"sample_recall": 0}, [100] * 3, 0),
        ({"sample_recall": 1}, [LONG_PASS - 1] * 3, 0),
        ({"sample_recall": 1}, [LONG_PASS] * 3, 3),
        ({"sample_recall": 3}, [100] * 6, 2),
        ({"sample_recall": 1, "mode": "static"}, [100] * 3, 0),
    ],
    ids=["off", "short", "just-long", "every-third", "control"],
)
def test_which_passes_are_sampled(opt, predictors, settings, lengths, samples):
    model = opt()
    with engine(model, dejavu={"predictor": predictors(model), **settings}) as llm:
        for seed, length in enumerate(lengths):
            tokens_of(llm, random_prompt(length, seed), max_tokens=2)
        assert {g["sampled_rows"] for g in gate_counts(llm).values()} == {samples * SAMPLED_ROWS}


def test_nothing_is_sampled_in_graphs(opt, predictors, monkeypatch):
    """A graph of speculative decoding is dense too: what was captured in it would sample in every replay,
    rows of padding as well.
    """
    model = opt()
    monkeypatch.setattr(Step, "in_graph", property(lambda _: True, lambda *_: None))
    with engine(model, dejavu={"predictor": predictors(model), "sample_recall": 1}) as llm:
        tokens_of(llm, random_prompt(100), max_tokens=2)
        assert {g["sampled_rows"] for g in gate_counts(llm).values()} == {0}


def test_heads_scored_by_the_layer_before_are_sampled_too(opt, predictors):
    model = opt()
    with engine(
        model, dejavu={"predictor": predictors(model, attention="previous"), "sample_recall": 1}
    ) as llm:
        tokens_of(llm, random_prompt(90))
        assert {g["sampled_rows"] for g in gate_counts(llm).values()} == {SAMPLED_ROWS}


def test_dense_switch(opt, predictors):
    """Tokens as dense vLLM's while it is on, also where a cached prefix holds what sparse steps wrote; then
    as before.
    """
    model, prompt = opt(), random_prompt(40)
    with engine(model, impl="vllm") as llm:
        dense = tokens_of(llm, prompt, 40)
    with engine(model, dejavu={"predictor": predictors(model)}, enable_prefix_caching=True) as llm:
        sparse = tokens_of(llm, prompt, 40)
        assert sparse != dense
        for _ in range(2):  # switching on twice must not lose what the predictors said
            control.set_dense(llm)
        summary = metrics_of(llm, reset=True)
        assert summary["dense_switch"] is True
        again = llm.generate({"prompt_token_ids": prompt + list(sparse)}, greedy(1), use_tqdm=False)[0]
        assert again.num_cached_tokens == 0, "what sparse steps wrote must not be found again"
        assert tokens_of(llm, prompt, 40) == dense
        summary = metrics_of(llm, reset=True)
        assert (
            summary["mlp_density"] == 1
            and summary["head_density"] == 1
            and summary["sparse_step_share"] > 0.9
        )
        control.set_dense(llm, False)
        assert tokens_of(llm, prompt, 40) == sparse
        summary = metrics_of(llm)
        assert summary["dense_switch"] is False and summary["mlp_density"] < 0.9


def test_dense_switch_needs_predictors_that_decide(opt, predictors):
    model = opt()
    with engine(model, dejavu={"predictor": predictors(model), "mode": "static"}) as llm:
        with pytest.raises(ValueError, match="needs mode 'sparse', this engine runs in mode 'static'"):
            model_of(llm).set_dense(True)


def test_asynchronous_switch_resets_the_cache_and_says_when_it_could_not():
    calls = []

    class Engine:
        async def collective_rpc(self, method, args):
            calls.append((method, args))

        async def reset_prefix_cache(self, reset_running_requests):
            calls.append(("reset", reset_running_requests))
            return len(calls) < 3

    asyncio.run(control.set_dense_async(Engine(), True))
    assert calls == [("dejavu_set_dense", (True,)), ("reset", True)]
    with pytest.raises(RuntimeError, match="was not reset"):
        asyncio.run(control.set_dense_async(Engine(), False))


@pytest.mark.parametrize("first", [True, False], ids=["first-stage", "later-stage"])
def test_after_warm_up_counts_are_zero_and_later_stages_have_buffers(monkeypatch, first):
    """GPU workers warm up with metadata. On a CPU in eager mode vLLM made no buffers for what the stage
    before sends.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    done = []
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: SimpleNamespace(is_first_rank=first))

    class Worker(WorkerBase):
        def __init__(self, model, **runner):
            self.model_runner = SimpleNamespace(get_model=lambda: model, **runner)

        def compile_or_warm_up_model(self):
            done.append("warm")
            return "seconds"

        def execute_dummy_batch(self):
            done.append("dummy")

    for _ in range(2):  # a second model in the same process wraps nothing twice
        warm_up.complete_warm_up()
    ours = SimpleNamespace(reset_metrics=lambda: done.append("reset"))
    assert Worker(ours, intermediate_tensors=None).compile_or_warm_up_model() == "seconds"
    assert done == (["warm", "reset"] if first else ["warm", "dummy", "reset"])
    for model, buffers in (
        (ours, {"intermediate_tensors": "made"}),
        (ours, {}),
        (object(), {"intermediate_tensors": None}),
    ):
        done.clear()
        assert Worker(model, **buffers).compile_or_warm_up_model() == "seconds" and "dummy" not in done


@pytest.fixture
def exporter():
    unregister_vllm_metrics()
    yield monitoring.Exporter("tiny")
    unregister_vllm_metrics()


def sample(name, engine=0, **labels):
    return REGISTRY.get_sample_value(
        f"vllm:dejavu_{name}", {"model_name": "tiny", "engine": str(engine), **labels}
    )


def summary_of(steps):
    """As far as the exporter looks."""
    return {
        "steps": {"sparse": steps},
        "layers": [],
        "predictor_bytes": 1,
        "dense_switch": False,
        "mode": "sparse",
        "weight_bits": 16,
        "lm_head_bits": 16,
        "artifact": {"digest": "d", "fingerprint_verified": True},
    }


def test_prometheus_metrics_follow_the_counters(opt, predictors, exporter):
    model = opt()
    with engine(model, dejavu={"predictor": predictors(model, dense_layers=(2,)), "sample_recall": 1}) as llm:
        for round_ in (1, 2):
            tokens_of(llm, random_prompt(70), max_tokens=11)
            exporter.update(metrics.summarize(llm.collective_rpc("dejavu_metrics")))
            assert (
                sample("steps_total", reason="sparse") == 10 * round_
                and sample("steps_total", reason="prefill_or_mixed") == round_
            )
        summary = metrics_of(llm, reset=True)
        counts = summary["layers"][1]["mlp"]
        at = {"layer": "1", "block": "mlp"}
        assert (
            sample("selected_units_total", **at) / sample("selectable_units_total", **at)
            == counts["density"]
            < 1
        )
        assert (
            sample("read_units_total", **at) / sample("readable_units_total", **at) == counts["read_density"]
        )
        assert (
            sample("sampled_hit_units_total", **at) / sample("sampled_active_units_total", **at)
            == counts["sampled_recall"]
        )
        assert sample("calibrated_density", **at) == 0.5
        assert sample("selected_units_total", layer="2", block="mlp") is None, "a dense layer selects nothing"
        assert sample("density", block="mlp") == pytest.approx(
            sum(summary["layers"][i]["mlp"]["density"] for i in (0, 1)) / 2
        )
        assert sample("predictor_bytes") == summary["predictor_bytes"] > 0 and sample("dense_switch") == 0
        digest = summary["artifact"]["digest"]
        labels = {"mode": "sparse", "artifact_digest": digest, "fingerprint_verified": "true"}
        assert digest and sample("info", weight_bits="16", lm_head_bits="16", **labels) == 1
        # The counters were reset: a Prometheus counter goes on from where it was.
        tokens_of(llm, random_prompt(70), max_tokens=4)
        exporter.update(metrics.summarize(llm.collective_rpc("dejavu_metrics")))
        assert sample("steps_total", reason="sparse") == 23


def test_counts_are_fetched_when_vllm_logs_and_a_failure_stops_nothing(exporter, monkeypatch):
    from vllm.v1.engine.async_llm import AsyncLLM

    for _ in range(2):
        monitoring.install()
    monkeypatch.setattr(
        monitoring,
        "summarize",
        lambda ranks: summary_of(3) if ranks == ["rank"] else pytest.fail("asked twice"),
    )
    logged = []

    def fake(impl, rpc):
        model_config = SimpleNamespace(model_impl=impl, served_model_name="tiny")
        config = SimpleNamespace(
            model_config=model_config, parallel_config=SimpleNamespace(_api_process_rank=0)
        )
        client = SimpleNamespace(core_engines=[b"\0\0"], engine_ranks_managed=[0])
        return SimpleNamespace(
            vllm_config=config,
            engine_core=client,
            collective_rpc=rpc,
            logger_manager=SimpleNamespace(log=lambda: logged.append(impl)),
        )

    async def rpc(method):
        return ["rank"]

    async def dead(method):
        raise RuntimeError("engine dead")

    for impl, call in (("dejavu", rpc), ("dejavu", dead), ("auto", dead)):
        asyncio.run(AsyncLLM.do_log_stats(fake(impl, call)))
    assert logged == ["dejavu", "dejavu", "auto"] and sample("steps_total", reason="sparse") == 3


def test_data_parallel_engines_are_counted_each(exporter):
    """An engine is named by its rank, and asked itself."""

    async def call(method, *args, engine):
        assert (method, *args) == ("collective_rpc", "dejavu_metrics", None, (), None)
        return [summary_of({b"a": 5, b"b": 7}[engine])]

    client = SimpleNamespace(core_engines=[b"a", b"b"], engine_ranks_managed=[2, 3], _call_utility_async=call)
    found = asyncio.run(monitoring.counts_by_engine(SimpleNamespace(engine_core=client)))
    for rank, (summary,) in found.items():
        exporter.update(summary, rank)
    assert [sample("steps_total", engine=rank, reason="sparse") for rank in (0, 2, 3)] == [None, 5, 7]
