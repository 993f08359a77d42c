"""Markdown of a speed.csv of bench_engine.py, for READMEs.

python benchmarks/speed_table.py benchmarks/results/cpu/speed.csv
"""

from __future__ import annotations

import csv
import sys

import tables

from vllm_dejavu import markdown

HEADER = (
    "model",
    "batch",
    "context",
    "MLP density (union)",
    "head density",
    "dense ms/token",
    "dejavu ms/token",
    "speed-up (range)",
    "prefill",
    "weights GB/s, dense",
    "dejavu",
    "Transformers ms/token",
)


def line(row: dict[str, str]) -> tuple[str, ...]:
    def number(key: str, form: str) -> str:
        return tables.cell(float(row[key]) if row.get(key) else None, form)

    name = f"OPT-{row['geometry'].upper()}, synthetic" if row["synthetic"] == "True" else row["geometry"]
    speedup = (
        f"**{number('speedup', '.2f')}x** ({number('speedup_min', '.2f')}-{number('speedup_max', '.2f')})"
        if row.get("speedup")
        else "-"
    )
    prefill = f"{number('prefill_ratio', '.2f')}x" if row.get("prefill_ratio") else "-"
    return (
        name,
        row["batch"],
        row["context"],
        f"{number('mlp_counted', '.2f')} ({number('mlp_union', '.2f')})",
        number("head_counted", ".2f"),
        number("dense_ms", ".1f"),
        number("dejavu_ms", ".1f"),
        speedup,
        prefill,
        number("dense_gbps", ".1f"),
        number("dejavu_gbps", ".1f"),
        number("hf_ms", ".1f"),
    )


def main() -> None:
    with open(sys.argv[1], newline="", encoding="utf-8") as file:
        rows = [line(row) for row in csv.DictReader(file) if row.get("speedup")]
    print("\n".join(markdown.table(HEADER, rows, tables.SPACED)))


if __name__ == "__main__":
    main()
