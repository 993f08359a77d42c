"""The native CPU kernels of dense passes, and what sizes, strides and threads may not change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    every_dtype,
    same_bits,
)
from kernel_flat import flat_reference as reference
from kernel_inputs import NAN
from native import (
    FUNCTIONS,
    FUZZ,
    ISAS,
    LEAST_COLUMNS,
    TOKENS,
    TWO_ISAS,
    check_linear,
    checks,
    every_isa_and_dtype,
    instruction_set,
    kernels,
    native,
    rand,
    threads,
)
from tolerances import DTYPES, assert_close

# Dense layers


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
        outputs = [getattr(native, name)(**some) for some in (args, sliced)]
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
