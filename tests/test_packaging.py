"""What is installed, what importing costs, and which way imports point."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import HANG_S

ROOT = Path(__file__).parent.parent
FOLDERS = ("vllm_dejavu", "kernels", "predictor_training", "tests", "benchmarks", "scripts", "examples")
SOURCES = [ROOT / "setup.py", *(p for d in FOLDERS for p in sorted((ROOT / d).rglob("*.py")))]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_vllm():
    """vLLM loads its plugins in every process; ours must cost nothing there."""
    code = (
        "import sys, vllm_dejavu, vllm_dejavu.config, vllm_dejavu.cli; print([m for m in ('torch', 'vllm',"
        " 'transformers') if m in sys.modules])"
    )
    assert python(code, PYTHONPATH=str(ROOT)) == "[]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_our_modules_are_imported_by_their_full_name(path):
    """A bare `import kernels` would make second copies of modules, or find transformers' package of that
    name.
    """
    bare = {m for m in imports(path) if m.split(".")[0] in ("kernels", "predictor_training")}
    assert not bare


def test_imports_point_one_way():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not {
            m
            for m in imports(path)
            if m.startswith("vllm_dejavu") and not m.startswith("vllm_dejavu.kernels")
        }, path
    for path in (ROOT / "vllm_dejavu").glob("*.py"):
        if path.name not in ("cli.py",):
            assert not {m for m in imports(path) if m.startswith("vllm_dejavu.predictor_training")}, path
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name != "test_packaging.py"], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_nothing_is_unpickled_and_no_remote_code_runs(path):
    assert not re.search(
        r"pickle\.load|torch\.load\(|trust_remote_code\s*=\s*True", path.read_text(encoding="utf-8")
    )


def pip(command: str, *args: str) -> subprocess.CompletedProcess:
    """Without dependencies, and without asking an index for a newer pip."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            command,
            "-q",
            "--no-deps",
            "--no-index",
            *args,
        ],
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that no build folder is left in the checkout."""
    copy, out = tmp_path_factory.mktemp("source") / "src", tmp_path_factory.mktemp("wheel")
    # What goes into it and no more: beside it, other tests may be building, and a tree that changes cannot be
    # copied.
    for part in ("vllm_dejavu", "kernels", "predictor_training"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # That the real ones compile, installing has shown; here it is about where the library goes.
    for source in (copy / "kernels" / "csrc").glob("*.cpp"):
        source.write_text("")
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    done = pip("wheel", "--no-build-isolation", "-w", str(out), str(copy))
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_adds_nothing_global_but_our_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {"vllm_dejavu", "vllm_dejavu-0.1.0.dist-info"}
    for part in ("vllm_dejavu", "kernels", "predictor_training"):
        inside = "vllm_dejavu" if part == "vllm_dejavu" else f"vllm_dejavu/{part}"
        for path in (ROOT / part).glob("*.py"):
            assert f"{inside}/{path.name}" in names


def test_the_wheel_holds_the_native_kernels(wheel):
    """Built where they can be; the checkout's own library is not what is packed."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("the native kernels need Linux and a C++ compiler")
    assert "vllm_dejavu/kernels/_cpu.so" in zipfile.ZipFile(wheel).namelist()
    assert "linux" in wheel.name, "a wheel with machine code must not claim to run anywhere"


def test_the_wheel_declares_plugin_command_and_extras(wheel):
    with zipfile.ZipFile(wheel) as z:
        entry_points = z.read("vllm_dejavu-0.1.0.dist-info/entry_points.txt").decode()
        metadata = z.read("vllm_dejavu-0.1.0.dist-info/METADATA").decode()
    assert "[vllm.general_plugins]\ndejavu = vllm_dejavu:register" in entry_points
    assert "vllm-dejavu = vllm_dejavu.cli:main" in entry_points
    assert re.findall(r"Provides-Extra: (\S+)", metadata) == ["cuda", "cpu", "ray", "train", "eval", "dev"]
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert not any("vllm" in line for line in required), "neither vLLM distribution is required by itself"


def test_an_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    done = pip("install", "--target", str(tmp_path), str(wheel))
    assert done.returncode == 0, done.stderr
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        " import vllm_dejavu, vllm_dejavu.kernels.reference as r, vllm_dejavu.predictor_training.data as d;"
        " print(vllm_dejavu.__file__, r.__file__, d.__file__)"
    )
    files = python(code, PYTHONPATH=str(tmp_path)).split()
    assert len(files) == 3 and all(f.startswith(str(tmp_path)) for f in files)
