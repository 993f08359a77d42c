"""C++ with many faults in it, of which a variable chooses one: a single build serves them all."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from faults_base import Fault  # noqa: E402


def blanked(text: str) -> str:
    """C++ without comments, strings and the commas of template arguments, at the same places."""
    blank = (
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'
        + r"'(?:\\.|[^'\\\n])*'|(?<=\w)<[\w:, ]*,[\w:, ]*>(?=[({ ])"
    )
    return re.sub(blank, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)


def partner(code: str, place: int) -> int:
    """Where the bracket at a place is closed or, of a closing one, was opened."""
    step, depth = (1, 0) if code[place] in "([{" else (-1, 0)
    while True:
        depth += (code[place] in "([{") - (code[place] in ")]}")
        if not depth:
            return place
        place += step


def expression(code: str, start: int, end: int) -> tuple[int, int]:
    """The whole expression around code[start:end]: what may stand in brackets."""
    while start:
        before = code[start - 1]
        if before in ")]":
            opened = partner(code, start - 1)
            if before == ")" and re.search(r"\b(if|for|while|switch|constexpr)\s*$", code[:opened]):
                break
            start = opened
        elif before in "([{};,":
            break
        elif before == "=":
            if code[start] != "=" and code[start - 2] not in "=!<>":
                break  # what is assigned
            start -= 2
        else:
            start -= 1
    start += len(re.match(r"\s*(?:(?:return|else)\b\s*)*", code[start:])[0])
    while code[end] not in ")]};,":
        end = partner(code, end) + 1 if code[end] in "([{" else end + 1
    return start, end


def difference(text: str, fault: Fault) -> tuple[int, int, str]:
    """text[start:end] that differs, and what takes its place."""
    old, new = fault.old, fault.new
    same = len(os.path.commonprefix([old, new]))
    tail = len(os.path.commonprefix([old[same:][::-1], new[same:][::-1]]))
    at = text.index(old)
    return at + same, at + len(old) - tail, new[same : len(new) - tail]


def with_switches(text: str, faults: dict[int, Fault]) -> str:
    """C++ in which `dejavu_fault` chooses one of the faults, by number; 0 chooses none.

    A fault that leaves out a statement puts it behind an `if`. Any other one becomes a choice between two
    expressions; those that share an expression, a choice among several.
    """
    code = blanked(text)
    differences = {number: difference(text, fault) for number, fault in faults.items()}
    groups: list[tuple[int, int, list[int]]] = []
    for number, (start, end, _) in sorted(
        differences.items(), key=lambda item: expression(code, *item[1][:2])
    ):
        if faults[number].new:
            start, end = expression(code, start, end)
        if groups and start < groups[-1][1]:
            first, last, members = groups.pop()
            groups.append((first, max(last, end), [*members, number]))
        else:
            groups.append((start, end, [number]))
    for start, end, members in reversed(groups):
        switched = text[start:end]
        for number in members:
            a, b, new = differences[number]
            if faults[number].new:
                switched = f"(dejavu_fault == {number} ? ({text[start:a]}{new}{text[b:end]}) : ({switched}))"
            else:
                switched = f"if (dejavu_fault != {number}) {{ {switched} }}"
        text = text[:start] + switched + text[end:]
    return text
