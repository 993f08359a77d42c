"""The native CPU kernels as their tests take them: instruction sets, types and sizes, and one set at a time.

TEST_CPU_LIBRARY names another build of the extension, whose tests then run with inputs that fill their memory
exactly: a sanitizer sees what is read behind their end (test_build_native.py).
"""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fuzz import fuzz
from kernel_checks import (
    Checks,
)
from kernel_flat import Flat
from kernel_flat import flat_reference as reference
from tolerances import DTYPE_IDS, DTYPES, assert_close

from vllm_dejavu.kernels import cpu

EXACT = "TEST_CPU_LIBRARY" in os.environ
if EXACT:
    cpu.LIBRARY = Path(os.environ["TEST_CPU_LIBRARY"])
if not cpu.available():
    pytest.skip(f"the native kernels are not built: no {cpu.LIBRARY}", allow_module_level=True)

FUZZ = fuzz(10 if EXACT else 100)
ISAS = cpu.isas()
# Tiles of tokens from both sides (2, 5, 6, 12 of them), tokens as lanes from 13 on, blocks of 16 and 32 of
# them.
TOKENS = [1, 2, 5, 6, 7, 12, 13, 16, 17, 32, 33, 70, 130]
some_tokens = pytest.mark.parametrize("tokens", TOKENS, ids=lambda n: f"{n}-tokens")
# Where only sums differ between functions that share their way through the tiles.
few_tokens = pytest.mark.parametrize("tokens", [1, 7, 33], ids=lambda n: f"{n}-tokens")


def is_again(isa):
    return isa == "avx512_vnni" and isa != ISAS[0]


EVERY = [pytest.param(isa, marks=[pytest.mark.on_demand] if is_again(isa) else []) for isa in ISAS]
every_isa = pytest.mark.parametrize("isa", EVERY, indirect=True)
best_isa = pytest.mark.parametrize("isa", ISAS[:1], indirect=True)  # for what ops.cpp does alike for all
TWO_ISAS = list(dict.fromkeys([ISAS[0], ISAS[-1]]))


def isa_and_dtype(isa, dtype, name):
    """avx512_bf16 differs from avx512 in bf16 and integer products alone: its fp32 and fp16 are the same
    templates; avx512_vnni has nothing that is not in one of them.
    """
    again = (isa == "avx512_bf16" and dtype != torch.bfloat16) or is_again(isa)
    return pytest.param(isa, dtype, id=f"{isa}-{name}", marks=[pytest.mark.on_demand] if again else [])


PAIRS = [isa_and_dtype(isa, *dtype) for isa in ISAS for dtype in zip(DTYPES, DTYPE_IDS, strict=True)]
every_isa_and_dtype = pytest.mark.parametrize(("isa", "dtype"), PAIRS, indirect=["isa"])
CPU = torch.device("cpu")
# accumulate's shares of columns and of neurons that make a task worth a thread (ops.cpp)
LEAST_COLUMNS, LEAST_ROWS = 256, 64


def exact(argument):
    """A copy with no memory behind its end, of a part of a tensor; anything else as it is."""
    if isinstance(argument, tuple):
        return tuple(exact(a) for a in argument)
    if (
        isinstance(argument, torch.Tensor)
        and argument.untyped_storage().nbytes() != argument.numel() * argument.element_size()
    ):
        return argument.clone(memory_format=torch.contiguous_format)
    return argument


def with_exact_inputs(function):
    return lambda *args, **named: function(
        *(exact(a) for a in args), **{name: exact(a) for name, a in named.items()}
    )


FUNCTIONS = (
    "score_heads",
    "select_neurons",
    "sparse_mlp",
    "dense_mlp",
    "linear",
    "sparse_qkv",
    "sparse_out_proj",
)
WRAPPED = (*FUNCTIONS, "mask_heads", "prepare_weight")
native = Flat(cpu.KERNELS)
kernels = (
    SimpleNamespace(**{name: with_exact_inputs(getattr(native, name)) for name in WRAPPED})
    if EXACT
    else native
)
checks = Checks(kernels, CPU)
rand = checks.rand


@contextlib.contextmanager
def instruction_set(name):
    before = cpu.isa()
    cpu.use_isa(name)
    try:
        yield name
    finally:
        cpu.use_isa(before)


@contextlib.contextmanager
def threads(number):
    """So many threads; not by torch.set_num_threads, which vLLM's CPU worker puts out of action for the whole
    process.
    """
    before = torch.get_num_threads()
    torch._C.set_num_threads(number)
    try:
        yield
    finally:
        torch._C.set_num_threads(before)


def check_linear(tokens, hidden, rows, dtype, with_bias=True):
    """linear against fp32 math."""
    x, weight = rand(tokens, hidden, dtype=dtype), rand(rows, hidden, seed=1, dtype=dtype, fan_in=hidden)
    bias = rand(rows, seed=2, dtype=dtype) if with_bias else None
    out = kernels.linear(x, weight, bias)
    assert out.dtype == dtype
    assert_close(
        out, reference.linear(x.float(), weight.float(), None if bias is None else bias.float()), dtype
    )
