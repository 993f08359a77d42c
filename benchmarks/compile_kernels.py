"""Compile every shipped kernel configuration ahead of time and record what it costs; needs no GPU.

    python benchmarks/compile_kernels.py --output benchmarks/results/compile
    python benchmarks/compile_kernels.py --check benchmarks/results/compile/baseline.csv

The launches are recorded from the wrappers themselves, called on tensors without memory, and specialised by
Triton's own code. So a change of tile tables, grids or arguments is compiled without anything to change here.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import functools
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from vllm_dejavu.kernels import predict, projections, sparse_attention, sparse_mlp, tables
from vllm_dejavu.kernels.interface import (
    COUNTERS,
    SEGMENT,
    Cache,
    Call,
    Linear,
    LowRank,
    Mlp,
    Rider,
    Rows,
    Selection,
)

# {name: (target, multiprocessors)}: grids, and with them the number of splits, follow from the chip.
ARCHS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 108),  # A100
    "sm_90": (GPUTarget("cuda", 90, 32), 132),  # H100
    "sm_100": (GPUTarget("cuda", 100, 32), 148),  # B200
    "gfx942": (GPUTarget("hip", "gfx942", 64), 304),  # MI300X
}
FP16, BF16, FP32, INT8 = torch.float16, torch.bfloat16, torch.float32, torch.int8
NAMES = {FP16: "fp16", BF16: "bf16", FP32: "fp32"}
MODULES = {
    "_down_kernel": predict,
    "_up_select_kernel": predict,
    "_positive_kernel": sparse_mlp,
    "_fc1_kernel": sparse_mlp,
    "_fc2_kernel": sparse_mlp,
    "_qkv_kernel": projections,
    "_out_proj_kernel": projections,
    "_attention_kernel": sparse_attention,
}
COLUMNS = (
    "kernel",
    "config",
    "arch",
    "triton",
    "status",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "num_warps",
    "num_stages",
    "mma",
    "async_copies",
    "global_loads",
)


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    heads: int
    rank: int

    @property
    def ffn(self) -> int:
        return 4 * self.hidden


# Ranks: 3% of the MLP's bytes, and a multiple of 16 as `predictor.Predictor` pads them. 30B needs 256
# segments, the others 128.
OPT_6_7B = Model("opt-6.7b", 4096, 32, 192)
OPT_30B = Model("opt-30b", 7168, 56, 336)
HEAD_SIZES = (32, 64, 80, 96, 128)
BLOCK_SIZE = 16
MAX_LEN = 2048


@dataclass(frozen=True)
class Config:
    """One call of a wrapper."""

    name: str
    kernels: tuple[str, ...]
    dtype: torch.dtype
    call: Callable[[], Any]


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _counters() -> torch.Tensor:
    return empty(len(COUNTERS), dtype=torch.int64)


def _select(
    model: Model, tokens: int, dtype: torch.dtype, heads: bool = True, predictor: torch.dtype = FP16
) -> None:
    x, row_lens = empty(tokens, model.hidden, dtype=dtype), empty(tokens, dtype=torch.int32)
    rider = None
    if heads:
        weight = empty(model.heads, model.hidden, dtype=predictor)
        rider = Rider(x, Linear(weight, empty(model.heads, dtype=FP32)))
    neurons = LowRank(
        empty(model.rank, model.hidden, dtype=predictor),
        empty(model.ffn, model.rank, dtype=predictor),
        empty(model.ffn, dtype=FP32),
    )
    predict.select_neurons(x, neurons, Call(row_lens, _counters()), with_mask=True, rider=rider)


def _select_int8(model: Model, tokens: int, dtype: torch.dtype) -> None:
    # the rank that the same bytes allow
    _select(replace(model, rank=2 * model.rank), tokens, dtype, predictor=INT8)


def _score_heads(model: Model, tokens: int, dtype: torch.dtype) -> None:
    x, row_lens = empty(tokens, model.hidden, dtype=dtype), empty(tokens, dtype=torch.int32)
    heads = Linear(empty(model.heads, model.hidden, dtype=FP16), empty(model.heads, dtype=FP32))
    predict.score_heads(x, heads, Call(row_lens))


def _mlp(model: Model, tokens: int, dtype: torch.dtype) -> None:
    weight = empty(model.ffn, model.hidden, dtype=dtype)
    selection = Selection(
        empty(model.ffn, dtype=torch.int32),
        empty(-(-model.ffn // SEGMENT), dtype=torch.int32),
        empty(tokens, model.ffn, dtype=torch.bool),
    )
    sparse_mlp.sparse_mlp(
        empty(tokens, model.hidden, dtype=dtype),
        Mlp(Rows(weight, empty(model.ffn, dtype=dtype)), Rows(weight, transposed=True)),
        selection,
        Call(empty(tokens, dtype=torch.int32), _counters()),
    )


def _exact(model: Model, tokens: int, dtype: torch.dtype) -> None:
    """Of an fc1 that is computed, squared: mode exact of Nemotron."""
    h, weight = empty(tokens, model.ffn, dtype=dtype), empty(model.ffn, model.hidden, dtype=dtype)
    call = Call(empty(tokens, dtype=torch.int32), _counters())
    sparse_mlp.exact_down(h, Rows(weight, transposed=True), "relu2", 1.0, call)


def _project(model: Model, tokens: int, dtype: torch.dtype) -> None:
    size, scores = 3 * model.hidden, empty(tokens, model.heads, dtype=FP32)
    head_size = model.hidden // model.heads
    projections.sparse_qkv(
        empty(tokens, model.hidden, dtype=dtype),
        Rows(empty(size, model.hidden, dtype=dtype), empty(size, dtype=dtype)),
        scores,
        head_size,
        Call(empty(tokens, dtype=torch.int32), _counters()),
    )
    projections.sparse_out_proj(
        empty(tokens, model.heads, head_size, dtype=dtype),
        Rows(empty(model.hidden, model.hidden, dtype=dtype)),
        scores,
    )


def _attend(head_size: int, tokens: int, dtype: torch.dtype, heads: int = 32) -> None:
    qkv = empty(tokens, 3 * heads * head_size, dtype=dtype)
    lens = empty(tokens, dtype=torch.int32)
    cache = Cache(
        empty(1000, heads, BLOCK_SIZE, 2 * head_size, dtype=dtype),
        empty(tokens, MAX_LEN // BLOCK_SIZE, dtype=torch.int32),
        lens,
        MAX_LEN,
    )
    sparse_attention.paged_attention(
        qkv[:, : heads * head_size].view(tokens, heads, head_size),
        cache,
        head_size**-0.5,
        empty(tokens, heads, dtype=FP32),
        Call(lens),
    )


def configs(dtypes: tuple[torch.dtype, ...] = (FP16, BF16, FP32)) -> Iterator[Config]:
    """Every tile bucket, full and with a number of tokens that is no multiple of 16 (Triton compiles those
    apart).
    """
    sizes = sorted({n for kernel in tables.tiles() for n in tables.buckets(kernel)})
    odd = [n - 8 for n in sizes if n > 8]
    calls = (
        ("", _select, ("_down_kernel", "_up_select_kernel")),
        ("", _mlp, ("_fc1_kernel", "_fc2_kernel")),
        ("exact relu2 ", _exact, ("_positive_kernel", "_fc1_kernel", "_fc2_kernel")),
        ("", _project, ("_qkv_kernel", "_out_proj_kernel")),
        ("heads only ", _score_heads, ("_down_kernel",)),
        ("no heads ", functools.partial(_select, heads=False), ("_down_kernel",)),
        ("int8 predictor ", _select_int8, ("_down_kernel", "_up_select_kernel")),
    )
    points = [(OPT_6_7B, n, dtype) for dtype in (FP16, BF16) for n in sizes + odd]
    points += [(OPT_30B, n, FP16) for n in sizes] + [(OPT_6_7B, n, FP32) for n in sizes[:2]]
    for (what, call, kernels), (model, n, dtype) in itertools.product(calls, points):
        if dtype in dtypes and not (what and (model != OPT_6_7B or n in odd)):
            yield Config(
                f"{model.name} {what}{NAMES[dtype]} tokens={n}",
                kernels,
                dtype,
                functools.partial(call, model, n, dtype),
            )
    for head_size, dtype, n in itertools.product(HEAD_SIZES, (FP16, BF16), (1, 64)):
        if dtype in dtypes:
            call = functools.partial(_attend, head_size, n, dtype)
            yield Config(f"head={head_size} {NAMES[dtype]} tokens={n}", ("_attention_kernel",), dtype, call)


class _Recorder:
    """Stands in a module for its kernel and notes what it would have been launched with."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel = kernel
        self.args: tuple = ()
        self.kwargs: dict[str, Any] = {}

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        def record(*args, **kwargs):
            self.args, self.kwargs = args, kwargs

        return record


def record(config: Config, sms: int) -> dict[str, _Recorder]:
    """{kernel: its launch} of one wrapper call on a chip of so many multiprocessors."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(tables, "num_sms", lambda device: sms))
        recorders = {name: _Recorder(getattr(module, name)) for name, module in MODULES.items()}
        for name, module in MODULES.items():
            stack.enter_context(mock.patch.object(module, name, recorders[name]))
        config.call()
    return recorders


def _widths(found: list[tuple[str, str]]) -> str:
    """'16Bx8 2Bx4': eight instructions of 16 bytes a thread and four of 2, widest first."""
    counts = collections.Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)
    return " ".join(f"{width}Bx{number}" for width, number in sorted(counts.items(), reverse=True))


def _cuda_costs(compiled: Any, log: str) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    mma = {
        name: len(re.findall(pattern, ptx))
        for name, pattern in (
            ("mma", r"\bmma\.sync"),
            ("wgmma", r"wgmma\.mma_async"),
            ("tcgen05", r"tcgen05\.mma"),
        )
    }
    copies = [
        ("1", str(8 * int(size, 0)))
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    ]
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "mma": " ".join(f"{name}x{number}" for name, number in mma.items() if number),
        "async_copies": _widths(copies),
        "global_loads": _widths(
            re.findall(r"\bld\.global(?:\.[a-zL]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
        ),
    }


def _hip_costs(compiled: Any, log: str) -> dict[str, Any]:
    asm = compiled.asm["amdgcn"]
    loads = re.findall(
        r"\b(?:global|buffer)_load_(dwordx[234]|dword|[us](?:short|byte)\w*|short_d16\w*)\b", asm
    )
    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    mfma = len(re.findall(r"\bv_mfma_", asm))
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", asm)[1]),
        # scratch memory a lane, which these kernels have no other use for
        "spill_bytes": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", asm)[1]),
        "mma": f"mfmax{mfma}" if mfma else "",
        "async_copies": "",
        "global_loads": _widths([("1", str(bits.get(name, 16 if "short" in name else 8))) for name in loads]),
    }


def compile_kernel(recorder: _Recorder, target: GPUTarget) -> tuple[Any, str]:
    """(compiled kernel, what the assembler said), specialised as a launch would have done it."""
    kernel, backend = recorder.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, kwargs = bind(
        *recorder.args, debug=False, instrumentation_mode="", **recorder.kwargs
    )
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, kwargs)
    log = io.StringIO()
    with contextlib.redirect_stdout(log), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a default that Triton 3.10 changes
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__
        )
    return compiled, log.getvalue()


def measure(job: tuple[str, str, str]) -> dict[str, Any]:
    """One row of the table."""
    name, kernel, arch = job
    config = next(c for c in configs() if c.name == name and kernel in c.kernels)
    target, sms = ARCHS[arch]
    recorder = record(config, sms)[kernel]
    row = dict.fromkeys(COLUMNS, "") | {
        "kernel": kernel,
        "config": name,
        "arch": arch,
        "triton": triton.__version__,
    }
    row["num_stages"] = recorder.kwargs.get("STAGES", "")  # of kernels with a loop to pipeline
    try:
        compiled, log = compile_kernel(recorder, target)
    except Exception as error:  # whatever a compiler raises is the result
        root: BaseException = error
        while root.__cause__ is not None:  # in the function called by the function called by the kernel
            root = root.__cause__
        lines = [line.strip() for line in str(root).splitlines() if line.strip(" ^")]
        reason = f"failed: {type(root).__name__}: {lines[-1][:200] if lines else ''}"
        return row | {"num_warps": recorder.kwargs["num_warps"], "status": reason}
    costs = (_cuda_costs if target.backend == "cuda" else _hip_costs)(compiled, log)
    return (
        row
        | costs
        | {
            "status": "ok",
            "shared_bytes": compiled.metadata.shared,
            "num_warps": compiled.metadata.num_warps,
        }
    )


def problems(rows: list[dict[str, Any]], baseline: list[dict[str, str]]) -> list[str]:
    """What is worse than the baseline: spills, or a configuration that no longer compiles."""
    known = {(r["kernel"], r["config"], r["arch"]): r for r in baseline}
    found = []
    for row in rows:
        key = (row["kernel"], row["config"], row["arch"])
        old = known.get(key)
        if row["status"] != "ok":
            if old is None or old["status"] == "ok":
                found.append(f"{' '.join(key)}: {row['status']}")
        elif int(row["spill_bytes"]) > (allowed := int(old["spill_bytes"] or 0) if old else 0):
            found.append(f"{' '.join(key)}: spills {row['spill_bytes']} bytes, the baseline {allowed}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--kernel", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--config", default="", help="regular expression: only configurations it is found in")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="directory to write baseline.csv to")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="BASELINE.csv",
        help="fail on spills above this record, or on what no longer compiles",
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error(
            "TRITON_INTERPRET=1 defines kernels for the interpreter, which cannot be compiled; unset it."
        )

    # fp32 serves tests and comparisons; one architecture is enough
    jobs = [
        (c.name, kernel, arch)
        for arch, c in itertools.product(args.arch, configs())
        for kernel in c.kernels
        if kernel in args.kernel and (c.dtype != FP32 or arch == "sm_90") and re.search(args.config, c.name)
    ]
    if not jobs:
        parser.error(f"no configuration matches --config {args.config!r}")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="vllm-dejavu-compile.") as cache:
        knobs.cache.dir = cache
        knobs.compilation.always_compile = (
            True  # configurations may share a binary, whose log a cache would not have
        )
        knobs.nvidia.dump_ptxas_log = True
        with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            rows = []
            for row in pool.map(measure, jobs):
                rows.append(row)
                print(
                    f"{row['arch']:7} {row['kernel']:18} {row['config']:40} {row['registers']!s:>4} regs"
                    f" {row['spill_bytes']!s:>5} spilled {row['shared_bytes']!s:>7} shared  {row['mma']:10}"
                    f" async {row['async_copies']:18} loads {row['global_loads']}"
                    + ("" if row["status"] == "ok" else f"  {row['status']}"),
                    flush=True,
                )
    rows.sort(key=lambda r: (r["kernel"], r["arch"], r["config"]))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / "baseline.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    failed = [r for r in rows if r["status"] != "ok"]
    print(
        f"{len(rows)} configurations, {len(failed)} failed, {sum(bool(r['spill_bytes']) for r in rows)}"
        f" spill; Triton {triton.__version__}"
    )
    if args.check:
        with open(args.check, newline="", encoding="utf-8") as file:
            worse = problems(rows, list(csv.DictReader(file)))
        print("\n".join(worse) or f"nothing is worse than {args.check}")
        return bool(worse)
    return 0


if __name__ == "__main__":
    sys.exit(main())
