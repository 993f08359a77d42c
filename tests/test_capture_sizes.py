"""The largest batch of decoding requests gets a CUDA graph of its own, or a warning says that it will run
dense.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from vllm_dejavu import engine, steps
from vllm_dejavu.config import DejaVuConfig
from vllm_dejavu.kernels import cpu


@pytest.fixture
def heard(caplog, monkeypatch):
    """What our logger says, whatever vLLM has made of loggers in this process."""
    for name in ("vllm", "vllm.dejavu"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm.dejavu"):
        yield caplog


def sizes_after(sizes, max_num_seqs, mode=CUDAGraphMode.FULL_AND_PIECEWISE):
    compilation = SimpleNamespace(cudagraph_capture_sizes=list(sizes), cudagraph_mode=mode)
    engine.add_capture_size(
        SimpleNamespace(
            compilation_config=compilation, scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs)
        )
    )
    return compilation.cudagraph_capture_sizes


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY])
def test_max_num_seqs_is_captured(mode, heard):
    """vLLM captures [.., 96, 104, ..] but full decode graphs only up to max_num_seqs: 97 to 100 requests
    would run piecewise.
    """
    assert sizes_after([1, 2, 4, 8, 96, 104, 200], 100, mode) == [1, 2, 4, 8, 96, 100, 104, 200]
    assert sizes_after([1, 2, 4, 8], 8, mode) == [1, 2, 4, 8]
    assert not heard.records


@pytest.mark.parametrize(
    ("max_num_seqs", "mode", "warning"),
    [
        pytest.param(
            1024,
            CUDAGraphMode.FULL_AND_PIECEWISE,
            "more than 8 requests run without a graph",
            id="beyond_the_largest",
        ),
        pytest.param(
            6,
            CUDAGraphMode.PIECEWISE,
            "PIECEWISE replays decode steps in piecewise graphs, which run dense",
            id="piecewise",
        ),
    ],
)
def test_what_cannot_be_captured_is_said(max_num_seqs, mode, warning, heard):
    assert sizes_after([1, 4, 8], max_num_seqs, mode) == [1, 4, 8]
    assert warning in heard.text


def test_without_graphs_nothing_happens():
    assert sizes_after([], 7) == []
    assert sizes_after([1, 8], 7, CUDAGraphMode.NONE) == [1, 8]


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
@pytest.mark.parametrize("given", [None, {"other": 1}, {"other": 1, "dejavu": {"seed": 3}}], ids=str)
def test_what_is_settled_joins_what_was_given(monkeypatch, given, native):
    """The digest of the artifact and whether ops are native, for the compile cache's key; where it lies."""
    monkeypatch.setattr(cpu, "available", lambda: native)
    config = SimpleNamespace(
        additional_config=given,
        parallel_config=SimpleNamespace(worker_extension_cls="theirs"),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        compilation_config=SimpleNamespace(),
    )
    settings = DejaVuConfig(predictor="there")
    engine.update_engine(config, settings, "abc")
    digest = "abc native" if native and current_platform.is_cpu() else "abc"
    own = (given or {}).get("dejavu", {}) | {"artifact_digest": digest, "predictor": "there"}
    assert config.additional_config == (given or {}) | {"dejavu": own}


@pytest.mark.parametrize(
    ("mode", "capturing", "expected"),
    [(CUDAGraphMode.NONE, False, False), (CUDAGraphMode.FULL, False, True), (CUDAGraphMode.NONE, True, True)],
    ids=["eager", "replayed", "captured-by-the-second-runner"],
)
def test_a_step_knows_that_it_is_captured(monkeypatch, mode, capturing, expected):
    """Bug: vLLM's second model runner captures full graphs in mode NONE; steps took themselves for eager."""
    metadata = SimpleNamespace(max_query_len=1)
    context = SimpleNamespace(
        attn_metadata={"attn": metadata}, additional_kwargs={}, cudagraph_runtime_mode=mode
    )
    monkeypatch.setattr(steps, "get_forward_context", lambda: context)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    step = steps.current_step("attn", "decode")
    assert step.sparse and step.in_graph == expected
