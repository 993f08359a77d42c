"""Each kernel against its dense operation and against a contiguous read of the same bytes. A measurement;
needs a GPU.

    python benchmarks/bench_kernels.py --output results/
    python benchmarks/bench_kernels.py --dry-run --output /tmp/out    # interpreter on a CPU: the script, not
    the speed

Method: one CUDA graph runs an operation once on each of several copies of its weights (or cache), together at
least 4 times the L2 cache, every copy with a selection of its own, scattered. Graphs of kernel, dense
operation and contiguous read are replayed in turn, so that clocks and neighbours are the same for all; a
sample is a replay's time over the number of copies. Every operation is compared with `kernels.reference` on
each copy's inputs before it is timed.

`read` is the fastest of several Triton kernels that stream as many contiguous bytes as the operation must
move; the goal is `of_read` >= 0.8 at 30B shapes. Weights and selections are random, densities given:
synthetic.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import Budget, Table, geometry, median, model_line, percentile, print_rows, provenance
from synthetic import ALWAYS_POSITIVE, rank_of

from vllm_dejavu.families import Geometry
from vllm_dejavu.kernels import reference
from vllm_dejavu.kernels.gpu import KERNELS as TRITON
from vllm_dejavu.kernels.interface import Cache, Call, Kernels, Linear, LowRank, Mlp, Rider, Rows
from vllm_dejavu.kernels.tables import num_sms
from vllm_dejavu.kernels.workspace import Workspace
from vllm_dejavu.published import GEOMETRIES, preset_densities
from vllm_dejavu.timing import Timer

MIN_COPIES, MAX_COPIES = 4, 128
L2_TIMES = 4
BLOCK_SIZE = 16  # tokens of a cache block
# Relative RMS error against the fp32 reference: tests/tolerances.py, and room for activations rounded in
# between.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-5}
# (programs a multiprocessor, 32-bit words at a time, stages) of the contiguous read; the fastest counts.
READS = ((1, 4096, 4), (2, 4096, 4), (4, 2048, 4), (8, 2048, 1), (16, 1024, 1))


@triton.jit
def _read_kernel(x_ptr, out_ptr, words, span, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Sum of a contiguous span of 32-bit words a program: a read that nothing can skip."""
    start = tl.program_id(0).to(tl.int64) * span
    acc = tl.zeros([BLOCK], tl.int32)
    for offset in tl.range(0, span, BLOCK, num_stages=STAGES):
        place = start + offset + tl.arange(0, BLOCK)
        acc += tl.load(x_ptr + place, mask=(offset + tl.arange(0, BLOCK) < span) & (place < words), other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(acc, 0))


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


# Timing


class Reader:
    """Contiguous reads of a number of bytes, from a slab larger than the cache can hold."""

    def __init__(self, device: torch.device, slab_bytes: int):
        self.slab = torch.randint(-(2**31), 2**31 - 1, (slab_bytes // 4,), dtype=torch.int32, device=device)
        self.out = torch.empty(16 * num_sms(device), dtype=torch.int32, device=device)
        self.device = device

    def runs(self, num_bytes: float) -> dict[str, Callable[[int], None]]:
        words = max(16, int(num_bytes) // 64 * 16)  # whole 64-byte pieces, so that loads are wide
        assert words <= self.slab.numel(), (
            f"{num_bytes / 1e9:.2f} GB to read, the slab has {self.slab.numel() * 4 / 1e9:.2f}"
        )
        places = max(1, self.slab.numel() // words)

        def make(per_sm: int, block: int, stages: int) -> Callable[[int], None]:
            programs = per_sm * num_sms(self.device)
            span = -(-words // programs)
            span = -(-span // 16) * 16

            def run(i: int) -> None:
                start = (i % places) * words
                _read_kernel[(-(-words // span),)](
                    self.slab[start:], self.out, words, span, BLOCK=block, STAGES=stages
                )

            return run

        return {"read " + "x".join(map(str, shape)): make(*shape) for shape in READS}


# Operations


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
            return kernels.sparse_mlp(x, Mlp(Rows(fc1[i], bias), Rows(fc2_t[i])), lists[i], self.call)

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


def measure(operation: Operation, timer: Timer, reader: Reader, checks: int) -> dict[str, Any]:
    """Check, then time an operation.

    Raises:
        AssertionError: the kernel's result is not the reference's.
    """
    row: dict[str, Any] = {
        "kernel": operation.name,
        "copies": operation.copies,
        "num_bytes": int(operation.num_bytes),
        "note": operation.note,
    }
    if operation.check is not None:
        errors = [operation.check(i) for i in range(min(checks, operation.copies))]
        row["error"], allowed = max(errors)
        assert row["error"] <= allowed, (
            f"{operation.name}: error {row['error']:.2e} against the reference, allowed {allowed:.0e}"
        )
    runs = {"kernel": operation.run, **reader.runs(operation.num_bytes)}
    if operation.dense is not None:
        runs["dense"] = operation.dense
    times = timer(runs, operation.copies)
    kernel = times["kernel"]
    read = min((median(t), name) for name, t in times.items() if name.startswith("read"))
    row |= {
        "us_p50": median(kernel),
        "us_p20": percentile(kernel, 0.2),
        "us_p80": percentile(kernel, 0.8),
        "read_us": read[0],
        "read_kind": read[1],
        "gb_s": operation.num_bytes / median(kernel) / 1e3,
        "read_gb_s": operation.num_bytes / read[0] / 1e3,
        "of_read": read[0] / median(kernel),
    }
    if "dense" in times:
        row |= {
            "dense_us": median(times["dense"]),
            "dense_gb_s": operation.dense_bytes / median(times["dense"]) / 1e3,
            "speedup": median(times["dense"]) / median(kernel),
        }
    return row


def bench_point(bench: Bench, timer: Timer, reader: Reader, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All kernels of a geometry, batch and density; weights of one operation are freed before the next,
    unless all are needed.
    """
    rows, parts = [], []
    makers: list[tuple[str, Callable[[], Operation]]] = [
        ("select", bench.select),
        ("mlp", bench.mlp),
        ("qkv", bench.qkv),
        ("out_proj", bench.out_proj),
    ]
    makers += [(f"attention {c}", lambda c=c: bench.attention(c)) for c in args.context]
    for name, make in makers:
        if args.kernel and not any(name.startswith(k) for k in args.kernel):
            continue
        try:
            operation = make()
            rows.append(measure(operation, timer, reader, args.checks))
        except Exception as e:  # one kernel that is wrong or does not fit must not cost the others their turn
            rows.append({"kernel": name, "status": f"FAILED {type(e).__name__}: {e}"[:200]})
            print(f"{name}: {rows[-1]['status']}", flush=True)
            continue
        if not name.startswith("attention") or name == f"attention {args.context[0]}":
            parts.append(operation)
        if name == "mlp" and args.ablations:
            rows += [measure(o, timer, reader, 0) for o in bench.fc2_storage()]
        del operation
    if args.ablations and not args.kernel and len(parts) == 5:
        row = measure(layer_of(parts), timer, reader, 0)
        names = {p.name for p in parts}
        row["sum_of_parts_us"] = sum(r["us_p50"] for r in rows if r["kernel"] in names)
        rows.append(row)
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Kernels against dense operations and contiguous reads of the same bytes."
    )
    parser.add_argument(
        "--geometry", nargs="+", choices=[*GEOMETRIES, "tiny"], default=["6.7b", "30b", "13b", "66b"]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument(
        "--density",
        nargs="+",
        default=["preset", "0.1", "0.5"],
        help="MLP union density; preset: published.py's for geometry and batch",
    )
    parser.add_argument("--context", nargs="+", type=int, default=[256, 1920])
    parser.add_argument("--kernel", nargs="+", help="only these: select, mlp, qkv, out_proj, attention")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--checks", type=int, default=1, help="copies compared with the reference")
    parser.add_argument("--no-ablations", dest="ablations", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    parser.add_argument(
        "--budget-s", type=float, help="stop starting points after this; they are reported as not run"
    )
    parser.add_argument("--quick", action="store_true", help="preset density, batches 1 and 8, 6.7b and 30b")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes under the Triton interpreter")
    args = parser.parse_args()
    if args.quick:
        args.geometry, args.batch, args.density = ["6.7b", "30b"], [1, 8], ["preset"]
    if args.dry_run:
        args.geometry, args.batch, args.density, args.context = ["tiny"], [1, 5], ["preset"], [40]
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run runs the script under the Triton interpreter")
    return args


@torch.inference_mode()
def main() -> None:
    args = parse_args()
    device = torch.device("cpu" if args.dry_run else "cuda")
    timer, budget = Timer(device, 1 if args.dry_run else args.replays), Budget(args.budget_s)
    table = Table(args.output / "kernels.csv")
    reader = Reader(device, 1 << 22 if args.dry_run else 2 << 30)
    slowest_s = 0.0 if args.dry_run else 20.0
    attention_done = set()  # does not depend on the MLP's density
    for density, name, batch in itertools.product(args.density, args.geometry, args.batch):
        g = geometry(name)
        preset, heads, source = preset_densities("6.7b" if name == "tiny" else name, batch)
        mlp_density = preset if density == "preset" else float(density)
        point = {
            "benchmark": "kernels",
            "synthetic": True,
            "dry_run": args.dry_run,
            "geometry": name,
            "batch": batch,
            "hidden": g.hidden_size,
            "ffn": g.ffn_dim,
            "heads": g.num_heads,
            "head_size": g.head_size,
            "rank": rank_of(g),
            "dtype": "float32" if args.dry_run else "float16",
            "mlp_union_density": mlp_density,
            "head_density": heads,
            "densities_from": source if density == "preset" else "given",
            "seed": args.seed,
        }
        if not budget.allows(slowest_s):
            table.add(**point, kernel="all", status="not run: out of time")
            continue
        began, options = time.monotonic(), argparse.Namespace(**vars(args))
        if (name, batch) in attention_done:
            options.kernel, options.ablations = args.kernel or ["select", "mlp"], False
        attention_done.add((name, batch))
        bench = Bench(g, batch, mlp_density, heads, args, device)
        for row in bench_point(bench, timer, reader, options):
            table.add(**{**point, "status": "ok", **row})
        slowest_s = max(slowest_s, time.monotonic() - began)
        print(
            model_line(
                name,
                batch,
                args.context[0],
                provenance()["device"],
                mlp_density=mlp_density,
                head_density=heads,
            )[0]
        )
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name} batch {batch} MLP {mlp_density:.2f}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"\nsynthetic weights and selections{'; DRY RUN, no measurement' if args.dry_run else ''}")
    print_rows(
        table.rows,
        (
            "geometry",
            "batch",
            "mlp_union_density",
            "kernel",
            "status",
            "us_p50",
            "read_us",
            "dense_us",
            "of_read",
            "speedup",
            "gb_s",
            "error",
        ),
    )
    if any(row["status"].startswith("FAILED") for row in table.rows):
        raise SystemExit("some kernels failed, see above")


if __name__ == "__main__":
    main()
