"""Building the native CPU kernels: without what it takes, and with sanitizers. Nothing is built in the
checkout.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_S

ROOT = Path(__file__).parent.parent
IN_PLACE = ROOT / "kernels/_cpu.so"


def build(folder: Path, **env: str) -> subprocess.CompletedProcess:
    """`setup.py build_ext` into a folder; the library is then folder/lib/vllm_dejavu/kernels/_cpu.so."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_DEJAVU_CPU_")}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(folder / "lib"),
        "--build-temp",
        str(folder / "temp"),
    ]
    return subprocess.run(command, cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=HANG_S)


def stamp(path: Path):
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None


def without_torch(folder: Path) -> dict[str, str]:
    (folder / "torch.py").write_text("raise ImportError('broken on purpose')\n")
    return {"PYTHONPATH": str(folder)}


LACKING = {
    "torch": (without_torch, "PyTorch cannot be imported while building (broken on purpose)"),
    "compiler": (lambda _: {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc"}, "compiling failed"),
    "compiler-and-ninja": (
        lambda folder: {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc", "PATH": str(folder)},
        "compiling failed",
    ),
    "wish": (lambda _: {"VLLM_DEJAVU_CPU_KERNELS": "0"}, "VLLM_DEJAVU_CPU_KERNELS is 0"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_without_what_it_takes_nothing_is_built_and_that_is_said(lacking, tmp_path):
    """Installing goes on: the reference runs on a CPU."""
    environment, message = LACKING[lacking]
    before = stamp(IN_PLACE)
    done = build(tmp_path, **environment(tmp_path))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "native CPU kernels are not built" in line]
    assert (
        len(said) == 1 and message in said[0] and "the PyTorch reference will run, which is slow" in said[0]
    ), done.stderr
    assert not list(tmp_path.rglob("*.so")) and stamp(IN_PLACE) == before


@pytest.mark.parametrize("lacking", [name for name in LACKING if name != "wish"])
def test_where_the_kernels_were_asked_for_their_absence_is_an_error(lacking, tmp_path):
    environment, message = LACKING[lacking]
    before = stamp(IN_PLACE)
    done = build(tmp_path, **environment(tmp_path), VLLM_DEJAVU_CPU_KERNELS="1")
    assert done.returncode != 0
    assert "native CPU kernels are not built" in done.stderr and message in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.so")) and stamp(IN_PLACE) == before


# What runs in this process and reaches every kernel of every instruction set, at every tail.
SANITIZED = (
    "odd_sizes or power_of_two or one_neuron or mask_heads or wider_tensors or more_threads or widened"
)


def runtime(name: str) -> str | None:
    """The compiler's own library of this name, or None."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() else None


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """Reads and writes outside a tensor, and undefined behaviour, that results need not show."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if None in libraries:
        pytest.skip("g++ has no libasan or libubsan")
    flags = (  # O1 takes five times as long to compile
        "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O0"
    )
    done = build(tmp_path, CXX="g++", VLLM_DEJAVU_CPU_KERNELS="1", VLLM_DEJAVU_CPU_FLAGS=flags)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    [library] = tmp_path.rglob("_cpu.so")
    env = os.environ | {
        "TEST_CPU_LIBRARY": str(library),
        "DEJAVU_ON_DEMAND": "1",  # none of these is skipped
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        "-k",
        SANITIZED,
        *map(str, sorted((ROOT / "tests").glob("test_kernel_native*.py"))),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0 and " passed" in done.stdout and " skipped" not in done.stdout, (
        done.stdout + done.stderr
    )[-6000:]
