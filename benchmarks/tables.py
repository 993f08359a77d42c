"""Markdown tables of the benchmarks: what stands in a cell, and columns that know how to fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm_dejavu import markdown

Column = tuple[str, Callable[[Any], str]]  # heading, and the cell of a row
SPACED = " --- "  # the rule under the headings, as formatters of Markdown write it


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def of_columns(columns: Sequence[Column], rows: Iterable[Any], rule: str = SPACED) -> list[str]:
    """Lines of a table, a column at a time."""
    return markdown.table(
        [name for name, _ in columns], [[fill(row) for _, fill in columns] for row in rows], rule
    )
