"""The Triton kernels in the real engine: paged attention on vLLM's own block tables, under the interpreter.

A CPU attention backend with the GPU cache layout stands in for FlashAttention; everything else is the engine
as served. The independent replay of test_engine_replay follows every step, so nothing here is compared with
itself.
"""

from __future__ import annotations

import pytest
import torch
from engine import Recorder, engine, metrics_of, model_of, random_prompt, run_requests
from test_engine_replay import TWICE, assert_replayed, first_positions, recomputed_tokens
from vllm.platforms import current_platform
from vllm.v1.attention import selector

from vllm_dejavu import ops
from vllm_dejavu.kernels import interface
from vllm_dejavu.kernels.gpu import KERNELS as TRITON
from vllm_dejavu.kernels.reference import KERNELS as REFERENCE
from vllm_dejavu.kernels.workspace import Workspace

# Small: under the interpreter a sparse step of one layer takes about 0.3 s.
MODEL = {"layers": 2, "tied": False}
ARRIVALS = {
    0: {"a": random_prompt(20), "b": random_prompt(33)},
    2: {"c": random_prompt(7), "d": random_prompt(1)},
}
TOKENS = (
    4  # each: steps of two rows before the others arrive and after they have, and one of all four between
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU stand-in; on a GPU the real backends run"
)


@pytest.fixture
def paged(monkeypatch):
    """use(kernels): the engine's kernels, over a cache in the GPU layout."""
    monkeypatch.setattr(
        type(current_platform),
        "get_attn_backend_cls",
        classmethod(lambda *args, **kwargs: "paged_backend.PagedCpuBackend"),
    )
    selector._cached_get_attn_backend.cache_clear()
    calls = {}

    def use(kernels):
        class Counted(type(kernels)):
            """The kernels, counting what is called."""

            def __getattribute__(self, name):
                calls[name] = calls.get(name, 0) + 1
                return super().__getattribute__(name)

        counted = Counted()
        monkeypatch.setattr(interface, "implementation", lambda device_type: counted)
        return calls

    yield use
    selector._cached_get_attn_backend.cache_clear()


def give_workspace(model):
    """The scratch memory that a model on a GPU allocates for itself."""
    workspace = Workspace.for_model(torch.device("cpu"), torch.float32, num_tokens=4, ffn=640, head_size=80)
    for block in model.modules():
        if getattr(block, "gate", None) is not None:
            block.workspace = workspace


def record(model, artifact, arrivals, max_tokens, dejavu=None, **options):
    """As test_engine_replay.record, with scratch memory as on a GPU.

    A small cache: the interpreter copies every tensor that a kernel is given.
    """
    options = {"num_gpu_blocks_override": 16, **options}
    with engine(model, dejavu={"predictor": artifact, **(dejavu or {})}, **options) as llm:
        give_workspace(model_of(llm))
        with Recorder(llm) as recorder:
            tokens = run_requests(llm, arrivals, max_tokens)
        return recorder.steps, tokens, metrics_of(llm)


@pytest.mark.parametrize(
    ("variant", "gates", "settings"),
    [
        pytest.param({}, {}, {}, id="self", marks=pytest.mark.on_demand),
        pytest.param({}, {"attention": "previous"}, {}, id="heads_ride_along"),
        pytest.param(
            {}, {"mlp": "attn_input", "attention": "previous"}, {"row_exact": True}, id="attn_input_row_exact"
        ),
        pytest.param(
            {"pre_ln": False, "embed_dim": 32},
            {"attention": "previous"},
            {},
            id="post_ln",
            marks=pytest.mark.on_demand,
        ),
        # the kernels themselves meet every head size in test_kernel_triton*.py
        pytest.param({"hidden": 160}, {}, {}, id="head_size_80", marks=pytest.mark.on_demand),
    ],
)
def test_a_request_arriving_midway(variant, gates, settings, paged, opt, predictors):
    """Sparse steps read the cache through the paged kernel; tokens and selections are the replay's, counts
    exact.
    """
    calls = paged(TRITON)
    model = opt(**{**MODEL, **variant})
    artifact = predictors(model, **gates)
    steps, tokens, counted = record(model, artifact, ARRIVALS, TOKENS, settings)
    sparse = sum(s.sparse for s in steps)
    assert calls["paged_attention"] == calls["sparse_out_proj"] == MODEL["layers"] * sparse, (
        "attention did not go through the paged kernel"
    )
    if gates.get("attention") == "previous" and "mlp" not in gates:
        assert calls["score_heads"] == sparse, "only layer 0 has a launch of its own for its heads"
    assert_replayed(
        model, artifact, ARRIVALS, steps, tokens, counted["steps"], row_exact=settings.get("row_exact", False)
    )
    for layer, entry in enumerate(counted["layers"]):
        for block in ("mlp", "attention"):
            if entry[block]["gated"]:
                masks = [s.gates[layer, block][0] for s in steps if s.sparse]
                assert entry[block]["steps"] == sparse
                assert entry[block]["selected"] == sum(int(m.sum()) for m in masks)
                assert entry[block]["read"] == sum(int(m.any(0).sum()) for m in masks)


@pytest.mark.on_demand
def test_preemption_and_prefix_hits(paged, opt, predictors):
    """Blocks change hands: 5 blocks for three growing requests, one of which starts from another's cached
    block.
    """
    paged(TRITON)
    model = opt(**MODEL)
    artifact = predictors(model, attention="previous")
    arrivals = {0: {"a": TWICE[:33], "b": random_prompt(61)}, 2: {"c": TWICE[:32] + random_prompt(3)}}
    steps, tokens, counted = record(
        model, artifact, arrivals, 8, num_gpu_blocks_override=6, max_model_len=96, enable_prefix_caching=True
    )
    assert recomputed_tokens(steps) > 0, "nothing was preempted"
    assert first_positions(steps)["c"] == 32, "the prefix cache was not hit"
    assert_replayed(model, artifact, arrivals, steps, tokens, counted["steps"])


@pytest.mark.on_demand
def test_the_reference_kernels_give_the_same_tokens_over_the_same_cache(paged, opt, predictors):
    """Triton and reference over one layout: equal tokens, equal counts."""
    model = opt(**MODEL)
    artifact = predictors(model)
    results = []
    for module in (TRITON, REFERENCE):
        paged(module)
        _, tokens, counted = record(model, artifact, ARRIVALS, TOKENS)
        results.append((tokens, counted["steps"], counted["layers"]))
    assert results[0] == results[1]


# What a sparse step may dispatch beside the kernels: memory and views of it.
NO_LAUNCH = {
    "empty",
    "empty_strided",
    "new_empty",
    "view",
    "slice",
    "select",
    "alias",
    "detach",
    "_unsafe_view",
    "unsqueeze",
    "transpose",
    "as_strided",
    "expand",
}


def test_a_sparse_layer_takes_seven_launches_of_ours(paged, opt, predictors, monkeypatch):
    """Predict 2 (next layer's heads ride along), fc1, fc2, QKV, attention, out_proj; the ops around them
    launch nothing.

    With vLLM's cache write and two fused additions + LayerNorms these are the 10 of the design.
    """
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    launches, glue, number = [], [], {"step": 0}
    run = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.append((number["step"], self.fn.__name__))
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)

    class Inside(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            glue.append((number["step"], func._schema.name))
            return func(*args, **(kwargs or {}))

    class Outside(TorchDispatchMode):
        """Runs our ops' bodies where `Inside` sees them."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            space, _, name = func._schema.name.partition("::")
            if space != "dejavu":
                return func(*args, **(kwargs or {}))
            with Inside():
                return getattr(ops, f"_{name}")(*args, **(kwargs or {}))

    paged(TRITON)
    model = opt(**{**MODEL, "layers": 3})
    with engine(
        model, dejavu={"predictor": predictors(model, attention="previous")}, num_gpu_blocks_override=16
    ) as llm:
        give_workspace(model_of(llm))
        model_of(llm).register_forward_pre_hook(lambda *_: number.update(step=number["step"] + 1))
        with Outside():
            run_requests(llm, {0: {"a": random_prompt(20), "b": random_prompt(9)}}, 2)
    assert not [n for s, n in launches if s == 1], "the prompts' step is dense"
    mine = [n for s, n in launches if s == 2]
    middle = [
        "_qkv_kernel",
        "_attention_kernel",
        "_out_proj_kernel",
        "_down_kernel",
        "_up_select_kernel",
        "_fc1_kernel",
        "_fc2_kernel",
    ]
    assert mine == ["_down_kernel", *middle * 3], "the first layer scores its own heads"
    assert {n.removeprefix("aten::") for s, n in glue if s == 2} <= NO_LAUNCH
