"""The native CPU implementation (csrc/) of what runs on every sparse step.

The extension is built by setup.py; where there was no compiler it is missing and `reference` runs instead.
Which instruction set its kernels use is decided when they first run; VLLM_DEJAVU_CPU_ISA names another one
(`isas`).
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from vllm_dejavu.kernels import reference, tables
from vllm_dejavu.kernels.interface import Call, Kernels, Linear, LowRank, Mlp, Rider, Rows, Selection

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


class NativeKernels(Kernels):
    """What only controls and measurements need is the reference's; attention over a paged cache too, because
    vLLM's CPU backend packs its cache by rules of its own.
    """

    name = "native CPU kernels"
    activations = ("relu", "relu2")
    weight_bits = (16, 8, 4)
    crossovers = tables.crossovers("native")
    cache_crossover = tables.read("native")["cache_crossover"]
    tile_crossover = {int(bits): share for bits, share in tables.read("native")["tile_crossover"].items()}
    paged_attention = staticmethod(reference.paged_attention)

    def describe(self) -> str:
        return f"{self.name} ({isa()})"

    def prepare_weight(self, weight: torch.Tensor) -> None:
        """Ask for huge pages: rows of a list lie pages apart, and with small ones address translation limits
        how fast they are read.
        """
        torch.ops.dejavu_cpu.use_huge_pages(weight)

    def count_dense(
        self, counters: torch.Tensor, once: torch.Tensor, per_row: torch.Tensor, row_lens: torch.Tensor
    ) -> None:
        torch.ops.dejavu_cpu.count_dense(counters, once, per_row, row_lens)

    def score_heads(self, x: torch.Tensor, predictor: Linear, call: Call) -> torch.Tensor:
        return torch.ops.dejavu_cpu.score_heads(x, *predictor, call.row_lens)

    def select_neurons(
        self,
        x: torch.Tensor,
        predictor: LowRank,
        call: Call,
        with_mask: bool = False,
        rider: Rider | None = None,
    ) -> tuple[Selection, torch.Tensor | None]:
        heads = (None, None, None) if rider is None else (rider.x, *rider.predictor)
        ids, counts, mask, scores = torch.ops.dejavu_cpu.select_neurons(
            x, *predictor, call.row_lens, with_mask, *heads, call.counters
        )
        return Selection(ids, counts, mask if with_mask else None), None if rider is None else scores

    def sparse_mlp(
        self, x: torch.Tensor, mlp: Mlp, selection: Selection | None = None, call: Call | None = None
    ) -> torch.Tensor:
        weights = mlp.up.weight, mlp.up.scale, mlp.up.bias, *self.transposed(mlp.down)
        weights += self.squares(mlp.activation), self.tile_share(mlp.down)
        if selection is None:
            return torch.ops.dejavu_cpu.dense_mlp(x, *weights)
        chosen = selection.ids, selection.counts, call.row_lens, selection.mask
        return torch.ops.dejavu_cpu.sparse_mlp(x, *weights, *chosen, call.counters)

    def exact_down(
        self, h: torch.Tensor, down: Rows, activation: str, crossover: float, call: Call
    ) -> torch.Tensor:
        """By tiles of a few tokens, each a step in the counters."""
        weights = *self.transposed(down), self.squares(activation), crossover
        return torch.ops.dejavu_cpu.exact_down(h, *weights, call.counters)

    @staticmethod
    def transposed(rows: Rows) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """A transposed weight as operations take it."""
        return rows.weight, rows.scale, rows.output_scale

    def tile_share(self, down: Rows) -> float:
        """`tile_crossover` of fc2's weights."""
        return self.tile_crossover[down.bits]

    def squares(self, activation: str) -> bool:
        """Whether an activation is relu2, the square of ReLU."""
        if activation not in self.activations:
            raise ValueError(
                f"the native CPU kernels know the activations {list(self.activations)}, got {activation!r}"
            )
        return activation == "relu2"

    def linear(self, x: torch.Tensor, rows: Rows, output: torch.Tensor | None = None) -> torch.Tensor:
        """A transposed weight is that of `sparse_out_proj`: without a bias."""
        if output is None:
            output = x.new_empty(x.shape[0], rows.outputs)
        if rows.transposed:
            torch.ops.dejavu_cpu.transposed_out_proj(x[:, None], *self.transposed(rows), None, output)
        else:
            torch.ops.dejavu_cpu.linear(x, rows.weight, rows.scale, rows.bias, output)
        return output

    def sparse_qkv(
        self, x: torch.Tensor, qkv: Rows, head_scores: torch.Tensor, head_size: int, call: Call
    ) -> torch.Tensor:
        return torch.ops.dejavu_cpu.sparse_qkv(
            x, qkv.weight, qkv.scale, qkv.bias, head_scores, call.row_lens, head_size, call.counters
        )

    def mask_heads(self, attn: torch.Tensor, head_scores: torch.Tensor) -> torch.Tensor:
        return torch.ops.dejavu_cpu.mask_heads(attn, head_scores)

    def sparse_out_proj(
        self, attn: torch.Tensor, out: Rows, head_scores: torch.Tensor, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        if output is None:
            output = attn.new_empty(attn.shape[0], out.outputs)
        if out.transposed:
            torch.ops.dejavu_cpu.transposed_out_proj(attn, *self.transposed(out), head_scores, output)
        else:
            torch.ops.dejavu_cpu.sparse_out_proj(attn, out.weight, head_scores, output)
        return output


KERNELS = NativeKernels()
