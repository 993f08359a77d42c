"""What the native CPU kernels refuse, and their library: found, chosen, broken, missing."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import HANG_S
from kernel_checks import (
    as_half,
    as_int64,
    column_major,
    narrower,
    one_less,
    wider_strides,
)
from kernel_flat import flat_reference as reference
from kernel_inputs import NAN
from native import ISAS, checks, every_isa_and_dtype, native, rand

from vllm_dejavu.kernels import cpu
from vllm_dejavu.kernels.interface import implementation

# What is refused


def on_meta(tensor):
    return tensor.to("meta")


def as_double(tensor):
    return tensor.double()


def one_dimension(tensor):
    return tensor.flatten()


REFUSED = [
    ("score_heads", "x", narrower, r"x must be a CPU tensor \[rows, 600\], got \[20, 599\]"),
    ("score_heads", "x", column_major, r"rows of x must be contiguous, strides are \[1, 20\]"),
    ("score_heads", "x", on_meta, "Meta"),
    (
        "score_heads",
        "weight",
        column_major,
        r"rows of weight of the head predictor must be contiguous, strides are \[1, 4\]",
    ),
    ("score_heads", "weight", as_double, "bfloat16, int8 or uint8 .*, got Double"),
    ("score_heads", "weight", as_int64, "bfloat16, int8 or uint8 .*, got Long"),
    (
        "score_heads",
        "bias",
        one_less,
        r"bias of the head predictor must be a contiguous CPU tensor \[4\] of Float, got \[3\] of Float",
    ),
    ("score_heads", "bias", as_half, r"bias of the head predictor must be .* of Float, got \[4\] of Half"),
    (
        "score_heads",
        "row_lens",
        one_less,
        r"row_lens must be a contiguous CPU tensor \[20\] of Int, got \[19\]",
    ),
    ("score_heads", "row_lens", as_int64, "row_lens must be .* of Int, got .* of Long"),
    ("select_neurons", "x", narrower, r"x must be a CPU tensor \[rows, 600\], got \[20, 599\]"),
    ("select_neurons", "down", one_less, r"down must be a CPU tensor \[20, 600\], got \[19, 600\]"),
    ("select_neurons", "down", column_major, "rows of down must be contiguous"),
    ("select_neurons", "up", narrower, r"down must be a CPU tensor \[19, 600\], got \[20, 600\]"),
    ("select_neurons", "up", column_major, "rows of up must be contiguous"),
    ("select_neurons", "up", as_double, "got Double"),
    ("select_neurons", "bias", as_half, "bias of the MLP predictor must be .* of Float, got .* of Half"),
    ("select_neurons", "row_lens", one_less, "row_lens must be"),
    ("select_neurons", "heads", lambda h: (one_less(h[0]), *h[1:]), "row_lens must be"),
    ("select_neurons", "heads", lambda h: (*h[:2], one_less(h[2])), "bias of the head predictor must be"),
    ("sparse_mlp", "x", narrower, r"x must be a CPU tensor \[rows, 100\], got \[20, 99\]"),
    ("sparse_mlp", "x", as_half, "fc1's weight must have x's dtype Half and no scale, or be int8, got Float"),
    ("sparse_mlp", "fc1_weight", as_half, "fc1's weight must have x's dtype Float"),
    ("sparse_mlp", "fc1_weight", column_major, "rows of fc1's weight must be contiguous"),
    ("sparse_mlp", "fc1_bias", one_less, r"bias must have 300 contiguous elements, got \[299\]"),
    ("sparse_mlp", "fc1_bias", as_int64, "got Long"),
    (
        "sparse_mlp",
        "fc2_weight_t",
        one_less,
        r"fc2's transposed weight must be a CPU tensor \[300, 100\], got \[299, 100\]",
    ),
    ("sparse_mlp", "fc2_weight_t", column_major, "rows of fc2's transposed weight must be contiguous"),
    ("sparse_mlp", "neuron_ids", as_int64, "neuron_ids must be .* of Int, got .* of Long"),
    ("sparse_mlp", "neuron_ids", one_less, r"neuron_ids must be a contiguous CPU tensor \[300\]"),
    (
        "sparse_mlp",
        "counts",
        one_less,
        r"counts must be a contiguous CPU tensor \[3\] of Int, got \[2\] of Int",
    ),
    ("sparse_mlp", "row_lens", one_less, "row_lens must be"),
    ("sparse_mlp", "row_mask", one_less, r"row_mask must be a CPU tensor \[20, 300\], got \[19, 300\]"),
    ("sparse_mlp", "row_mask", as_int64, "expected scalar type Bool but found Long"),
    (
        "sparse_mlp",
        "counters",
        lambda _: torch.zeros(5, dtype=torch.int32),
        r"counters must be .* of int64 with at least 5 elements, got \[5\] of Int",
    ),
    (
        "sparse_mlp",
        "counters",
        lambda _: torch.zeros(4, dtype=torch.int64),
        r"counters must be .* at least 5 elements, got \[4\] of Long",
    ),
    (
        "select_neurons",
        "counters",
        lambda _: torch.zeros(2, dtype=torch.int64),
        r"counters must be .* at least 5 elements, got \[2\] of Long",
    ),
    (
        "sparse_qkv",
        "counters",
        lambda _: torch.zeros(2, dtype=torch.int64),
        r"counters must be .* at least 5 elements, got \[2\] of Long",
    ),
    ("dense_mlp", "x", narrower, r"x must be a CPU tensor \[rows, 100\], got \[20, 99\]"),
    ("dense_mlp", "fc1_weight", as_half, "fc1's weight must have x's dtype Float"),
    ("dense_mlp", "fc1_bias", one_less, r"bias must have 300 contiguous elements, got \[299\]"),
    (
        "dense_mlp",
        "fc2_weight_t",
        one_less,
        r"fc2's transposed weight must be a CPU tensor \[300, 100\], got \[299, 100\]",
    ),
    ("linear", "x", one_dimension, "x must be a CPU tensor"),
    ("linear", "x", narrower, r"x must be a CPU tensor \[rows, 100\], got \[20, 99\]"),
    (
        "linear",
        "weight",
        as_half,
        "weight must have x's dtype Float and no scale, or be int8, got Half",
    ),
    ("linear", "weight", column_major, "rows of weight must be contiguous"),
    ("linear", "bias", one_less, r"bias must have 300 contiguous elements, got \[299\]"),
    (
        "sparse_qkv",
        "weight",
        as_half,
        "weight must have x's dtype Float and no scale, or be int8, got Half",
    ),
    ("sparse_qkv", "weight", lambda w: w[:63], "at least 64 rows, got 63"),
    ("sparse_qkv", "bias", one_less, r"bias must have 128 contiguous elements, got \[127\]"),
    ("sparse_qkv", "head_scores", one_less, r"head_scores must be a CPU tensor \[20, 4\], got \[19, 4\]"),
    ("sparse_qkv", "head_scores", as_half, "head_scores must be contiguous float32, got Half"),
    ("sparse_qkv", "head_scores", wider_strides, "head_scores must be contiguous"),
    ("sparse_qkv", "row_lens", as_int64, "row_lens must be .* of Int, got .* of Long"),
    ("sparse_out_proj", "weight", narrower, r"weight must be a CPU tensor \[rows, 64\], got \[100, 63\]"),
    ("sparse_out_proj", "weight", as_half, "attn, weight and output must have one dtype"),
    ("sparse_out_proj", "head_scores", as_half, "head_scores must be contiguous float32, got Half"),
    (
        "sparse_out_proj",
        "output",
        lambda _: rand(20, 99),
        r"output must be a CPU tensor \[20, 100\], got \[20, 99\]",
    ),
    ("sparse_out_proj", "output", lambda _: wider_strides(rand(20, 100)), "output must be contiguous"),
]


@pytest.mark.parametrize(
    ("name", "argument", "change", "message"), REFUSED, ids=[f"{n}-{a}-{m}" for n, a, _, m in REFUSED]
)
def test_wrong_arguments_are_refused_by_name(name, argument, change, message):
    """A wrong shape, dtype, stride or device is an error that says what was expected and what came."""
    arguments = checks.arguments(name)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        getattr(native, name)(**{**arguments, argument: change(arguments.get(argument))})


@pytest.mark.parametrize("tokens", [1, 8, 20, 130], ids=lambda n: f"{n}-tokens")
@every_isa_and_dtype
def test_a_broken_activation_shows(tokens, dtype, isa):
    """ReLU once turned NaN into 0, so that a broken hidden state came out of a dense MLP as if nothing were
    wrong.
    """
    x, fc1, fc2 = (
        rand(tokens, 64, dtype=dtype),
        rand(96, 64, seed=1, fan_in=64, dtype=dtype),
        rand(96, 64, seed=2, fan_in=96, dtype=dtype),
    )
    x[-1, 3] = NAN
    out = native.dense_mlp(x, fc1, None, fc2)
    assert out[-1].isnan().all() and not out[:-1].isnan().any()


@pytest.mark.parametrize("name", ["sparse_mlp", "dense_mlp"])
def test_an_unknown_activation_is_refused(name):
    with pytest.raises(ValueError, match="know the activations .'relu', 'relu2'., got 'gelu'"):
        getattr(native, name)(**checks.arguments(name), activation="gelu")


def test_an_unknown_instruction_set_is_refused_with_the_list():
    """The one in use stays."""
    before = cpu.isa()
    with pytest.raises(
        RuntimeError, match=f"no instruction set 'sse9'; it has: {' '.join(ISAS)} .VLLM_DEJAVU_CPU_ISA"
    ):
        cpu.use_isa("sse9")
    assert cpu.isa() == before


def python(code, **env):
    begin = (
        "from pathlib import Path; from vllm_dejavu.kernels import cpu; cpu.LIBRARY ="
        f" Path({str(cpu.LIBRARY)!r}); cpu.available()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", begin + code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


@pytest.mark.parametrize("name", [ISAS[-1], "sse9"])
def test_the_environment_names_the_instruction_set(name):
    """Read when a kernel first runs; a name that this CPU does not have is an error, not another instruction
    set.
    """
    done = python(
        "import torch; from vllm_dejavu.kernels.interface import Rows;"
        " print(cpu.KERNELS.linear(torch.ones(1, 3), Rows(torch.ones(1, 3))).item(), cpu.isa())",
        VLLM_DEJAVU_CPU_ISA=name,
    )
    if name in ISAS:
        assert done.stdout.split() == ["3.0", name], done.stderr
    else:
        assert done.returncode != 0
        assert f"no instruction set 'sse9'; it has: {' '.join(ISAS)} (VLLM_DEJAVU_CPU_ISA)" in done.stderr


# The library


def test_a_library_that_cannot_be_loaded_is_an_error_with_its_remedy(tmp_path, monkeypatch):
    """A build for another PyTorch must not silently become the slow reference."""
    broken = tmp_path / "_cpu.so"
    broken.write_bytes(b"not a library" * 100)
    monkeypatch.setattr(cpu, "LIBRARY", broken)
    with pytest.raises(
        RuntimeError,
        match=f"{broken} cannot be loaded with torch .*install vllm-dejavu again.*or delete that file",
    ):
        cpu.available.__wrapped__()


def test_without_the_library_the_reference_runs(tmp_path, monkeypatch):
    assert implementation("cpu") is cpu.KERNELS
    try:
        monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
        cpu.available.cache_clear()
        implementation.cache_clear()
        assert implementation("cpu") is reference.kernels
    finally:
        monkeypatch.undo()
        cpu.available.cache_clear()
        implementation.cache_clear()
    assert implementation("cpu") is cpu.KERNELS


def test_one_openmp_library_serves_all():
    """A second one would bring threads of its own, which vLLM has not bound to cores."""
    code = """
import torch
torch.set_num_threads(2)
weight = torch.ones(300, 64)
torch.ops.dejavu_cpu.dense_mlp(torch.ones(20, 64), weight, None, None, weight, None, None, False, 1.0)
names = "libgomp", "libiomp", "libomp"
print(*{line.split()[-1] for line in open("/proc/self/maps") if any(n in line for n in names)})
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout


def test_the_library_links_no_openmp_of_its_own():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not on PATH")
    done = subprocess.run(["readelf", "-d", str(cpu.LIBRARY)], capture_output=True, text=True, check=True)
    needed = [line for line in done.stdout.splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if "omp" in line], needed
