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
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
import triton
import triton.language as tl
from common import Budget, Table, geometry, median, model_line, percentile, print_rows, provenance
from kernel_operations import Bench, Operation, layer_of  # noqa: E402
from synthetic import rank_of

from vllm_dejavu.kernels.tables import num_sms
from vllm_dejavu.published import GEOMETRIES, preset_densities
from vllm_dejavu.timing import Timer

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
