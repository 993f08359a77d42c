"""`vllm-dejavu plan --table`: the launch-and-bytes MODEL (`roofline`) of many decode steps: a table, CSV, and
Markdown of what quantization and sparsity give together. Every assumption is an option.

Needs the standard library only. Unlike `plan` it takes published sizes alone, every layer alike, fp16
predictors and 10 launches for every sparse layer, unless told otherwise.
"""

from __future__ import annotations

import argparse
import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vllm_dejavu import markdown
from vllm_dejavu.config import WEIGHT_BITS
from vllm_dejavu.published import DEVICES, GEOMETRIES, full_name, preset_densities
from vllm_dejavu.roofline import (
    BANNER,
    DENSE_LAUNCHES,
    QUANTIZATION_ASSUMPTIONS,
    SPARSE_LAUNCHES,
    Account,
    Device,
    Quantized,
    Workload,
    account,
    quantized,
)

GPUS, BATCHES, CONTEXTS = ["h200"], [1, 8, 32, 64], [256, 1920]
OVERRIDES = tuple(f.name for f in fields(Device) if f.name != "name")


@dataclass(frozen=True)
class Point:
    """One row. name: of the model. densities_from: in words."""

    name: str
    account: Account
    densities_from: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that only a table has."""
    default = Workload()
    table = parser.add_argument_group(
        "with --table",
        "MODEL, --gpu, --batch and --context may then be several, separated by commas, and every combination"
        " is a row; not given: all sizes, h200, 1,8,32,64 and 256,1920.",
    )
    table.add_argument("--table", action="store_true", help="tables over sizes, GPUs, batches and contexts")
    table.add_argument(
        "--mlp-density", type=float, help="union over the batch; not given: by size and batch, assumed"
    )
    table.add_argument("--head-density", type=float, help="per sequence; not given: by size, assumed")
    table.add_argument("--head-union-density", type=float, help="not given: sequences choose independently")
    table.add_argument(
        "--survivors",
        type=float,
        default=default.survivors,
        help="share of selected neurons that fc2 reads (%(default)s)",
    )
    table.add_argument(
        "--dtype-bytes", type=float, default=default.dtype_bytes, help="of weights and KV cache (%(default)s)"
    )
    table.add_argument("--predictor-rank", type=int, help="not given: 3%% of the MLP's bytes; 0: none")
    table.add_argument(
        "--predictor-dtype-bytes", type=float, default=default.predictor_dtype_bytes, help="(%(default)s)"
    )
    table.add_argument(
        "--launches", type=int, default=default.sparse_launches, help="of a sparse layer (%(default)s)"
    )
    table.add_argument("--dense-launches", type=int, default=default.dense_launches, help="(%(default)s)")
    table.add_argument(
        "--dense-projections", action="store_true", help="read all Q rows and out_proj columns"
    )
    for name in OVERRIDES:
        table.add_argument(
            f"--{name.replace('_', '-')}", type=float, help="of the GPU; not given: the datasheet's"
        )
    table.add_argument("--csv", type=Path, metavar="FILE")
    table.add_argument(
        "--quantized",
        type=Path,
        metavar="FILE.md",
        help="what fewer bits, sparsity and both give; CSV rows of both kinds",
    )
    table.add_argument(
        "--bits",
        type=int,
        choices=[b for b in WEIGHT_BITS if b < 16],
        default=4,
        help="of --quantized (%(default)s)",
    )


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas, out of the command line."""
    return [int(part) for part in text.split(",")]


def several(option: str, text: str | None, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    """Names separated by commas, each one of the allowed.

    Raises:
        ValueError: another name.
    """
    names = list(default) if text is None else [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            raise ValueError(f"{option} {name!r} is unknown: expected some of {', '.join(allowed)}.")
    return names


def refuse_without_table(args: argparse.Namespace) -> None:
    """Tables only: an option of theirs that was given without --table would change nothing.

    Raises:
        ValueError: one was.
    """
    parser = argparse.ArgumentParser()
    add_options(parser)
    given = [name for name, default in vars(parser.parse_args([])).items() if getattr(args, name) != default]
    if given:
        raise ValueError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: only with --table.")


def points(args: argparse.Namespace, overrides: dict[str, float]) -> list[Point]:
    """Every combination, GPUs first.

    Raises:
        ValueError: a name or a value is out of range.
    """
    sizes = several("MODEL", args.model, list(GEOMETRIES), list(GEOMETRIES))
    devices = [
        replace(DEVICES[name], **overrides) for name in several("--gpu", args.gpu, list(DEVICES), GPUS)
    ]
    return [
        point(args, device, size, batch, context)
        for device in devices
        for size in sizes
        for context in args.context or CONTEXTS
        for batch in args.batch or BATCHES
    ]


def point(args: argparse.Namespace, device: Device, size: str, batch: int, context: int) -> Point:
    mlp, heads, densities_from = preset_densities(size, max(1, batch))
    if args.mlp_density is not None and args.head_density is not None:
        densities_from = "given"
    elif args.mlp_density is not None:
        densities_from = f"MLP given; rest: {densities_from}"
    elif args.head_density is not None:
        densities_from = f"heads given; rest: {densities_from}"
    workload = Workload(
        batch=batch,
        context=context,
        mlp_density=mlp if args.mlp_density is None else args.mlp_density,
        head_density=heads if args.head_density is None else args.head_density,
        head_union_density=args.head_union_density,
        survivors=args.survivors,
        tp=args.tp,
        dtype_bytes=args.dtype_bytes,
        predictor_rank=args.predictor_rank,
        predictor_dtype_bytes=args.predictor_dtype_bytes,
        dense_launches=args.dense_launches,
        sparse_launches=args.launches,
        skip_projections=not args.dense_projections,
    )
    return Point(full_name(size), account(GEOMETRIES[size], device, workload), densities_from)


def run(args: argparse.Namespace, typed: Sequence[str]) -> None:
    """Prints the table, and one point's parts; writes the files that were asked for.

    Args:
        args: of `add_options`, with the model, gpu, batch, context and tp of `plan`.
        typed: the arguments of the command line, for the Markdown.

    Raises:
        ValueError: a name or a value is out of range.
    """
    overrides = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    rows = points(args, overrides)
    device = rows[0].account.device
    print(BANNER)
    print(
        f"tp {args.tp}; launches a layer: dense {args.dense_launches}, sparse {args.launches},"
        f" {device.launch_us:g} us each; efficiency {device.efficiency:g}; union: heads read by any sequence;"
        " step: with embeddings, lm_head, sampling"
    )
    if overrides:
        given = ", ".join(f"{name} {value:g}" for name, value in overrides.items())
        print(f"in place of the device table's figures: {given}")
    print(table(rows))
    if len(rows) == 1:
        print(parts(rows[0].account))
    if args.quantized:
        pairs = [quantized_pair(row, args.bits) for row in rows]
        text = quantization_table(pairs, shlex.join(["vllm-dejavu", *typed]))
        args.quantized.parent.mkdir(parents=True, exist_ok=True)
        args.quantized.write_text(text, encoding="utf-8")
        print(f"\n{text}\n{len(pairs)} rows: {args.quantized}")
        rows = [replace(row, account=kind) for row, pair in pairs for kind in (pair.plain, pair.small)]
    if args.csv:
        write_csv(args.csv, rows)
        print(f"\n{len(rows)} rows: {args.csv}")


# What is printed.


def table(rows: Sequence[Point]) -> str:
    """A block a model and GPU."""
    header = (
        f"{'geometry':9}{'device':14}{'batch':>6}{'context':>8}{'MLP':>6}{'heads':>6}{'union':>6}"
        f"{'layer us':>17}{'layer':>7}{'step ms':>17}{'step':>7}"
        f"  {'most of sparse':17}densities"
    )
    lines, previous = [], None
    for row in rows:
        result = row.account
        if previous != (row.name, result.device):
            lines += ["", header]
            previous = row.name, result.device
        w = result.workload
        layer = f"{result.dense_us:.1f} ->{result.sparse_us:>7.1f}"
        step = f"{result.dense_step_us / 1e3:.2f} ->{result.sparse_step_us / 1e3:>7.2f}"
        note = (
            "" if result.fits else f"  DOES NOT FIT: {result.need_gb:.0f} of {result.device.memory_gb:.0f} GB"
        )
        lines.append(
            f"{row.name:9}{result.device.name:14}{w.batch:>6}{w.context:>8}{w.mlp_density:>6.2f}"
            f"{w.head_density:>6.2f}{w.union_heads:>6.2f}{layer:>17}{result.speedup:>6.2f}x{step:>17}"
            f"{result.step_speedup:>6.2f}x  {f'{result.dominant} {result.dominant_share:.0%}':17}"
            f"{row.densities_from}{note}"
        )
    return "\n".join(lines)


def parts(result: Account) -> str:
    """One layer of one point: bytes by part, launches by name."""
    d, w = result.device, result.workload
    lines = ["", f"{'one layer, one rank':22}{'dense MB':>10}{'us':>9}{'sparse MB':>12}{'us':>9}"]

    def line(
        name: str, dense_bytes: float | None, dense_us: float, sparse_bytes: float | None, sparse_us: float
    ) -> None:
        dense, sparse = ("" if b is None else f"{b / 1e6:.2f}" for b in (dense_bytes, sparse_bytes))
        lines.append(f"{name:22}{dense:>10}{dense_us:>9.2f}{sparse:>12}{sparse_us:>9.2f}")

    for name, part in result.parts.items():
        line(
            name,
            part.dense_bytes,
            d.read_us(part.dense_bytes),
            part.sparse_bytes,
            d.read_us(part.sparse_bytes),
        )
    line(
        f"launches {w.dense_launches}, {w.sparse_launches}",
        None,
        w.dense_launches * d.launch_us,
        None,
        w.sparse_launches * d.launch_us,
    )
    if w.tp > 1:
        line("all-reduces", None, result.all_reduce_us, None, result.all_reduce_us)
    line("sum", result.dense_bytes, result.dense_us, result.sparse_bytes, result.sparse_us)
    for label, names, count in (
        ("dense", DENSE_LAUNCHES, w.dense_launches),
        ("sparse", SPARSE_LAUNCHES, w.sparse_launches),
    ):
        rest = "" if count == len(names) else f"; {count - len(names):+d} not named"
        lines.append(f"{label} launches: {', '.join(names)}{rest}")
    return "\n".join(lines)


# CSV.


def csv_row(row: Point) -> dict[str, object]:
    result = row.account
    d, w = result.device, result.workload
    columns: dict[str, object] = {
        "kind": "model",
        "geometry": row.name,
        "device": d.name,
        **{f.name: getattr(w, f.name) for f in fields(w)},
        "head_union_density": round(w.union_heads, 6),
        "densities_from": row.densities_from,
        "predictor_rank": w.rank(result.geometry),
        **{name: getattr(d, name) for name in OVERRIDES},
    }
    for name, part in result.parts.items():
        stem = name.replace(" ", "_").lower()
        columns[f"{stem}_layer_dense_bytes"] = round(part.dense_bytes)
        columns[f"{stem}_layer_sparse_bytes"] = round(part.sparse_bytes)
    return columns | {
        "layer_dense_bytes": round(result.dense_bytes),
        "layer_sparse_bytes": round(result.sparse_bytes),
        "outer_bytes": round(result.outer_bytes),
        "layer_all_reduce_us": round(result.all_reduce_us, 3),
        "layer_dense_us": round(result.dense_us, 3),
        "layer_sparse_us": round(result.sparse_us, 3),
        "layer_speedup": round(result.speedup, 4),
        "step_dense_us": round(result.dense_step_us, 2),
        "step_sparse_us": round(result.sparse_step_us, 2),
        "step_speedup": round(result.step_speedup, 4),
        "dominant_sparse_term": result.dominant,
        "dominant_sparse_share": round(result.dominant_share, 4),
        "need_gb": round(result.need_gb, 2),
        "fits": result.fits,
    }


def write_csv(path: Path, rows: Sequence[Point]) -> None:
    columns = [csv_row(row) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns[0]))
        writer.writeheader()
        writer.writerows(columns)


# Markdown: fewer bits, sparsity, and both.

Pair = tuple[Point, Quantized]


def quantized_pair(row: Point, bits: int) -> Pair:
    """On the fewest devices, doubling, that hold the model in 16 bits."""
    result = row.account
    tp = result.workload.tp
    while not result.fits and result.geometry.num_heads % (2 * tp) == 0:
        tp *= 2
        result = account(result.geometry, result.device, replace(result.workload, tp=tp))
    return row, quantized(result.geometry, result.device, result.workload, bits)


def quantization_table(pairs: Sequence[Pair], command: str) -> str:
    bits = pairs[0][1].bits
    small = f"INT{bits}"
    columns = (
        "model",
        "GPU",
        "GPUs",
        "batch",
        "context",
        "MLP density",
        "heads (union)",
        "dense 16 ms",
        f"dense {small} ms",
        "sparse 16 ms",
        f"sparse {small} ms",
        f"{small} alone",
        "sparsity alone",
        f"sparse 16 over dense {small}",
        f"sparsity on top of {small}",
        "both",
        f"sparse 16 beats dense {small} below MLP density",
        "densities",
    )
    return "\n".join(
        [
            f"# Sparsity and {bits}-bit weights: {BANNER}",
            "",
            f"    {command}",
            "",
            (
                f"A decode step of vLLM's OPT, in ms, with the layers' weights in 16 bits or in {bits}, dense"
                f" and sparse. Ratios are speed-ups: {small} alone is dense 16 over"
            ),
            (
                f"dense {small}; both is dense 16 over sparse {small}; in the column sparse 16 over dense"
                f" {small}, less than 1 means that quantization alone is faster"
            ),
            (
                "than sparsity alone. GPUs: the fewest, doubling, that hold the 16-bit model; the same for"
                " every column, though fewer bits need fewer."
            ),
            "",
            *markdown.table(columns, map(quantization_cells, pairs)),
            "",
            "Assumed:",
            "",
            *(f"- {line}" for line in QUANTIZATION_ASSUMPTIONS),
            (
                "- Densities are assumed, not measured here, unless given on the command line; see"
                " `preset_densities`."
            ),
            "",
        ]
    )


def quantization_cells(pair: Pair) -> list[str]:
    row, result = pair
    w, times = result.plain.workload, result.times_ms
    dense, dense_small, sparse, sparse_small = times.values()
    even = result.break_even_mlp_density
    ratios = (
        dense / dense_small,
        dense / sparse,
        dense_small / sparse,
        dense_small / sparse_small,
        dense / sparse_small,
    )
    return [
        row.name,
        result.plain.device.name,
        f"{w.tp}" if result.plain.fits else f"{w.tp}, TOO FEW",
        f"{w.batch}",
        f"{w.context}",
        f"{w.mlp_density:.2f}",
        f"{w.head_density:.2f} ({w.union_heads:.2f})",
        *(f"{ms:.2f}" for ms in times.values()),
        *(f"{ratio:.2f}x" for ratio in ratios),
        "none" if even <= 0 else "any" if even > 1 else f"{even:.2f}",
        row.densities_from,
    ]
