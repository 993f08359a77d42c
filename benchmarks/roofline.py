"""Tables of the launch-and-bytes MODEL of one OPT decode step (`vllm_dejavu.roofline`). It computes; it
measures nothing.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --geometry 30b --device h200 --batch 1 --context 256 --launches 13
    python benchmarks/roofline.py --geometry 6.7b 30b 66b 175b --batch 1 8 --context 256 \\
        --quantized benchmarks/results/paper/roofline-int4.md --csv benchmarks/results/paper/roofline-int4.csv
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

# A bare checkout, no package installed: the model needs the standard library only.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from vllm_dejavu.roofline import (  # noqa: E402
    BANNER,
    DENSE_LAUNCHES,
    DEVICES,
    GEOMETRIES,
    QUANTIZATION_ASSUMPTIONS,
    SPARSE_LAUNCHES,
    WEIGHT_BITS,
    Account,
    Device,
    Quantized,
    Workload,
    account,
    preset_densities,
    quantized,
)


def csv_row(result: Account, densities_from: str) -> dict[str, object]:
    d, w = result.device, result.workload
    row: dict[str, object] = {
        "kind": "model",
        "geometry": result.geometry.name,
        "device": d.name,
        **{f.name: getattr(w, f.name) for f in fields(w)},
        "head_union_density": round(w.union_heads, 6),
        "densities_from": densities_from,
        "predictor_rank": w.rank(result.geometry),
        **{f.name: getattr(d, f.name) for f in fields(d) if f.name != "name"},
    }
    for name, part in result.parts.items():
        stem = name.replace(" ", "_").lower()
        row[f"{stem}_layer_dense_bytes"] = round(part.dense_bytes)
        row[f"{stem}_layer_sparse_bytes"] = round(part.sparse_bytes)
    row |= {
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
    return row


def print_parts(result: Account) -> None:
    """One layer of one point: bytes by part, launches by name."""
    d, w = result.device, result.workload
    print(f"\n{'one layer, one rank':22}{'dense MB':>10}{'us':>9}{'sparse MB':>12}{'us':>9}")

    def line(
        name: str, dense_bytes: float | None, dense_us: float, sparse_bytes: float | None, sparse_us: float
    ) -> None:
        dense, sparse = ("" if b is None else f"{b / 1e6:.2f}" for b in (dense_bytes, sparse_bytes))
        print(f"{name:22}{dense:>10}{dense_us:>9.2f}{sparse:>12}{sparse_us:>9.2f}")

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
        print(f"{label} launches: {', '.join(names)}{rest}")


def print_table(results: Sequence[tuple[Account, str]]) -> None:
    header = (
        f"{'geometry':9}{'device':14}{'batch':>6}{'context':>8}{'MLP':>6}{'heads':>6}{'union':>6}"
        f"{'layer us':>17}{'layer':>7}{'step ms':>17}{'step':>7}"
        f"  {'most of sparse':17}densities"
    )
    previous = None
    for result, densities_from in results:
        if previous != (result.geometry, result.device):
            print(f"\n{header}")
            previous = result.geometry, result.device
        w = result.workload
        layer = f"{result.dense_us:.1f} ->{result.sparse_us:>7.1f}"
        step = f"{result.dense_step_us / 1e3:.2f} ->{result.sparse_step_us / 1e3:>7.2f}"
        note = (
            "" if result.fits else f"  DOES NOT FIT: {result.need_gb:.0f} of {result.device.memory_gb:.0f} GB"
        )
        print(
            f"{result.geometry.name:9}{result.device.name:14}{w.batch:>6}{w.context:>8}{w.mlp_density:>6.2f}{w.head_density:>6.2f}{w.union_heads:>6.2f}{layer:>17}{result.speedup:>6.2f}x{step:>17}{result.step_speedup:>6.2f}x"
            f"  {f'{result.dominant} {result.dominant_share:.0%}':17}{densities_from}{note}"
        )


def on_enough_devices(result: Account) -> Account:
    """The same point on the fewest devices, doubling, that hold the model in 16 bits."""
    tp = result.workload.tp
    while not result.fits and result.geometry.num_heads % (2 * tp) == 0:
        tp *= 2
        result = account(result.geometry, result.device, replace(result.workload, tp=tp))
    return result


def quantization_table(results: Sequence[tuple[Quantized, str]], command: str) -> str:
    """Markdown: fewer bits, sparsity, and both."""
    bits = results[0][0].bits
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
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for result, densities_from in results:
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
        cells = (
            result.plain.geometry.name,
            result.plain.device.name,
            f"{w.tp}" if result.plain.fits else f"{w.tp}, TOO FEW",
            w.batch,
            w.context,
            f"{w.mlp_density:.2f}",
            f"{w.head_density:.2f} ({w.union_heads:.2f})",
            *(f"{ms:.2f}" for ms in times.values()),
            *(f"{ratio:.2f}x" for ratio in ratios),
            "none" if even <= 0 else "any" if even > 1 else f"{even:.2f}",
            densities_from,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
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
            *lines,
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


def plot(path: Path, results: Sequence[tuple[Account, str]]) -> None:
    """Whole-step speed-up over batch size: one panel per context and device, one line per geometry."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "--png needs matplotlib, which is not installed here: pip install matplotlib, or take --csv."
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((r.workload.context, r.device.name) for r, _ in results))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for name in dict.fromkeys(r.geometry.name for r, _ in results):
            points = [
                r
                for r, _ in results
                if (r.workload.context, r.device.name) == panel and r.geometry.name == name
            ]
            (line,) = axis.plot(
                [r.workload.batch for r in points], [r.step_speedup for r in points], label=name
            )
            for r in points:
                face = line.get_color() if r.fits else "white"
                axis.plot(r.workload.batch, r.step_speedup, "o", color=line.get_color(), markerfacecolor=face)
        batches = sorted({r.workload.batch for r, _ in results})
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{panel[1]}, context {panel[0]}", xlabel="batch")
    axes[0][0].set_ylabel("modelled speed-up of a decode step over dense")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle("MODEL, not a measurement, at assumed or given densities; hollow: does not fit in memory")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


OVERRIDES = tuple(f.name for f in fields(Device) if f.name != "name")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    default = Workload()
    parser = argparse.ArgumentParser(
        description="Launch-and-bytes MODEL of an OPT decode step, dense and sparse; measures nothing."
    )
    point = parser.add_argument_group("points, every combination")
    point.add_argument(
        "--geometry",
        nargs="+",
        choices=GEOMETRIES,
        default=list(GEOMETRIES),
        metavar="NAME",
        help=", ".join(GEOMETRIES) + " (all)",
    )
    point.add_argument(
        "--device",
        nargs="+",
        choices=DEVICES,
        default=["h200"],
        metavar="NAME",
        help=", ".join(DEVICES) + " (%(default)s)",
    )
    point.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 64], help="(%(default)s)")
    point.add_argument("--context", nargs="+", type=int, default=[256, 1920], help="(%(default)s)")
    work = parser.add_argument_group("workload")
    work.add_argument(
        "--mlp-density", type=float, help="union over the batch; not given: by geometry and batch, assumed"
    )
    work.add_argument("--head-density", type=float, help="per sequence; not given: by geometry, assumed")
    work.add_argument("--head-union-density", type=float, help="not given: sequences choose independently")
    work.add_argument(
        "--survivors",
        type=float,
        default=default.survivors,
        help="share of selected neurons that fc2 reads (%(default)s)",
    )
    work.add_argument("--tp", type=int, default=default.tp, help="tensor-parallel size (%(default)s)")
    work.add_argument(
        "--dtype-bytes", type=float, default=default.dtype_bytes, help="of weights and KV cache (%(default)s)"
    )
    work.add_argument("--predictor-rank", type=int, help="not given: 3%% of the MLP's bytes; 0: none")
    work.add_argument(
        "--predictor-dtype-bytes", type=float, default=default.predictor_dtype_bytes, help="(%(default)s)"
    )
    work.add_argument(
        "--launches", type=int, default=default.sparse_launches, help="of a sparse layer (%(default)s)"
    )
    work.add_argument("--dense-launches", type=int, default=default.dense_launches, help="(%(default)s)")
    work.add_argument("--dense-projections", action="store_true", help="read all Q rows and out_proj columns")
    device = parser.add_argument_group("device, in place of the table's figures")
    for name in OVERRIDES:
        device.add_argument(f"--{name.replace('_', '-')}", type=float, help="not given: the table's")
    out = parser.add_argument_group("output")
    out.add_argument("--csv", type=Path)
    out.add_argument("--png", type=Path, help="needs matplotlib")
    out.add_argument(
        "--quantized",
        type=Path,
        metavar="FILE.md",
        help="what fewer bits, sparsity and both give; CSV rows of both kinds",
    )
    out.add_argument(
        "--bits",
        type=int,
        choices=[b for b in WEIGHT_BITS if b < 16],
        default=4,
        help="of --quantized (%(default)s)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace, overrides: dict[str, float]) -> list[tuple[Account, str]]:
    results = []
    for device in (replace(DEVICES[name], **overrides) for name in args.device):
        for name in args.geometry:
            for context in args.context:
                for batch in args.batch:
                    mlp, heads, densities_from = preset_densities(name, batch)
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
                    results.append((account(GEOMETRIES[name], device, workload), densities_from))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    overrides = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    try:
        results = run(args, overrides)
    except ValueError as error:
        raise SystemExit(f"roofline.py: {error}") from None
    device = results[0][0].device
    print(BANNER)
    print(
        f"tp {args.tp}; launches a layer: dense {args.dense_launches}, sparse {args.launches},"
        f" {device.launch_us:g} us each; efficiency {device.efficiency:g}; union: heads read by any sequence;"
        " step: with embeddings, lm_head, sampling"
    )
    if overrides:
        print(
            "in place of the device table's figures: "
            + ", ".join(f"{name} {value:g}" for name, value in overrides.items())
        )
    print_table(results)
    if len(results) == 1:
        print_parts(results[0][0])
    if args.quantized:
        points = [(on_enough_devices(result), densities_from) for result, densities_from in results]
        pairs = [
            (quantized(point.geometry, point.device, point.workload, args.bits), densities_from)
            for point, densities_from in points
        ]
        text = quantization_table(
            pairs, shlex.join(["python", "benchmarks/roofline.py", *(sys.argv[1:] if argv is None else argv)])
        )
        args.quantized.parent.mkdir(parents=True, exist_ok=True)
        args.quantized.write_text(text, encoding="utf-8")
        print(f"\n{text}\n{len(pairs)} rows: {args.quantized}")
        results = [
            (kind, densities_from) for pair, densities_from in pairs for kind in (pair.plain, pair.small)
        ]
    if args.csv:
        rows = [csv_row(*result) for result in results]
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{len(rows)} rows: {args.csv}")
    if args.png:
        plot(args.png, results)
        print(f"plot: {args.png}")


if __name__ == "__main__":
    main(sys.argv[1:])
