"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], lines: Iterable[Sequence[str]], rule: str = "---") -> list[str]:
    """Its lines. rule: what stands under every heading, blanks included."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + f"{rule}|" * len(header),
        *("| " + " | ".join(cells) + " |" for cells in lines),
    ]
