"""The native CPU kernels against the references, with every instruction set that this CPU has.

TEST_CPU_LIBRARY names another build of the extension, whose tests then run with inputs that fill their memory
exactly: a sanitizer sees what is read behind their end (test_build_native.py).
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HANG_S
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    Checks,
    as_half,
    as_int64,
    column_major,
    every_density,
    every_dtype,
    every_padding,
    narrower,
    one_less,
    same_bits,
    wider_strides,
)
from kernel_flat import Flat
from kernel_flat import flat_reference as reference
from kernel_inputs import NAN, scores_of
from tolerances import DTYPE_IDS, DTYPES, assert_close

from vllm_dejavu.kernels import cpu
from vllm_dejavu.kernels.interface import implementation

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
every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)
best_isa = pytest.mark.parametrize("isa", ISAS[:1], indirect=True)  # for what ops.cpp does alike for all
TWO_ISAS = list(dict.fromkeys([ISAS[0], ISAS[-1]]))


def isa_and_dtype(isa, dtype, name):
    """avx512_bf16 differs from avx512 in bf16 products alone: its fp32 and fp16 are the same templates."""
    again = isa == "avx512_bf16" and dtype != torch.bfloat16
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


@pytest.fixture
def isa(request):
    with instruction_set(request.param):
        yield request.param


def test_the_best_instruction_set_is_the_default():
    """Plain C++ is always there, last; "" chooses the best one."""
    assert ISAS[-1] == "generic" and len(set(ISAS)) == len(ISAS)
    with instruction_set("generic"):
        cpu.use_isa("")
        assert cpu.isa() == ISAS[0]


# Selection


@every_isa_and_dtype
@some_tokens
def test_select_neurons_for_every_batch_size(tokens, dtype, isa):
    """The list, row mask, counters and head scores, with a row of padding in three; ffn ends inside a
    segment.
    """
    checks.select_neurons(tokens, dtype=dtype)


# Lists are made in ops.cpp, alike for every instruction set.
many_or_few_tokens = pytest.mark.parametrize(
    "tokens", [1, 4, 70], ids=["one-token", "few-tokens", "many-tokens"]
)


@best_isa
@every_padding
@every_density
@many_or_few_tokens
def test_select_neurons_for_every_density_and_padding(tokens, density, padding, isa):
    checks.select_neurons(tokens, density=density, padding=padding)


@every_isa
@many_or_few_tokens
def test_infinite_biases_select_everything(tokens, isa):
    """As the dense switch sets them: each instruction set has a threshold of its own."""
    checks.select_neurons(tokens, density=1)


@pytest.mark.parametrize("with_row_mask", [True, False], ids=["row-mask", "union"])
@pytest.mark.parametrize("heads", [0, 3], ids=["alone", "with-heads"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("tokens", [1, 6], ids=["one-token", "few-tokens"])
def test_select_neurons_does_what_is_asked_and_no_more(tokens, with_row_mask, heads, counted):
    checks.select_neurons(tokens, with_row_mask=with_row_mask, heads=heads, counted=counted)


@every_isa_and_dtype
@pytest.mark.parametrize(
    ("hidden", "rank", "ffn", "heads"),
    [(1, 1, 1, 1), (37, 3, 129, 33), (64, 32, 128, 1), (190, 65, 127, 4)],
    ids=["all-one", "odd", "tiled", "large"],
)
def test_select_neurons_for_every_size(hidden, rank, ffn, heads, dtype, isa):
    for tokens in (1, 5):
        checks.select_neurons(tokens, hidden=hidden, rank=rank, ffn=ffn, heads=heads, dtype=dtype)


every_predictor = pytest.mark.parametrize(
    "predictor",
    [*DTYPES, torch.int8],
    ids=["fp32-predictor", "fp16-predictor", "bf16-predictor", "int8-predictor"],
)


@every_isa
@every_predictor
@pytest.mark.parametrize("tokens", [1, 5, 33], ids=["one-token", "few-tokens", "many-tokens"])
def test_predictors_of_every_type(tokens, predictor, isa):
    """No instruction set rounds a score. Heads ride along."""
    checks.select_neurons(tokens, predictor=predictor)


@best_isa
@every_predictor
@every_dtype
def test_predictors_of_every_type_serve_every_model(dtype, predictor, isa):
    """Whatever the two types, they meet in fp32: PyTorch widens the inputs before any instruction set sees
    them.
    """
    checks.select_neurons(5, dtype=dtype, predictor=predictor)


@every_isa
def test_a_score_of_zero_selects_nothing(isa):
    """0 and -0 are not selected, the smallest positive score is."""
    bias, one = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1.0]), torch.ones(2, dtype=torch.int32)
    ids, counts, mask, _ = kernels.select_neurons(
        torch.zeros(2, 3), torch.ones(4, 3), torch.ones(5, 4), bias, one, True
    )
    assert ids.tolist() == [2, 4, 5, 5, 5] and counts.tolist() == [2]
    assert mask.tolist() == [[False, False, True, False, True]] * 2


@every_isa
@pytest.mark.parametrize("tokens", [1, 5, 17, 70], ids=lambda n: f"{n}-tokens")
def test_score_heads_for_every_batch_size(tokens, isa):
    checks.score_heads(tokens)


@best_isa
@every_padding
@every_dtype
@pytest.mark.parametrize("tokens", [1, 17], ids=lambda n: f"{n}-tokens")
def test_score_heads_for_every_type_and_padding(tokens, dtype, padding, isa):
    checks.score_heads(tokens, dtype, padding)


# MLP


@every_isa_and_dtype
@some_tokens
def test_sparse_mlp_for_every_batch_size(tokens, dtype, isa):
    """Each row its own neurons, a row of padding in three, fc2 rows counted over all tokens."""
    checks.sparse_mlp(tokens, dtype=dtype)


@best_isa
@every_padding
@every_density
@many_or_few_tokens
def test_sparse_mlp_for_every_density_and_padding(tokens, density, padding, isa):
    checks.sparse_mlp(tokens, density=density, padding=padding)


@pytest.mark.parametrize("row_exact", [True, False], ids=["row-exact", "union"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("tokens", [1, 6], ids=["one-token", "few-tokens"])
def test_sparse_mlp_with_every_option(tokens, row_exact, with_bias, counted):
    checks.sparse_mlp(tokens, row_exact=row_exact, with_bias=with_bias, counted=counted)


@every_isa_and_dtype
@pytest.mark.parametrize(
    ("hidden", "ffn"),
    [(1, 1), (37, 1), (37, 129), (64, 128), (80, 300), (190, 400)],
    ids=["all-one", "one-neuron", "odd", "tiled", "uneven", "large"],
)
def test_sparse_mlp_for_every_size(hidden, ffn, dtype, isa):
    """Columns that end inside a tile of 32, an odd number of survivors, more of them than a block holds."""
    for tokens in (1, 5, 9, 14, 40):
        checks.sparse_mlp(tokens, hidden=hidden, ffn=ffn, dtype=dtype, density=0.6)


@every_isa_and_dtype
@pytest.mark.parametrize("hidden", [256, 512], ids=lambda n: f"{n}-columns")
def test_rows_of_a_power_of_two_of_bytes(hidden, dtype, isa):
    """Such inputs are copied to rows that lie farther apart."""
    for tokens in (1, 2, 9):
        checks.select_neurons(tokens, hidden=hidden, dtype=dtype)
        checks.sparse_mlp(tokens, hidden=hidden, dtype=dtype)
        checks.sparse_qkv(tokens, hidden=hidden, dtype=dtype)
        checks.sparse_out_proj(tokens, heads=hidden // 16, dtype=dtype)
        check_linear(tokens, hidden, 20, dtype)


@every_isa_and_dtype
def test_sparse_mlp_of_one_neuron_in_every_segment(dtype, isa):
    checks.sparse_mlp_of_single_neurons(dtype)


@FUZZ
@given(
    tokens=st.integers(1, 70),
    hidden=st.integers(1, 200),
    ffn=st.integers(8, 400),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0.01, 0.99),
    padding=st.sampled_from(["none", "some", "all"]),
    with_bias=st.booleans(),
    row_exact=st.booleans(),
    name=st.sampled_from(ISAS),
    number=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_mlp_for_any_shape_selection_and_padding(
    tokens, hidden, ffn, rank, dtype, density, padding, with_bias, row_exact, name, number, seed
):
    """Selection and MLP, by any number of threads. The MLP's inputs are whole enough that a tolerance means
    something.
    """
    with instruction_set(name), threads(number):
        # With few tokens, as every unit needs a threshold away from all scores.
        checks.select_neurons(
            min(tokens, 20),
            max(hidden, 8),
            rank,
            ffn,
            dtype,
            density=density,
            padding=padding,
            with_row_mask=row_exact,
            seed=seed,
        )
        checks.sparse_mlp(
            tokens, max(hidden, 8), ffn, dtype, density, padding, with_bias, row_exact, seed=seed
        )


# Projections


@every_isa_and_dtype
@few_tokens
def test_sparse_qkv_for_every_batch_size(tokens, dtype, isa):
    checks.sparse_qkv(tokens, dtype=dtype, kv_heads=2)


@best_isa
@every_padding
@every_density
@many_or_few_tokens
def test_sparse_qkv_for_every_density_and_padding(tokens, density, padding, isa):
    checks.sparse_qkv(tokens, density=density, padding=padding)


def check_qkv_sizes(heads, kv_heads, head_size, **options):
    for tokens, hidden, dtype in ((1, 37, torch.float32), (5, 37, torch.float32), (20, 64, torch.bfloat16)):
        checks.sparse_qkv(tokens, heads, kv_heads, head_size, hidden, dtype, **options)


@pytest.mark.parametrize("head_size", [1, 8, 32, 80], ids=lambda n: f"head-size-{n}")
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)], ids=["one-kv-head-each", "grouped", "one-kv-head"]
)
def test_sparse_qkv_for_every_head_shape(heads, kv_heads, head_size):
    """Heads become rows in ops.cpp, before any instruction set."""
    check_qkv_sizes(heads, kv_heads, head_size)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_sparse_qkv_with_every_option(with_bias, counted):
    check_qkv_sizes(4, 2, 8, with_bias=with_bias, counted=counted)


@every_isa_and_dtype
@few_tokens
def test_sparse_out_proj_for_every_batch_size(tokens, dtype, isa):
    checks.sparse_out_proj(tokens, dtype=dtype)


@best_isa
@every_padding
@every_density
@pytest.mark.parametrize("given_output", [True, False], ids=["given-output", "new-output"])
@many_or_few_tokens
def test_sparse_out_proj_for_every_density_and_padding(tokens, given_output, density, padding, isa):
    """Segments of columns are made of the scores in ops.cpp, alike for every instruction set."""
    checks.sparse_out_proj(tokens, density=density, padding=padding, given_output=given_output)


@every_isa_and_dtype
@pytest.mark.parametrize(
    ("heads", "head_size", "hidden"),
    [(1, 8, 1), (5, 20, 37), (9, 7, 5), (2, 80, 64), (8, 16, 190), (32, 3, 40), (16, 6, 40)],
    ids=["one-head", "odd", "odder", "wide-heads", "large", "odd-heads-in-even-rows", "heads-inside-a-line"],
)
def test_sparse_out_proj_for_every_size(heads, head_size, hidden, dtype, isa):
    """Selected heads side by side are one segment of columns; between them lie NaN."""
    for tokens in (1, 5, 20):
        for density in (0.4, 0.8):
            checks.sparse_out_proj(tokens, heads, head_size, hidden, dtype, density)


@every_dtype
@pytest.mark.parametrize("head_size", [1, 20, 64], ids=lambda n: f"head-size-{n}")
@pytest.mark.parametrize("tokens", [0, 1, 7], ids=lambda n: f"{n}-tokens")
def test_mask_heads(tokens, head_size, dtype):
    """Unselected heads become 0 whatever they hold, of a part of a wider tensor too; the others keep every
    bit.
    """
    mask = checks.rand_mask(tokens, 5, density=0.5)
    attn = torch.where(mask[:, :, None], rand(tokens, 5, head_size, dtype=dtype), NAN)
    expected = reference.mask_heads(attn, scores_of(mask))
    for given_attn in (attn, torch.cat([attn, attn], 1)[:, :5], torch.cat([attn, attn], 2)[..., :head_size]):
        before = given_attn.clone()
        out = kernels.mask_heads(given_attn, scores_of(mask))
        assert out.dtype == dtype and torch.equal(out, expected)
        assert torch.equal(given_attn.nan_to_num(7), before.nan_to_num(7)), "the input stays as it is"


@pytest.mark.parametrize("lens", [[], [0, 0], [5], [3, 0, 1, 0]], ids=len)
def test_dense_passes_are_counted(lens):
    once, per_row, row_lens = (
        torch.tensor([1, 0, 0, 300, 300, 0, 0]),
        torch.tensor([0, 1, 300, 0, 0, 0, 0]),
        torch.tensor(lens, dtype=torch.int32),
    )
    ours, theirs = torch.arange(7), torch.arange(7)
    native.count_dense(ours, once, per_row, row_lens)
    reference.count_dense(theirs, once, per_row, row_lens)
    rows = sum(n > 0 for n in lens)
    assert ours.tolist() == theirs.tolist() == [1, 1 + rows, 2 + 300 * rows, 303, 304, 5, 6]
    with pytest.raises(
        RuntimeError, match=r"per_row must be a contiguous CPU tensor \[7\] of Long, got \[6\]"
    ):
        native.count_dense(ours, once, per_row[:6], row_lens)


def test_prepare_weight_changes_nothing():
    """An advice about pages only; smaller tensors than a page, and parts of tensors, get none or less of
    it.
    """
    for weight in (rand(1, 1), rand(2000, 1000), rand(2000, 1000)[7:, 3:], torch.empty(0)):
        before = weight.clone()
        assert kernels.prepare_weight(weight) is None and torch.equal(weight, before)


@FUZZ
@given(
    tokens=st.integers(1, 40),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    head_size=st.integers(1, 90),
    hidden=st.integers(8, 150),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0, 1),
    padding=st.sampled_from(["none", "some", "all"]),
    with_bias=st.booleans(),
    name=st.sampled_from(ISAS),
    number=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_projections_for_any_shape_selection_and_padding(
    tokens, kv_heads, group, head_size, hidden, dtype, density, padding, with_bias, name, number, seed
):
    with instruction_set(name), threads(number):
        checks.sparse_qkv(
            tokens,
            kv_heads * group,
            kv_heads,
            head_size,
            hidden,
            dtype,
            density,
            padding,
            with_bias,
            seed=seed,
        )
        checks.sparse_out_proj(
            tokens, kv_heads * group, head_size, hidden, dtype, density, padding, seed=seed
        )


# Dense layers


def check_linear(tokens, hidden, rows, dtype, with_bias=True):
    """linear against fp32 math."""
    x, weight = rand(tokens, hidden, dtype=dtype), rand(rows, hidden, seed=1, dtype=dtype, fan_in=hidden)
    bias = rand(rows, seed=2, dtype=dtype) if with_bias else None
    out = kernels.linear(x, weight, bias)
    assert out.dtype == dtype
    assert_close(
        out, reference.linear(x.float(), weight.float(), None if bias is None else bias.float()), dtype
    )


def check_dense_mlp(tokens, hidden, ffn, dtype, with_bias=True):
    """dense_mlp against fp32 math."""
    x, fc1 = rand(tokens, hidden, dtype=dtype), rand(ffn, hidden, seed=1, dtype=dtype, fan_in=hidden)
    bias, fc2_t = (
        rand(ffn, seed=2, dtype=dtype) if with_bias else None,
        rand(ffn, hidden, seed=3, dtype=dtype, fan_in=ffn),
    )
    out = kernels.dense_mlp(x, fc1, bias, fc2_t)
    assert out.dtype == dtype
    assert_close(
        out,
        reference.dense_mlp(x.float(), fc1.float(), None if bias is None else bias.float(), fc2_t.float()),
        dtype,
    )


# The bias, which is added after the products of any size, by turns.
DENSE = [
    (1, 1, True),
    (37, 129, False),
    (64, 304, True),
    (160, 640, False),
    (96, 301, True),
    (192, 1056, False),
]
every_dense_size = pytest.mark.parametrize(
    ("hidden", "rows", "with_bias"), DENSE, ids=["all-one", "odd", "tiled", "large", "odd-rows", "larger"]
)


@every_isa_and_dtype
@every_dense_size
def test_linear(hidden, rows, with_bias, dtype, isa):
    """Sizes that only some of the ways through take: tokens as lanes ask for rows of a multiple of 32."""
    for tokens in TOKENS:
        check_linear(tokens, hidden, rows, dtype, with_bias)


@every_isa_and_dtype
@every_dense_size
def test_dense_mlp(hidden, rows, with_bias, dtype, isa):
    """Neurons that came out negative are skipped; from 257 tokens on in several chunks."""
    for tokens in (*TOKENS, 256, 257):
        check_dense_mlp(tokens, hidden, rows, dtype, with_bias)


@every_isa_and_dtype
@pytest.mark.parametrize(
    ("hidden", "ffn", "share"),
    [
        (64, 96, 0.0),
        (64, 96, 0.5),
        (64, 640, 0.3),
        (64, 640, 1.0),
        (160, 301, 0.3),
        (160, 301, 0.5),
        (37, 1056, 0.0),
        (37, 1056, 0.5),
    ],
    ids=lambda value: f"{value}-alive" if isinstance(value, float) else None,
)
def test_dense_mlp_of_neurons_that_no_token_needs(hidden, ffn, share, dtype, isa):
    """Their fc2 rows are left out, whose number is then rarely even, and which are rarely neighbours; also
    when nothing is left.
    """
    for tokens in (1, 7, 12, 13, 20, 130, 300):
        x, fc1 = rand(tokens, hidden, dtype=dtype), rand(ffn, hidden, seed=1, dtype=dtype, fan_in=hidden)
        bias = torch.where(checks.rand_mask(ffn, density=share), rand(ffn, seed=2), -50.0).to(dtype)
        fc2_t = rand(ffn, hidden, seed=3, dtype=dtype, fan_in=ffn)
        out = kernels.dense_mlp(x, fc1, bias, fc2_t)
        assert_close(out, reference.dense_mlp(x.float(), fc1.float(), bias.float(), fc2_t.float()), dtype)


@pytest.mark.parametrize("number", [1, 3], ids=["one-thread", "three-threads"])
@every_dtype
def test_dense_layers_of_a_long_prompt(dtype, number):
    """Several chunks of tokens, the last block of each not full."""
    with threads(number):
        check_linear(1030, 64, 48, dtype)
        check_dense_mlp(1030, 64, 96, dtype)
        check_dense_mlp(2049, 32, 544, dtype)


@FUZZ
@given(
    tokens=st.integers(1, 200),
    hidden=st.one_of(st.integers(8, 100), st.sampled_from([32, 64, 96, 128])),
    name=st.sampled_from(ISAS),
    rows=st.one_of(st.integers(8, 400), st.sampled_from([32, 64, 256, 528])),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    number=st.integers(1, 4),
)
def test_dense_layers_for_any_shape(tokens, hidden, rows, dtype, with_bias, name, number):
    with instruction_set(name), threads(number):
        check_linear(tokens, hidden, rows, dtype, with_bias)
        check_dense_mlp(tokens, hidden, rows, dtype, with_bias)


@every_isa_and_dtype
@pytest.mark.parametrize("tokens", [1, 7, 33], ids=lambda n: f"{n}-tokens")
def test_every_kernel_at_odd_sizes(tokens, dtype, isa):
    """One case a kernel for each instruction set and type, with every tail: what the sanitizers run
    (test_build_native.py).
    """
    checks.select_neurons(tokens, hidden=37, rank=3, ffn=129, heads=33, dtype=dtype)
    checks.score_heads(tokens, dtype, hidden=37)
    checks.sparse_qkv(tokens, 3, 3, 8, 37, dtype)
    checks.sparse_out_proj(tokens, 5, 20, 37, dtype)
    for hidden, ffn in ((37, 129), (96, 301)):
        checks.sparse_mlp(tokens, hidden, ffn, dtype, density=0.6)
        check_linear(tokens, hidden, ffn, dtype)
        check_dense_mlp(tokens, hidden, ffn, dtype)


@every_isa_and_dtype
@pytest.mark.parametrize("tokens", [1, 7, 20, 90], ids=lambda n: f"{n}-tokens")
def test_rows_of_wider_tensors(tokens, dtype, isa):
    """x and the weights may be parts of wider rows, as a slice of q, k and v is; what lies beside them is not
    read.
    """

    def part(tensor):
        return torch.cat([torch.full_like(tensor, NAN), tensor, torch.full_like(tensor, NAN)], -1)[
            ..., tensor.shape[-1] : 2 * tensor.shape[-1]
        ]

    for name in (
        "linear",
        "dense_mlp",
        "score_heads",
        "select_neurons",
        "sparse_mlp",
        "sparse_qkv",
        "sparse_out_proj",
    ):
        args = checks.arguments(name, tokens, dtype)
        sliced = {
            k: (
                part(v)
                if isinstance(v, torch.Tensor)
                and v.is_floating_point()
                and v.dim() > 1
                and k != "head_scores"
                else v
            )
            for k, v in args.items()
        }
        outputs = [getattr(cpu, name)(**some) for some in (args, sliced)]
        some, other = (o if isinstance(o, tuple) else (o,) for o in outputs)
        assert same_bits(some, other), name


def test_no_tokens():
    """An empty batch gives an empty result."""
    for name in ("linear", "dense_mlp", "score_heads", "sparse_mlp", "sparse_qkv", "sparse_out_proj"):
        assert getattr(kernels, name)(**checks.arguments(name, 0)).shape[0] == 0
    ids, counts, mask, scores = kernels.select_neurons(**checks.arguments("select_neurons", 0))
    assert ids.eq(300).all() and not counts.any() and mask.shape == (0, 300) and scores.shape == (0, 4)


# Threads


def results(name, tokens, dtype, hidden):
    """A function's results on inputs that select a part: NaN nowhere."""
    args = checks.arguments(name, tokens, dtype)
    if name in ("sparse_mlp", "dense_mlp"):
        ffn = 300
        args |= {
            "x": rand(tokens, hidden, dtype=dtype),
            "fc1_weight": rand(ffn, hidden, seed=1, dtype=dtype, fan_in=hidden),
            "fc2_weight_t": rand(ffn, hidden, seed=3, dtype=dtype, fan_in=ffn),
        }
    if name == "sparse_mlp":
        args["row_mask"] = checks.rand_mask(tokens, 300, density=0.8)
        args["row_lens"][1:2] = 0
    counters = checks.new_counters()
    if name in ("select_neurons", "sparse_mlp", "sparse_qkv"):
        args["counters"] = counters
    out = getattr(kernels, name)(**args)
    return *(out if isinstance(out, tuple) else (out,)), counters


def splits_neurons(name, number, hidden):
    """Whether so many threads share an MLP's neurons, having too few columns to share."""
    return name in ("sparse_mlp", "dense_mlp") and number // min(max(hidden // LEAST_COLUMNS, 1), number) > 1


@pytest.mark.parametrize("isa", TWO_ISAS, indirect=True)
@every_dtype
@pytest.mark.parametrize("hidden", [72, 600, 1024], ids=["split-neurons", "split-both", "split-columns"])
@pytest.mark.parametrize("tokens", [1, 5, 70], ids=lambda n: f"{n}-tokens")
def test_threads_change_nothing_but_the_order_of_partial_sums(tokens, hidden, dtype, isa):
    """1, 2, 3, 7 threads: the same bits time after time, and the same as one thread's unless neurons are
    shared out.
    """
    for name in FUNCTIONS if hidden == 72 else ("sparse_mlp", "dense_mlp"):
        with threads(1):
            expected = results(name, tokens, dtype, hidden)
        for number in (1, 2, 3, 7):
            with threads(number):
                first = results(name, tokens, dtype, hidden)
                for _ in range(2):
                    assert same_bits(results(name, tokens, dtype, hidden), first), (name, number)
            # or PyTorch's products
            own = (
                name not in ("linear", "dense_mlp")
                or tokens < 16
                or (isa == "avx512_bf16" and dtype == torch.bfloat16)
            )
            for ours, one in zip(first, expected, strict=True):
                if ours.dtype in DTYPES and (splits_neurons(name, number, hidden) or not own):
                    assert_close(ours, one)
                else:
                    assert torch.equal(ours, one), (name, number)


def test_partial_sums_of_split_neurons_differ_here():
    """The test above means little where nothing is split."""
    with threads(1):
        one = results("sparse_mlp", 5, torch.float32, 72)[0]
    with threads(2):
        assert not torch.equal(results("sparse_mlp", 5, torch.float32, 72)[0], one)


@pytest.mark.parametrize("number", [2, 3, 7, 16], ids=lambda n: f"{n}-threads")
@every_dtype
def test_more_threads_than_work(dtype, number):
    """Fewer rows, columns, neurons and segments than threads; sums split among them, over some or all
    neurons.
    """
    with threads(number):
        for tokens in (1, 3, 7, 40):
            checks.sparse_mlp(tokens, dtype=dtype, density=0.9)
            checks.sparse_mlp(tokens, hidden=600, ffn=500, dtype=dtype, density=0.9, padding="none")
            checks.sparse_mlp(tokens, hidden=3, ffn=2, dtype=dtype, density=0.9)
            checks.select_neurons(tokens, hidden=9, rank=2, ffn=5, dtype=dtype)
            checks.sparse_qkv(tokens, 2, 1, 1, dtype=dtype)
            checks.sparse_out_proj(tokens, 2, 3, 2, dtype=dtype)
            check_linear(tokens, 32, 16, dtype)
            check_dense_mlp(tokens, 72, 300, dtype)


# Rounding


def patterns(dtype):
    """Every value of a 16-bit type, or of int8, in the order of its bits."""
    return (
        torch.arange(-128, 128).to(torch.int8)
        if dtype == torch.int8
        else torch.arange(2**16).to(torch.uint16).view(dtype)
    )


def fp32_near_roundings():
    """fp32 values of every sign, exponent and leading mantissa, on, beside and between what 16-bit types can
    hold.
    """
    low = torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF]
    )
    high = torch.arange(-(2**15), 2**15)[:, None] * 2**16
    return (high + low).flatten().to(torch.int32).view(torch.float32)


def same_values(actual, expected):
    """Equal bit by bit; one NaN is as good as another."""
    assert actual.dtype == expected.dtype and torch.equal(actual.isnan(), expected.isnan())
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    wrong = (actual.view(bits) != expected.view(bits)) & ~expected.isnan()
    assert not wrong.any(), (
        f"{int(wrong.sum())} wrong, e.g. {actual[wrong][:5]} instead of {expected[wrong][:5]}"
    )


halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@every_isa
@halves
def test_results_are_rounded_as_pytorch_rounds(dtype, isa):
    """0 * 0 + an fp32 bias reaches every value: to nearest, ties to even, subnormals, overflow to infinity,
    NaN.
    """
    bias = fp32_near_roundings()
    nothing = torch.zeros(len(bias), 1, dtype=dtype)
    expected = (bias + 0.0).to(dtype)  # -0 + 0 is 0
    same_values(kernels.linear(nothing[:1], nothing, bias)[0], expected)
    generator = torch.Generator().manual_seed(0)
    special = bias[torch.randint(len(bias), (3000,), generator=generator)]
    at = 0
    while at < len(special):  # by pieces that are shorter than a vector, or end inside one
        n = min(1 + at % 41, len(special) - at)
        same_values(
            kernels.linear(nothing[:1], nothing[:n], special[at : at + n])[0],
            (special[at : at + n] + 0.0).to(dtype),
        )
        at += n


@every_isa
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=["fp16", "bf16", "int8"])
@pytest.mark.parametrize("hidden", [1, 7, 32, 48], ids=lambda n: f"{n}-columns")
def test_weights_are_widened_exactly(dtype, hidden, isa):
    """One value a row among zeros, in every column in turn: its fp32 score is that value."""
    values = patterns(dtype)
    weight = torch.zeros(len(values), hidden, dtype=dtype)
    number = torch.arange(len(values))
    weight[number, number % hidden] = values
    one = torch.ones(1, dtype=torch.int32)
    scores = kernels.score_heads(torch.ones(1, hidden), weight, torch.zeros(len(values)), one)
    same_values(scores[0], values.float() + 0.0)


@every_isa
@halves
@pytest.mark.parametrize("hidden", [1, 7, 32, 48], ids=lambda n: f"{n}-columns")
def test_inputs_and_16_bit_results_keep_every_value(dtype, hidden, isa):
    """One value a token among zeros, times 1. bf16 products take subnormals for 0, as their instruction
    does.
    """
    values = patterns(dtype)
    number = torch.arange(len(values))
    x = torch.zeros(len(values), hidden, dtype=dtype)
    x[number, number % hidden] = values
    ones, one_head, lens = (
        torch.ones(1, hidden, dtype=dtype),
        torch.ones(len(values), 1),
        torch.ones(len(values), dtype=torch.int32),
    )
    out = kernels.sparse_qkv(x, ones, None, one_head, lens, 1)
    expected = values + 0.0
    if isa == "avx512_bf16" and dtype == torch.bfloat16:
        expected = torch.where(expected.abs() < torch.finfo(dtype).tiny, 0.0, expected)
    same_values(out[:, 0], expected)


@every_isa_and_dtype
@pytest.mark.parametrize("tokens", [1, 13], ids=["from-rows", "kept-rows"])
def test_fc2_weights_are_widened_exactly(tokens, dtype, isa):
    """One neuron that comes out as 1 gives its fc2 row; columns that fill tiles, and the last 37."""
    values = patterns(torch.float16 if dtype == torch.float32 else dtype).to(dtype)
    values = values[values.isfinite()]
    assert len(values) > 60000
    one = torch.ones(1, 1, dtype=dtype)
    for fc2_t in (values[None], values[None, :37], values[None, -37:]):
        out = kernels.dense_mlp(one.expand(tokens, 1), one, None, fc2_t)
        expected = fc2_t + 0.0
        if isa == "avx512_bf16" and dtype == torch.bfloat16:
            expected = torch.where(expected.abs() < torch.finfo(dtype).tiny, 0.0, expected)
        for row in out:
            same_values(row, expected[0])


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
    ("score_heads", "weight", as_double, "expected float32, float16, bfloat16 or int8, got Double"),
    ("score_heads", "weight", as_int64, "expected float32, float16, bfloat16 or int8, got Long"),
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
    ("sparse_mlp", "x", as_half, "x, fc1 and fc2 must have one dtype, got Half, Float, Float"),
    ("sparse_mlp", "fc1_weight", as_half, "x, fc1 and fc2 must have one dtype, got Float, Half, Float"),
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
    ("dense_mlp", "fc1_weight", as_half, "x, fc1 and fc2 must have one dtype, got Float, Half, Float"),
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
        "x, weight and output must have one dtype, and output must be contiguous; got Float, Half",
    ),
    ("linear", "weight", column_major, "rows of weight must be contiguous"),
    ("linear", "bias", one_less, r"bias must have 300 contiguous elements, got \[299\]"),
    (
        "sparse_qkv",
        "weight",
        as_half,
        "weight must have x's dtype Float and at least 64 rows, got Half and 128",
    ),
    ("sparse_qkv", "weight", lambda w: w[:63], "at least 64 rows, got Float and 63"),
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
        getattr(cpu, name)(**{**arguments, argument: change(arguments.get(argument))})


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
    with pytest.raises(ValueError, match="know the activation relu, got 'gelu'"):
        getattr(cpu, name)(**checks.arguments(name), activation="gelu")


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
torch.ops.dejavu_cpu.dense_mlp(torch.ones(20, 64), torch.ones(300, 64), None, torch.ones(300, 64))
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
