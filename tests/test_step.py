"""The predicate on made-up forward contexts: which steps run sparse, and which of their rows hold a token."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode

from vllm_dejavu import steps

EAGER, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
CPU = torch.device("cpu")


def step_of(monkeypatch, metadata, mode=EAGER, apply_to="decode"):
    context = SimpleNamespace(attn_metadata=metadata, cudagraph_runtime_mode=mode, additional_kwargs={})
    monkeypatch.setattr(steps, "get_forward_context", lambda: context)
    step = steps.current_step("layer", apply_to)
    assert (
        steps.current_step("layer", apply_to) is step or step is None or step.metadata is None
    )  # once a pass
    return step


@pytest.mark.parametrize(
    ("mode", "apply_to", "max_query_len", "reason"),
    [
        (EAGER, "decode", 1, "sparse"),
        (EAGER, "decode", 2, "prefill_or_mixed"),
        (EAGER, "all", 2, "sparse"),
        (FULL, "decode", 1, "sparse"),
        (PIECEWISE, "decode", 1, "piecewise_graph"),
        (PIECEWISE, "all", 2, "piecewise_graph"),
    ],
)
def test_reasons(mode, apply_to, max_query_len, reason, monkeypatch):
    """A PIECEWISE graph is replayed for any batch, so what was captured in it must be dense."""
    step = step_of(monkeypatch, {"layer": SimpleNamespace(max_query_len=max_query_len)}, mode, apply_to)
    assert (step.reason, step.sparse, step.in_graph) == (reason, reason == "sparse", mode != EAGER)


def test_passes_without_metadata_and_microbatches(monkeypatch):
    assert step_of(monkeypatch, None) is None and step_of(monkeypatch, {}) is None
    assert step_of(monkeypatch, [{}, {}]).reason == "microbatched"


def test_rows_that_hold_a_token():
    decode = SimpleNamespace(
        max_query_len=1, seq_lens=torch.tensor([5, 3], dtype=torch.int32), num_actual_tokens=2
    )
    mixed = SimpleNamespace(
        max_query_len=4, seq_lens=torch.tensor([5, 3], dtype=torch.int32), num_actual_tokens=5
    )
    step = steps.Step("sparse", decode)
    for num_tokens, expected in ((2, [5, 3]), (1, [5]), (4, [5, 3, 0, 0])):  # another number: made again
        assert (
            step.row_lens(num_tokens, CPU).tolist() == expected
            and step.row_lens(num_tokens, CPU).dtype == torch.int32
        )
    assert steps.Step("sparse", mixed).row_lens(7, CPU).tolist() == [1, 1, 1, 1, 1, 0, 0]
