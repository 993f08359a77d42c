"""The native CPU kernels against dense vLLM's CPU linears, layer by layer: time, bytes per second, crossover.

    python benchmarks/bench_cpu_kernels.py --geometry 1.3b --output results/cpu

Weights are random and rotate over more layers than the last cache holds; lists of neurons are random. In
every round each side runs once, so that what else the machine does falls on all alike; a row has the median
of the rounds' ratios, with their 20th and 80th percentile. Sides: `stock`, vLLM's packed oneDNN linears with
ReLU in between; `dense`, ours over all rows from weights as they lie; `sparse`, ours over a list, with the
prediction of it. The crossover of a batch is the union density at which `sparse` takes as long as `dense`, by
linear interpolation: fc2's rows survive at the union's rate on both.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Table, geometry, median, percentile, print_rows

from vllm_dejavu import timing
from vllm_dejavu.kernels import cpu, reference
from vllm_dejavu.kernels.cpu import KERNELS as NATIVE
from vllm_dejavu.kernels.interface import Call, Linear, LowRank, Mlp, Rows
from vllm_dejavu.published import GEOMETRIES
from vllm_dejavu.timing import Timer

DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def rounds(sides: dict[str, Callable[[int], Any]], layers: int, number: int) -> dict[str, list[float]]:
    """Milliseconds of one layer, of each side and round."""
    times = Timer(torch.device("cpu"), number)(sides, layers)
    return {side: [us / 1e3 for us in values] for side, values in times.items()}


def ratio(times: dict[str, list[float]], over: str, side: str) -> dict[str, float]:
    values = [a / b for a, b in zip(times[over], times[side], strict=True)]
    return {
        "ratio": median(values),
        "ratio_p20": percentile(values, 0.2),
        "ratio_p80": percentile(values, 0.8),
    }


class Layers:
    """Weights of some layers, plain for us and packed for vLLM's linears; a random predictor."""

    def __init__(self, hidden: int, ffn: int, rank: int, layers: int, dtype: torch.dtype):
        from vllm import _custom_ops

        self.mm = _custom_ops.onednn_mm

        def weights(rows: int, columns: int, fan_in: int) -> list[torch.Tensor]:
            made = []
            for _ in range(layers):
                weight = torch.empty(rows, columns, dtype=dtype)
                NATIVE.prepare_weight(weight)
                made.append(weight.copy_(torch.randn(rows, columns) * fan_in**-0.5))
            return made

        def packed(plain: list[torch.Tensor], transposed: bool = False) -> list[Any]:
            return [_custom_ops.create_onednn_mm(w if transposed else w.t(), 32) for w in plain]

        self.fc1, self.fc2_t = weights(ffn, hidden, hidden), weights(ffn, hidden, ffn)
        self.qkv, self.out = weights(3 * hidden, hidden, hidden), weights(hidden, hidden, hidden)
        self.packed_fc1, self.packed_fc2 = packed(self.fc1), packed(self.fc2_t, transposed=True)
        self.packed_qkv, self.packed_out = packed(self.qkv), packed(self.out)
        self.qkv_bias = torch.zeros(3 * hidden, dtype=dtype)
        # every neuron comes out positive: a list's rows are all read
        self.fc1_bias = torch.full((ffn,), 5.0, dtype=dtype)
        self.down = torch.randint(-127, 128, (rank, hidden), dtype=torch.int8)
        self.up = torch.randint(-127, 128, (ffn, rank), dtype=torch.int8)
        self.bias = torch.zeros(ffn)


def mlp_rows(weights: Layers, x: torch.Tensor, layers: int, number: int) -> list[dict[str, Any]]:
    tokens, ffn = x.shape[0], weights.fc1[0].shape[0]
    call = Call(torch.ones(tokens, dtype=torch.int32))
    pairs = zip(weights.fc1, weights.fc2_t, strict=True)
    mlps = [Mlp(Rows(fc1, weights.fc1_bias), Rows(fc2_t, transposed=True)) for fc1, fc2_t in pairs]
    lists = {d: reference.compact_union(torch.rand(1, ffn) < d) for d in DENSITIES}

    def stock(i: int) -> torch.Tensor:
        return weights.mm(
            weights.packed_fc2[i], torch.relu_(weights.mm(weights.packed_fc1[i], x, weights.fc1_bias)), None
        )

    def select(i: int) -> Any:
        return NATIVE.select_neurons(x, LowRank(weights.down, weights.up, weights.bias), call)

    def sparse(density: float) -> Callable[[int], Any]:
        return lambda i: NATIVE.sparse_mlp(x, mlps[i], lists[density], call)

    sides: dict[str, Callable[[int], Any]] = {"stock": stock, "select": select}
    sides["dense"] = lambda i: NATIVE.sparse_mlp(x, mlps[i])
    if tokens <= 64:
        sides |= {f"sparse {d}": sparse(d) for d in DENSITIES}
    times = rounds(sides, layers, number)
    size = weights.fc1[0].nbytes + weights.fc2_t[0].nbytes
    predict = median(times["select"])
    rows = [
        {
            "block": "mlp",
            "side": "stock",
            "density": 1.0,
            "ms": median(times["stock"]),
            "gbps": size / median(times["stock"]) / 1e6,
        }
    ]
    rows.append(
        {
            "block": "mlp",
            "side": "dense",
            "density": 1.0,
            "ms": median(times["dense"]),
            "gbps": size / median(times["dense"]) / 1e6,
            **ratio(times, "stock", "dense"),
        }
    )
    stock_gbps = rows[0]["gbps"]
    for d in DENSITIES if tokens <= 64 else ():
        ms, read = median(times[f"sparse {d}"]), int(lists[d].counts.sum()) / ffn
        rows.append(
            {
                "block": "mlp",
                "side": "sparse",
                "density": read,
                "ms": ms,
                "predict_ms": predict,
                "gbps": read * size / ms / 1e6,
                "gbps_ratio": read * size / ms / 1e6 / stock_gbps,
                **ratio(times, "stock", f"sparse {d}"),
            }
        )
    return rows


def projection_rows(
    weights: Layers, x: torch.Tensor, heads: int, layers: int, number: int
) -> list[dict[str, Any]]:
    tokens, hidden = x.shape
    call, size = Call(torch.ones(tokens, dtype=torch.int32)), hidden // heads
    attn, out = x.view(tokens, heads, size), torch.empty_like(x)
    predictor, bias = torch.randint(-127, 128, (heads, hidden), dtype=torch.int8), torch.zeros(heads)

    def qkv(i: int) -> Rows:
        return Rows(weights.qkv[i], weights.qkv_bias)

    rows = []
    for density in (0.5, 1.0) if tokens <= 64 else (1.0,):
        scores = (
            torch.where(torch.rand(heads).argsort() < density * heads, 1.0, -1.0)
            .expand(tokens, heads)
            .contiguous()
        )
        sides: dict[str, Callable[[int], Any]] = {
            "stock": lambda i: (
                weights.mm(weights.packed_qkv[i], x, weights.qkv_bias),
                weights.mm(weights.packed_out[i], x, None),
            ),
            "dense": lambda i: (
                NATIVE.linear(x, qkv(i)),
                NATIVE.linear(x, Rows(weights.out[i])),
            ),
        }
        if tokens <= 64:
            # what a dense attention block does not do: scores, and zeros for the heads of a row that others
            # selected
            sides["select"] = lambda i, s=scores: (
                NATIVE.score_heads(x, Linear(predictor, bias), call),
                NATIVE.mask_heads(attn, s),
            )
            sides["sparse"] = lambda i, s=scores: (
                NATIVE.sparse_qkv(x, qkv(i), s, size, call),
                NATIVE.sparse_out_proj(attn, Rows(weights.out[i]), s, out),
            )
        times = rounds(sides, layers, number)
        whole = weights.qkv[0].nbytes + weights.out[0].nbytes
        for side in ("stock", "dense", "sparse") if density == 1.0 else ("sparse",):
            if side not in times:
                continue
            read = whole if side != "sparse" else whole * (2 + 2 * density) / 4
            row = {
                "block": "qkv+out_proj",
                "side": side,
                "density": density,
                "ms": median(times[side]),
                "gbps": read / median(times[side]) / 1e6,
            }
            if side == "sparse":
                row["predict_ms"] = median(times["select"])
            rows.append(row if side == "stock" else {**row, **ratio(times, "stock", side)})
    return rows


def crossover(rows: list[dict[str, Any]], block: str) -> float | None:
    """`timing.crossover` of a block of a batch's rows; None where only one side was measured."""
    dense = [r["ms"] for r in rows if r["block"] == block and r["side"] == "dense"]
    points = [
        (r["density"], r["ms"] + r.get("predict_ms", 0.0))
        for r in rows
        if r["block"] == block and r["side"] == "sparse"
    ]
    return timing.crossover(dense[0], points) if dense and points else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Native CPU kernels against vLLM's CPU linears.")
    parser.add_argument("--geometry", choices=[*GEOMETRIES, "tiny"], default="1.3b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 1024])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rank", type=int, default=192, help="of the int8 predictor")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmark-out"))
    args = parser.parse_args()
    if not cpu.available():
        raise SystemExit("The native CPU kernels are not built; see setup.py.")
    torch.manual_seed(0)
    g = geometry(args.geometry)
    weights = Layers(g.hidden_size, g.ffn_dim, args.rank, args.layers, DTYPES[args.dtype])
    table = Table(args.output / f"kernels-{args.geometry}-{args.dtype}.csv")
    for tokens in args.tokens:
        x = torch.randn(tokens, g.hidden_size).to(DTYPES[args.dtype])
        number = max(5, min(args.rounds, 4 * args.rounds * 64 // (64 + tokens)))
        rows = mlp_rows(weights, x, args.layers, number) + projection_rows(
            weights, x, g.num_heads, args.layers, number
        )
        for row in rows:
            table.add(
                benchmark="cpu kernels",
                geometry=args.geometry,
                dtype=args.dtype,
                isa=cpu.isa(),
                threads=torch.get_num_threads(),
                tokens=tokens,
                synthetic=True,
                crossover=crossover(rows, row["block"]),
                load=os.getloadavg()[0],
                **row,
            )
        print_rows(
            [r for r in table.rows if r["tokens"] == tokens],
            (
                "tokens",
                "block",
                "side",
                "density",
                "ms",
                "predict_ms",
                "gbps",
                "ratio",
                "ratio_p20",
                "ratio_p80",
                "crossover",
            ),
        )


if __name__ == "__main__":
    main()
