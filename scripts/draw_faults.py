"""Draw faults by seed: operators, bounds and constants of the code, changed where chance says.

    python scripts/draw_faults.py SEED NUMBER [FILE ...]

writes tests/drawn_faults.json; what that says of equivalent changes stays with those that are drawn again.
With files, such as what was written since, the new ones are drawn from these and added.

Each file of tests/faults.py's TESTS_OF gets one, and the rest fall on them by how much there is to change;
in a file every change is as likely as any other. Changed are comparisons, arithmetic, `and` and `or`, `min`
and `max`, `any` and `all`, and integers, in the code of functions: no docstrings, messages, annotations,
tables, or constants of the compiler. No change is left out because no test notices it.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from faults import DRAWN, DRAWN_FILE  # noqa: E402
from faults_base import TESTS_OF  # noqa: E402
from faults_switch import blanked  # noqa: E402

WORDS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "//": "*",
    "%": "//",
    "and": "or",
    "or": "and",
    "&&": "||",
    "||": "&&",
    "&": "|",
    "|": "&",
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "is": "is not",
    "is not": "is",
    "in": "not in",
    "not in": "in",
    "minimum": "maximum",
    "maximum": "minimum",
}
SILENT = {
    "raise",
    "check",
    "check_matrix",
    "info",
    "warning",
    "debug",
    "error",
    "log",
    "progress",
    "say",
    "TORCH_CHECK",
}

Change = tuple[int, int, str, str]  # start, end, new text, name of the function


def python_changes(text: str) -> Iterator[Change]:
    """Of code in functions."""
    starts = [0]
    for line in text.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    assert text.isascii()  # so that ast's columns are characters

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    def span(node: ast.AST) -> tuple[int, int]:
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    def between(left: ast.AST, right: ast.AST, function: str) -> Iterator[Change]:
        start, end = span(left)[1], span(right)[0]
        words = [m for m in re.finditer(r"not in|is not|[a-z]+|[-+*/%<>=!&|]+", text[start:end])]
        if len(words) == 1 and words[0][0] in WORDS:
            yield start + words[0].start(), start + words[0].end(), WORDS[words[0][0]], function

    def visit(node: ast.AST, function: str) -> Iterator[Change]:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.arguments, ast.AnnAssign, ast.Assert)):
            return
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in SILENT:
                return
            if name in WORDS:
                end = span(node.func)[1]
                yield end - len(name), end, WORDS[name], function
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            children: list[ast.AST] = node.body
            function = node.name
        elif isinstance(node, (ast.Module, ast.ClassDef)):
            children = [
                n for n in node.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            ]
        else:
            children = list(ast.iter_child_nodes(node))
        if function:
            if isinstance(node, ast.Compare):
                for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                    yield from between(left, right, function)
            elif isinstance(node, ast.BinOp):
                yield from between(node.left, node.right, function)
            elif isinstance(node, ast.BoolOp):
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from between(left, right, function)
            elif isinstance(node, ast.Constant) and type(node.value) is int:
                yield *span(node), str(node.value + 1), function
        for child in children:
            yield from visit(child, function)

    yield from visit(ast.parse(text), "")


def native_changes(text: str) -> Iterator[Change]:
    """Of C++ in functions, by its indented lines."""
    code, at, function = blanked(text), 0, ""
    for line in code.split("\n"):
        declared = re.match(
            r"(?:  (?!return|else))?(?!template|struct)[\w:][\w:<>*& ]* [*&]*(\w+)\(.*[{,]$", line
        )
        function = declared[1] if declared else function
        silent = re.match(
            r"\s*(case|template|static|using|constexpr|m\.|TORCH_CHECK|const Type|if constexpr|switch)|#|\S",
            line,
        )
        if not silent and "TORCH_CHECK" not in line and "constexpr" not in line:
            for m in re.finditer(
                r"(?<= )(<=?|>=?|[!=]=|&&|\|\||[-+*/%])(?= )|(?<=std::)(min|max)\b|(?<![\w.<])\d+(?![\w.>])",
                line,
            ):
                new = WORDS[m[0]] if m[0] in WORDS else str(int(m[0]) + 1)
                yield at + m.start(), at + m.end(), "-" if m[0] == "%" else new, function
        at += len(line) + 1


def entry(file: str, text: str, change: Change) -> dict[str, str]:
    """As tests/drawn_faults.json holds it: with as little of the text around as makes it unique."""
    start, end, new, function = change
    first, last = start, end
    while (
        last - first < 16
        or text.count(text[first:last]) > 1
        or cuts_word(text, first)
        or cuts_word(text, last)
    ):
        left, right = text[first - 1] != "\n", text[last] != "\n"
        whole = last - first >= 16 and text.count(text[first:last]) == 1
        if right and (cuts_word(text, last) or not whole):
            last += 1
        if left and (cuts_word(text, first) or not whole):
            first -= 1
        if not left and not right:  # the same line elsewhere
            first -= 1
    words = re.sub(
        r"[^a-z0-9]+", "-", f"{Path(file).stem} {function} {spoken(text[start:end])} to {spoken(new)}".lower()
    )
    return {
        "name": words.strip("-"),
        "file": file,
        "old": text[first:last],
        "new": text[first:start] + new + text[end:last],
    }


def cuts_word(text: str, place: int) -> bool:
    return bool(re.fullmatch(r"\w\w", text[place - 1 : place + 1]))


def spoken(word: str) -> str:
    names = {
        "<": "lt",
        "<=": "le",
        ">": "gt",
        ">=": "ge",
        "==": "eq",
        "!=": "ne",
        "+": "plus",
        "-": "minus",
        "*": "times",
        "/": "over",
        "//": "over",
        "%": "modulo",
        "&&": "and",
        "||": "or",
        "&": "and",
        "|": "or",
    }
    return names.get(word, word)


def draw(seed: int, number: int, among: Iterable[str], taken: Iterable[str]) -> list[dict[str, str]]:
    """New entries; `taken`: names that there are."""
    chance, names = random.Random(seed), list(taken)
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in among}
    changes = {
        f: list((python_changes if f.endswith(".py") else native_changes)(t)) for f, t in texts.items()
    }
    files, sizes = list(changes), [len(c) for c in changes.values()]
    turns = [*files, *chance.choices(files, sizes, k=max(0, number - len(files)))][:number]
    entries: list[dict[str, str]] = []
    for file in sorted(turns, key=files.index):
        change = changes[file].pop(chance.randrange(len(changes[file])))
        made = entry(file, texts[file], change)
        same = sum(name.split("--")[0] == made["name"] for name in names)
        names.append(f"{made['name']}--{same + 1}" if same else made["name"])
        entries.append({**made, "name": names[-1]})
    return entries


if __name__ == "__main__":
    among = sys.argv[3:]
    before = json.loads(DRAWN_FILE.read_text(encoding="utf-8")) if among else []
    taken = [known["name"] for known in before]
    entries = before + draw(int(sys.argv[1]), int(sys.argv[2]), among or TESTS_OF, taken)
    reasons = {(f.file, f.old, f.new): f.equivalent for f in DRAWN if f.equivalent}
    for made in entries:
        if reason := reasons.get((made["file"], made["old"], made["new"])):
            made["equivalent"] = reason
    DRAWN_FILE.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
