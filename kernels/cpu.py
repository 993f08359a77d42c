"""The native CPU implementation (csrc/): the functions of `reference` that run on every sparse step, with the
same signatures.

The extension is built by setup.py; where there was no compiler it is missing and `reference` runs instead.
Which instruction set its kernels use is decided when they first run; VLLM_DEJAVU_CPU_ISA names another one
(`isas`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

# What only controls and measurements need; the paged kernel has no CPU form, as vLLM's CPU cache is packed by
# its own rules.
from vllm_dejavu.kernels.reference import (
    ACTIVATIONS,
    LARGEST_BATCH,
    compact_union,
    mlp_activations,
    paged_attention,
    select,
)

__all__ = [
    "ACTIVATIONS",
    "CROSSOVERS",
    "LARGEST_BATCH",
    "compact_union",
    "count_dense",
    "dense_mlp",
    "describe",
    "linear",
    "mask_heads",
    "mlp_activations",
    "paged_attention",
    "prepare_weight",
    "score_heads",
    "select",
    "select_neurons",
    "sparse_mlp",
    "sparse_out_proj",
    "sparse_qkv",
]

# {block: {hidden size: {tokens: union density}}} at which sparse and dense take equally long, prediction
# included, on one CPU (AMD Zen 4, 2 cores, bf16, layers of OPT-125M and OPT-1.3B;
# benchmarks/results/cpu/kernels-*.csv, of neighbouring batch sizes the lowest). 0.5 is the lowest density of
# heads that was measured. Sizes in between take the next smaller one. OPT-125M's from 16 tokens on are lower
# than the layers alone say: its whole steps took 0.90x of dense's speed at 0.39
# (benchmarks/results/cpu/README.md).
CROSSOVERS = {
    "mlp": {768: {1: 0.91, 4: 0.69, 8: 0.64, 16: 0.35}, 2048: {1: 0.92, 4: 0.9, 32: 0.79}},
    "attention": {768: {1: 0.71, 4: 0.5}, 2048: {2: 0.83}},
}
MISSING = (
    "The native CPU kernels are not built, so the PyTorch reference runs, which is slow: install vllm-dejavu"
    " again with a C++ compiler, PyTorch and ninja in place (pip install --no-build-isolation)."
)
LIBRARY = Path(__file__).with_name("_cpu.so")


@functools.cache
def available() -> bool:
    """Whether the extension is there; loads it.

    Raises:
        RuntimeError: it is there but cannot be loaded, which means that it was built for another PyTorch.
    """
    if not LIBRARY.exists():
        return False
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as e:
        raise RuntimeError(
            f"The native CPU kernels {LIBRARY} cannot be loaded with torch {torch.__version__}: {e}. They"
            " were built for another version: install vllm-dejavu again (pip install --no-build-isolation),"
            " or delete that file to run the slow PyTorch reference."
        ) from None
    return True


def isas() -> list[str]:
    """Instruction sets that this CPU and build have, best first."""
    return torch.ops.dejavu_cpu.isas()


def isa() -> str:
    """The instruction set in use."""
    return torch.ops.dejavu_cpu.isa()


def use_isa(name: str) -> None:
    """Use another instruction set from now on, in every thread; "" is the best one."""
    torch.ops.dejavu_cpu.use_isa(name)


def describe() -> str:
    return f"native CPU kernels ({isa()})"


def prepare_weight(weight: torch.Tensor) -> None:
    """Ask for huge pages: rows of a list lie pages apart, and with small ones address translation limits how
    fast they are read.
    """
    torch.ops.dejavu_cpu.use_huge_pages(weight)


def count_dense(
    counters: torch.Tensor, once: torch.Tensor, per_row: torch.Tensor, row_lens: torch.Tensor
) -> None:
    torch.ops.dejavu_cpu.count_dense(counters, once, per_row, row_lens)


def score_heads(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, row_lens: torch.Tensor, workspace: Any = None
) -> torch.Tensor:
    return torch.ops.dejavu_cpu.score_heads(x, weight, bias, row_lens)


def select_neurons(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor,
    row_lens: torch.Tensor,
    with_row_mask: bool = False,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    counters: torch.Tensor | None = None,
    workspace: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    ids, counts, mask, scores = torch.ops.dejavu_cpu.select_neurons(
        x, down, up, bias, row_lens, with_row_mask, *(heads or (None, None, None)), counters
    )
    return ids, counts, mask, None if heads is None else scores


def sparse_mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight_t: torch.Tensor,
    neuron_ids: torch.Tensor,
    counts: torch.Tensor,
    row_lens: torch.Tensor,
    row_mask: torch.Tensor | None = None,
    activation: str = "relu",
    counters: torch.Tensor | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    _check_activation(activation)
    return torch.ops.dejavu_cpu.sparse_mlp(
        x, fc1_weight, fc1_bias, fc2_weight_t, neuron_ids, counts, row_lens, row_mask, counters
    )


def dense_mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight_t: torch.Tensor,
    activation: str = "relu",
) -> torch.Tensor:
    _check_activation(activation)
    return torch.ops.dejavu_cpu.dense_mlp(x, fc1_weight, fc1_bias, fc2_weight_t)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    if output is None:
        output = x.new_empty(x.shape[0], weight.shape[0])
    torch.ops.dejavu_cpu.linear(x, weight, bias, output)
    return output


def sparse_qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head_scores: torch.Tensor,
    row_lens: torch.Tensor,
    head_size: int,
    counters: torch.Tensor | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    return torch.ops.dejavu_cpu.sparse_qkv(x, weight, bias, head_scores, row_lens, head_size, counters)


def mask_heads(attn: torch.Tensor, head_scores: torch.Tensor) -> torch.Tensor:
    return torch.ops.dejavu_cpu.mask_heads(attn, head_scores)


def sparse_out_proj(
    attn: torch.Tensor,
    weight: torch.Tensor,
    head_scores: torch.Tensor,
    output: torch.Tensor | None = None,
    workspace: Any = None,
) -> torch.Tensor:
    if output is None:
        output = attn.new_empty(attn.shape[0], weight.shape[0])
    torch.ops.dejavu_cpu.sparse_out_proj(attn, weight, head_scores, output)
    return output


def _check_activation(activation: str) -> None:
    if activation != "relu":
        raise ValueError(f"the native CPU kernels know the activation relu, got {activation!r}")
