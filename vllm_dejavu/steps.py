"""The one predicate: whether a forward pass, and in it a gated block, runs sparse.

Decided on the host, when an op is called or captured, from what a captured graph cannot change.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context


@dataclass
class Step:
    """How the current forward pass runs.

    Attributes:
        reason: "sparse", or why it is dense (metrics.STEP_REASONS).
        metadata: attention metadata of the layer asked about.
        in_graph: whether this pass is captured in a CUDA graph or replayed from one: what Python does in it
            is done once.
    """

    reason: str
    metadata: Any
    in_graph: bool = False

    def __post_init__(self) -> None:
        self.sparse = self.reason == "sparse"
        self._row_lens: torch.Tensor | None = None
        self.decided: dict[Any, bool] = {}  # once for this pass, by whom it concerns

    @property
    def one_token_each(self) -> bool:
        """Whether every request adds one token, so that a row is a sequence."""
        return self.metadata.max_query_len == 1

    @functools.cached_property
    def cached_tokens(self) -> int:
        """Of all sequences together, as the host knows them: on a CPU."""
        return int(self.metadata.seq_lens[: self.metadata.num_actual_tokens].sum())

    def row_lens(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """[num_tokens], int32: 0 for rows that only pad the batch. vLLM's own buffer wherever that has the
        rows.

        On a CPU made once a pass, whose ops ask several times a layer, always for as many tokens. Not on a
        GPU: what is captured in a graph may only read what was made in it.
        """
        if device.type != "cpu":
            return self._make_row_lens(num_tokens, device)
        if self._row_lens is None or self._row_lens.shape[0] != num_tokens:
            self._row_lens = self._make_row_lens(num_tokens, device)
        return self._row_lens

    def _make_row_lens(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        if not self.one_token_each:
            return (torch.arange(num_tokens, device=device) < self.metadata.num_actual_tokens).int()
        seq_lens = self.metadata.seq_lens[:num_tokens]
        missing = num_tokens - seq_lens.shape[0]
        return torch.nn.functional.pad(seq_lens, (0, missing)) if missing else seq_lens

    def has_sequences(self, num_tokens: int) -> bool:
        """Whether rows are sequences, all of which the metadata knows: what paged attention reads the
        cache by.
        """
        return self.one_token_each and self.metadata.seq_lens.shape[0] >= num_tokens


def current_step(attention_name: str, apply_to: str) -> Step | None:
    """How this forward pass runs, seen from a layer's attention.

    FULL decode graphs are captured with exactly max_query_len == 1; PIECEWISE graphs are replayed for any
    batch and stay dense.

    Returns:
        None in a pass without metadata (memory profiling, dummy batches): dense and not counted.
    """
    context: ForwardContext = get_forward_context()
    if context.attn_metadata is None:
        return None
    if not isinstance(context.attn_metadata, dict):
        return Step("microbatched", None)
    metadata = context.attn_metadata.get(attention_name)
    if metadata is None:
        return None
    steps = context.additional_kwargs.setdefault(
        __name__, {}
    )  # of this pass, by metadata, which layers share
    step = steps.get(id(metadata))
    if step is None:
        if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE:
            reason = "piecewise_graph"
        else:
            reason = "sparse" if apply_to == "all" or metadata.max_query_len == 1 else "prefill_or_mixed"
        # vLLM's second model runner says NONE while it captures full graphs.
        in_graph = context.cudagraph_runtime_mode != CUDAGraphMode.NONE or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        )
        step = steps[id(metadata)] = Step(reason, metadata, in_graph)
    return step
