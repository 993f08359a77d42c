"""How the native CPU kernels round and widen: as PyTorch does, bit by bit."""

import pytest
import torch
from native import every_isa, every_isa_and_dtype, kernels

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
