"""What bench_kernels.py times: each kernel on random weights of a geometry, beside its dense operation."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from synthetic import ALWAYS_POSITIVE, rank_of

from vllm_dejavu.families import Geometry
from vllm_dejavu.kernels import reference
from vllm_dejavu.kernels.gpu import KERNELS as TRITON
from vllm_dejavu.kernels.interface import Cache, Call, Kernels, Linear, LowRank, Mlp, Rider, Rows
from vllm_dejavu.kernels.workspace import Workspace

MIN_COPIES, MAX_COPIES = 4, 128
L2_TIMES = 4
BLOCK_SIZE = 16  # tokens of a cache block
# Relative RMS error against the fp32 reference: tests/tolerances.py, and room for activations rounded in
# between.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}


@triton.jit
def _gather_kernel(
    w_ptr,
    stride_neuron,
    stride_column,
    ids_ptr,
    number,
    columns,
    out_ptr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum over the columns of some neurons' weights, by any strides: what a storage order costs to read."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = place < number
    neurons = tl.load(ids_ptr + place, mask=inside, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in tl.range(0, columns, BLOCK_C, num_stages=4):
        column = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (column < columns)[None, :]
        acc += tl.load(
            w_ptr + neurons[:, None] * stride_neuron + column.to(tl.int64)[None, :] * stride_column,
            mask=mask,
            other=0.0,
        ).to(tl.float32)
    tl.store(out_ptr + place, tl.sum(acc, 1), mask=inside)


@dataclass
class Operation:
    """Something to time.

    Attributes:
        run: of a copy's number. dense: the dense operation on the same copy, or None.
        num_bytes: that `run` must move, from the selections drawn; dense_bytes likewise.
        check: error of `run` on a copy against the reference, relative RMS (or a share of differing neurons),
            and the largest allowed.
    """

    name: str
    run: Callable[[int], Any]
    num_bytes: float
    copies: int
    check: Callable[[int], tuple[float, float]] | None = None
    dense: Callable[[int], Any] | None = None
    dense_bytes: float = 0.0
    note: str = ""


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error, scale = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return error / scale if scale else error


class Bench:
    """Draws weights and selections of one geometry, batch and density, and makes the operations.

    Args:
        mlp_density: share of neurons in the batch's union. head_density: heads per row.
    """

    def __init__(
        self,
        g: Geometry,
        batch: int,
        mlp_density: float,
        head_density: float,
        args: argparse.Namespace,
        device: torch.device,
    ):
        self.g, self.batch, self.mlp_density, self.head_density, self.device = (
            g,
            batch,
            mlp_density,
            head_density,
            device,
        )
        self.dtype = torch.float32 if args.dry_run else torch.float16
        self.size = torch.finfo(self.dtype).bits // 8
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 16
        self.most = 2 if args.dry_run else MAX_COPIES
        self.row_lens = torch.ones(batch, dtype=torch.int32, device=device)
        self.workspace = None
        if device.type == "cuda":
            self.workspace = Workspace.for_model(device, self.dtype, max(64, batch), g.ffn_dim, g.head_size)
        self.call = Call(self.row_lens, None, self.workspace)

    def randn(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return (
            torch.randn(*shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype) * std
        )

    def copies(self, touched_bytes: float) -> int:
        """So many that what is read adds up to several times the cache."""
        return max(
            min(MIN_COPIES, self.most), min(self.most, int(L2_TIMES * self.l2 / max(1.0, touched_bytes)) + 1)
        )

    def rand_mask(self, units: int, density: float) -> torch.Tensor:
        """[batch, units] whose union is close to density, rows alike in number."""
        each = 1 - (1 - min(density, 1 - 1e-9)) ** (1 / self.batch)
        mask = torch.rand(self.batch, units, generator=self.generator, device=self.device) < each
        return torch.ones_like(mask) if density >= 1 else mask

    def head_scores(self) -> torch.Tensor:
        """[batch, heads], an exact share of the heads of each row, scattered."""
        number = max(1, round(self.head_density * self.g.num_heads))
        order = torch.rand(
            self.batch, self.g.num_heads, generator=self.generator, device=self.device
        ).argsort(1)
        return torch.where(order < number, 1.0, -1.0).contiguous()

    def select(self) -> Operation:
        """Down- and up-projection, threshold, union; the next layer's head scores ride along. Two
        launches.
        """
        g, rank = self.g, rank_of(self.g)
        half = torch.float16
        num_bytes = 2 * rank * (g.hidden_size + g.ffn_dim) + 4 * g.ffn_dim + 2 * g.num_heads * g.hidden_size
        copies = self.copies(num_bytes)
        x = self.randn(self.batch, g.hidden_size)
        down = [self.randn(rank, g.hidden_size, std=g.hidden_size**-0.5, dtype=half) for _ in range(copies)]
        up = [self.randn(g.ffn_dim, rank, std=rank**-0.5, dtype=half) for _ in range(copies)]
        heads = [
            self.randn(g.num_heads, g.hidden_size, std=g.hidden_size**-0.5, dtype=half) for _ in range(copies)
        ]
        each = 1 - (1 - min(self.mlp_density, 1 - 1e-6)) ** (1 / self.batch)
        bias = torch.full((g.ffn_dim,), float(torch.special.ndtri(torch.tensor(each))), device=self.device)
        head_bias = torch.zeros(g.num_heads, device=self.device)

        def call(kernels: Kernels, i: int) -> tuple:
            predictor, rider = LowRank(down[i], up[i], bias), Rider(x, Linear(heads[i], head_bias))
            return kernels.select_neurons(x, predictor, self.call, rider=rider)

        def check(i: int) -> tuple[float, float]:
            marks = []
            for kernels in (TRITON, reference.KERNELS):
                selection, scores = call(kernels, i)
                mark = torch.zeros(g.ffn_dim, dtype=torch.bool, device=self.device)
                mark[reference.listed(selection)] = True
                marks.append((mark, scores))
            (a, a_scores), (b, b_scores) = marks
            # a score within rounding of 0 may fall on either side
            return max(float((a != b).float().mean()), relative_rms(a_scores, b_scores)), max(
                1e-3, 2 / g.ffn_dim
            )

        def dense(i: int) -> None:
            F.linear(F.linear(x, down[i].to(x.dtype)), up[i].to(x.dtype))

        return Operation(
            "select",
            lambda i: call(TRITON, i),
            num_bytes,
            copies,
            check,
            dense,
            num_bytes,
            "dense: the two matrix products alone",
        )

    def mlp(self) -> Operation:
        """fc1, ReLU, fc2 over the union. All selected neurons come out positive. Two launches."""
        g = self.g
        masks_bytes = 2 * self.mlp_density * g.ffn_dim * g.hidden_size * self.size
        copies = self.copies(masks_bytes)
        x = self.randn(self.batch, g.hidden_size)
        fc1 = [self.randn(g.ffn_dim, g.hidden_size, std=g.hidden_size**-0.5) for _ in range(copies)]
        fc2_t = [self.randn(g.ffn_dim, g.hidden_size, std=g.ffn_dim**-0.5) for _ in range(copies)]
        bias = torch.full((g.ffn_dim,), ALWAYS_POSITIVE, dtype=self.dtype, device=self.device)
        lists = [reference.compact_union(self.rand_mask(g.ffn_dim, self.mlp_density)) for _ in range(copies)]
        number = sum(int(selection.counts.sum()) for selection in lists) / copies

        def call(kernels: Kernels, i: int) -> torch.Tensor:
            mlp = Mlp(Rows(fc1[i], bias), Rows(fc2_t[i], transposed=True))
            return kernels.sparse_mlp(x, mlp, lists[i], self.call)

        def dense(i: int) -> None:
            # the same memory, read as vLLM's [hidden, ffn]
            F.linear(F.relu(F.linear(x, fc1[i], bias)), fc2_t[i].view(g.hidden_size, g.ffn_dim))

        self.parts = (fc2_t, lists)
        return Operation(
            "mlp",
            lambda i: call(TRITON, i),
            2 * number * g.hidden_size * self.size,
            copies,
            self._checked(call),
            dense,
            2 * g.ffn_dim * g.hidden_size * self.size,
        )

    def fc2_storage(self) -> list[Operation]:
        """Ablation: the fc2 weights of the same neurons, as rows of the transposed matrix and as columns of
        the plain one.
        """
        g, (fc2_t, lists) = self.g, self.parts
        ids = [reference.listed(selection).int() for selection in lists]
        out = torch.empty(g.ffn_dim, device=self.device)
        num_bytes = sum(i.numel() for i in ids) / len(ids) * g.hidden_size * self.size

        def make(name: str, strides: Callable[[], tuple[int, int]], block_n: int, block_c: int) -> Operation:
            def run(i: int) -> None:
                _gather_kernel[(-(-max(1, ids[i].numel()) // block_n),)](
                    fc2_t[i],
                    *strides(),
                    ids[i],
                    ids[i].numel(),
                    g.hidden_size,
                    out,
                    BLOCK_N=block_n,
                    BLOCK_C=block_c,
                )

            return Operation(name, run, num_bytes, len(ids), note="ablation: reading alone")

        return [
            make("fc2 rows (transposed)", lambda: (g.hidden_size, 1), 4, 512),
            make("fc2 columns (strided)", lambda: (1, g.ffn_dim), 32, 64),
        ]

    def qkv(self) -> Operation:
        g = self.g
        scores, number = self._scores_for(lambda union: (2 + union) * g.hidden_size**2 * self.size)
        copies = len(scores)
        x, bias = self.randn(self.batch, g.hidden_size), self.randn(3 * g.hidden_size)
        weight = [
            self.randn(3 * g.hidden_size, g.hidden_size, std=g.hidden_size**-0.5) for _ in range(copies)
        ]

        def call(kernels: Kernels, i: int) -> torch.Tensor:
            return kernels.sparse_qkv(x, Rows(weight[i], bias), scores[i], g.head_size, self.call)

        square = g.hidden_size**2 * self.size
        return Operation(
            "qkv",
            lambda i: call(TRITON, i),
            (2 + number) * square,
            copies,
            self._checked(call),
            lambda i: F.linear(x, weight[i], bias),
            3 * square,
        )

    def out_proj(self) -> Operation:
        g = self.g
        scores, number = self._scores_for(lambda union: union * g.hidden_size**2 * self.size)
        copies = len(scores)
        plain = self.randn(self.batch, g.num_heads, g.head_size)
        attn = [reference.mask_heads(plain, s) for s in scores]
        weight = [self.randn(g.hidden_size, g.hidden_size, std=g.hidden_size**-0.5) for _ in range(copies)]
        out = torch.empty(self.batch, g.hidden_size, dtype=self.dtype, device=self.device)

        def call(kernels: Kernels, i: int) -> torch.Tensor:
            output = out if kernels is TRITON else None
            return kernels.sparse_out_proj(attn[i], Rows(weight[i]), scores[i], output)

        square = g.hidden_size**2 * self.size
        return Operation(
            "out_proj",
            lambda i: call(TRITON, i),
            number * square,
            copies,
            self._checked(call),
            lambda i: F.linear(attn[i].flatten(1), weight[i]),
            square,
        )

    def attention(self, context: int) -> Operation:
        """Over a paged cache in vLLM's layout, blocks scattered; dense: FlashAttention on the same cache."""
        g, batch = self.g, self.batch
        token_bytes = 2 * g.hidden_size * self.size
        num_bytes = (
            batch * context * token_bytes * max(1, round(self.head_density * g.num_heads)) / g.num_heads
        )
        copies = max(1, min(self.copies(num_bytes), int(2e10 // (batch * context * token_bytes))))
        blocks = -(-context // BLOCK_SIZE)
        caches, tables, scores = [], [], []
        for _ in range(copies):
            # logical [blocks, heads, tokens, K and V] over physical [blocks, tokens, heads, K and V]
            caches.append(
                self.randn(batch * blocks, BLOCK_SIZE, g.num_heads, 2 * g.head_size).transpose(1, 2)
            )
            order = torch.randperm(batch * blocks, generator=self.generator, device=self.device)
            tables.append(order.int().view(batch, blocks).contiguous())
            scores.append(self.head_scores())
        lens = torch.full((batch,), context, dtype=torch.int32, device=self.device)
        query, scale = self.randn(batch, g.num_heads, g.head_size), g.head_size**-0.5

        def call(kernels: Kernels, i: int) -> torch.Tensor:
            cache = Cache(caches[i], tables[i], lens, context)
            return kernels.paged_attention(query, cache, scale, scores[i], self.call)

        operation = Operation(
            f"attention {context}",
            lambda i: call(TRITON, i),
            num_bytes,
            copies,
            self._checked(call),
            dense_bytes=batch * context * token_bytes,
        )
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported

            version = 3 if is_fa_version_supported(3) else 2
        except Exception as e:  # no vLLM, or one without it: ImportError, and what missing libraries raise
            operation.note = f"no FlashAttention here ({type(e).__name__})"
            return operation
        starts = torch.arange(batch + 1, dtype=torch.int32, device=self.device)
        dense_out = torch.empty_like(query)

        def dense(i: int) -> None:
            key, value = caches[i].transpose(1, 2).split(g.head_size, dim=-1)
            flash_attn_varlen_func(
                q=query,
                k=key,
                v=value,
                out=dense_out,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=lens,
                max_seqlen_k=context,
                softmax_scale=scale,
                causal=True,
                block_table=tables[i],
                fa_version=version,
            )

        try:
            dense(0)
        except Exception as e:
            operation.note = f"FlashAttention did not run: {type(e).__name__}: {str(e)[:80]}"
        else:
            operation.dense, operation.note = dense, f"dense: FlashAttention {version}"
        return operation

    def _scores_for(self, touched: Callable[[float], float]) -> tuple[list[torch.Tensor], float]:
        """Head scores of each copy, and the mean share of heads that some row selected."""
        guess = 1 - (1 - self.head_density) ** self.batch
        scores = [self.head_scores() for _ in range(self.copies(touched(guess)))]
        return scores, sum(float((s > 0).any(0).float().mean()) for s in scores) / len(scores)

    def _checked(self, call: Callable[[Any, int], torch.Tensor]) -> Callable[[int], tuple[float, float]]:
        return lambda i: (relative_rms(call(TRITON, i), call(reference.KERNELS, i)), TOLERANCE[self.dtype])


def layer_of(parts: list[Operation]) -> Operation:
    """Every kernel of a layer in one graph, as in a decode step (without LayerNorms and the cache write)."""

    def run(i: int) -> None:
        for part in parts:
            part.run(i % part.copies)

    def dense(i: int) -> None:
        for part in parts:
            if part.name != "select":
                part.dense(i % part.copies)

    whole = all(part.dense is not None for part in parts)
    dense_bytes = sum(p.dense_bytes for p in parts if p.name != "select")
    return Operation(
        "layer",
        run,
        sum(p.num_bytes for p in parts),
        max(p.copies for p in parts),
        None,
        dense if whole else None,
        dense_bytes,
        "all kernels in one graph, against the sum of the parts",
    )
