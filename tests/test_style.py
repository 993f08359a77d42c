"""How the code is written: ruff's rules and format, short files, imports that point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 500

# Which room a module is in, and which rooms its module-level imports may enter. Training and serving share
# what an artifact is and what a predictor computes; neither imports the
# other. Kernels import nothing of ours.
SHARED = (
    "__init__ artifact auto config families locate manifest markdown metrics predictor published quantization"
    " roofline selection sizes timing"
)
COMMANDS = "cli inspection plan plan_table tune"
ENTERS = {
    "kernels": {"kernels"},
    "shared": {"shared", "kernels"},
    "training": {"training", "shared", "kernels"},
    "commands": {"commands", "shared", "kernels"},
    "serving": {"serving", "commands", "shared", "kernels"},
}
WITHOUT_TORCH = ("config", "families", "manifest", "sizes", "published")


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_finds_nothing(command):
    """`make format` mends what this finds, but for what takes a thought."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def sources() -> list[Path]:
    rooms = ("vllm_dejavu", "kernels", "predictor_training", "benchmarks", "scripts", "tests")
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def test_cpp_is_short_and_narrow():
    """Python's columns are ruff's business; kernels/csrc/.clang-format says how C++ is formatted."""
    for path in [*(ROOT / "kernels/csrc").glob("*.cpp"), *(ROOT / "kernels/csrc").glob("*.h")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= MOST_LINES and max(map(len, lines)) <= 110, path.name


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_says_its_idea_first(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES, "split it, each part along one idea"
    assert ast.get_docstring(ast.parse(text)), "its first line says what it holds"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "vllm_dejavu" else ("vllm_dejavu", *parts)).removesuffix(".__init__")


PACKAGE = {
    module_of(path): ast.parse(path.read_text(encoding="utf-8"))
    for room in ("vllm_dejavu", "kernels", "predictor_training")
    for path in sorted((ROOT / room).rglob("*.py"))
}


def imported(tree: ast.AST) -> Iterator[str]:
    """What a module imports when it is imported itself: not in functions, not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in PACKAGE else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield from imported(node)


GRAPH = {module: set(imported(tree)) for module, tree in PACKAGE.items()}


def room_of(module: str) -> str:
    name = module.removeprefix("vllm_dejavu").removeprefix(".") or "__init__"
    if name.split(".")[0] in ("kernels", "predictor_training"):
        return {"kernels": "kernels", "predictor_training": "training"}[name.split(".")[0]]
    return "shared" if name in SHARED.split() else "commands" if name in COMMANDS.split() else "serving"


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_one_way(module):
    ours = {name for name in GRAPH[module] if name.partition(".")[0] == "vllm_dejavu"}
    assert ours <= set(GRAPH), "imports of ours that do not exist"
    wrong = {name for name in ours if room_of(name) not in ENTERS[room_of(module)]}
    assert not wrong, f"a module of the room {room_of(module)} imports {sorted(wrong)}"


def test_no_module_imports_itself_in_a_circle():
    ours = {module: names & set(GRAPH) for module, names in GRAPH.items()}
    list(TopologicalSorter(ours).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_front_ends_read_imports_no_torch(module):
    seen, todo = set(), [f"vllm_dejavu.{module}"]
    while todo:
        for name in GRAPH.get(todo.pop(), set()) - seen:
            seen.add(name)
            todo.append(name)
    assert not {name.partition(".")[0] for name in seen} & {"torch", "vllm", "transformers", "triton"}
