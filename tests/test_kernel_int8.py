"""INT8 weights with a scale for each output, on every instruction set, against fp32 math on the weights that
they stand for.

What must not be read holds NaN where it can: scales of unselected rows, biases, activations of unselected
heads. Integers cannot, so rows of unselected units hold other integers, which must change nothing.

Where products are of integers, inputs are rounded: a few tokens to 16 bits, which stays within every
tolerance; many, on a CPU with VNNI, to 8 bits with a scale for each 64 or 128 values (`GROUP`,
`ROW_GROUP`), which is checked twice: loosely against exact inputs, and closely against inputs rounded
likewise.
"""

import pytest
import torch
from kernel_inputs import NAN, rand_mask
from native import (
    CPU,
    ISAS,
    LEAST_COLUMNS,
    every_isa,
    every_isa_and_dtype,
    few_tokens,
    instruction_set,
    rand,
    some_tokens,
    threads,
)
from tolerances import assert_close

from vllm_dejavu.kernels import cpu, reference
from vllm_dejavu.kernels.interface import Call, Mlp, Rows
from vllm_dejavu.quantization import int8_rows

GROUP, ROW_GROUP, LANES_TOKENS = 64, 128, 13  # as in kernels/csrc
# Of a product with grouped inputs, off by half a 127th of what is largest in a group at most; of two
# products after each other, as in an MLP.
GROUPED_RMS = 1.2e-2


def is_grouped(x, isa):
    return isa in ("avx512_bf16", "avx512_vnni") and x.dtype != torch.float32 and x.shape[0] >= LANES_TOKENS


def assert_product(actual, expected, x, isa):
    """Of inputs x [T, ...]: loosely where they are grouped."""
    assert_close(actual, expected, x.dtype, GROUPED_RMS if is_grouped(x, isa) else None)


def grouped(x, most=127, size=GROUP):
    """What is left of inputs [T, n] in 8 bits with a scale for each group of columns; most: 255 where none is
    negative.
    """
    parts = [
        (part / scale).round() * scale
        for part in x.float().split(size, 1)
        for scale in [part.abs().amax(1, keepdim=True).clamp_min(1e-30) / most]
    ]
    return torch.cat(parts, 1)


# Sizes that fill no vector, no pair and no tile; and such as dot_lanes takes.
SIZES = [(75, 131), (96, 300), (2 * LEAST_COLUMNS, 257)]
every_size = pytest.mark.parametrize(("hidden", "outputs"), SIZES, ids=lambda n: str(n))


def int8(outputs, inputs, seed=1, transposed=False, bias=None):
    """Rows of a random weight [outputs, inputs], one output of which is all zeros."""
    weight = rand(outputs, inputs, seed=seed, dtype=torch.float32, fan_in=inputs)
    weight *= torch.logspace(-2, 2, outputs, base=2)[:, None]  # scales that differ
    weight[outputs // 2] = 0
    integers, scale = int8_rows(weight)
    return Rows(integers.t().contiguous() if transposed else integers, bias, scale, transposed)


def lens_of(tokens, padded=False):
    return torch.tensor([0 if padded and t % 3 == 1 else 5 for t in range(tokens)], dtype=torch.int32)


def test_rounding():
    """Within half a step of each output's own largest weight; a row of zeros stays, with a scale that
    multiplies.
    """
    weight = rand(5, 40, dtype=torch.bfloat16)
    weight[1] = 0
    integers, scale = int8_rows(weight)
    assert integers.dtype == torch.int8 and scale.dtype == torch.float32 and scale.isfinite().all()
    assert (integers[1] == 0).all() and (scale > 0).all()
    assert (integers.abs().amax(1)[[0, 2, 3, 4]] == 127).all()
    error = (integers * scale[:, None] - weight.float()).abs()
    assert (error <= scale[:, None] / 2 * (1 + 1e-5)).all()


@every_isa_and_dtype
@every_size
@some_tokens
def test_linear(tokens, hidden, outputs, dtype, isa):
    x = rand(tokens, hidden, dtype=dtype)
    rows = int8(outputs, hidden, bias=rand(outputs, seed=3, dtype=dtype))
    plain = rows._replace(bias=None)
    taken = grouped(x) if is_grouped(x, isa) and hidden % 4 == 0 else x.float()
    expected = reference.linear(taken, plain)
    assert_close(expected, reference.linear(x.float(), plain), allowed=GROUPED_RMS)
    assert_close(cpu.KERNELS.linear(x, plain), expected, dtype)
    assert_close(cpu.KERNELS.linear(x, rows), expected + rows.bias.float(), dtype)


@every_isa_and_dtype
@every_size
@some_tokens
def test_a_transposed_linear(tokens, hidden, outputs, dtype, isa):
    x, rows = rand(tokens, hidden, dtype=dtype), int8(outputs, hidden, transposed=True)
    assert rows.weight.shape == (hidden, outputs)
    taken = grouped(x, size=ROW_GROUP) if is_grouped(x, isa) else x.float()
    expected = reference.linear(taken, rows)
    assert_close(expected, reference.linear(x.float(), rows), allowed=GROUPED_RMS)
    assert_close(cpu.KERNELS.linear(x, rows), expected, dtype)


@every_isa_and_dtype
@pytest.mark.parametrize("masked", [False, True], ids=["union", "row-mask"])
@some_tokens
def test_sparse_mlp(tokens, masked, dtype, isa):
    hidden, ffn = 200, 390
    x = rand(tokens, hidden, dtype=dtype)
    lens, mask = lens_of(tokens, padded=tokens > 2), rand_mask(tokens, ffn, density=0.3)
    x[lens == 0] = NAN
    mask = mask & (lens > 0)[:, None]
    chosen = reference.compact_union(mask)._replace(mask=mask if masked else None)
    up = int8(ffn, hidden, bias=rand(ffn, seed=4, dtype=dtype))
    mlp = Mlp(up, int8(hidden, ffn, seed=2, transposed=True))
    counters = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    wide = mlp._replace(up=up._replace(bias=up.bias.float()))
    expected = reference.sparse_mlp(x.float(), wide, chosen, Call(lens, counters[0]))
    unread = ~mask.any(0)
    up.weight[unread], up.scale[unread], up.bias[unread] = 99, NAN, NAN
    mlp.down.weight[unread] = 99
    assert_product(
        cpu.KERNELS.sparse_mlp(x, mlp, chosen, Call(lens, counters[1])), expected, x[lens > 0], isa
    )
    assert counters[0].tolist() == counters[1].tolist()


@every_isa_and_dtype
@some_tokens
def test_dense_mlp(tokens, dtype, isa):
    hidden, ffn = 192, 390
    x = rand(tokens, hidden, dtype=dtype)
    mlp = Mlp(int8(ffn, hidden, bias=rand(ffn, seed=4, dtype=dtype)), int8(hidden, ffn, 2, transposed=True))
    wide = mlp._replace(up=mlp.up._replace(bias=mlp.up.bias.float()))
    assert_product(cpu.KERNELS.sparse_mlp(x, mlp), reference.sparse_mlp(x.float(), wide), x, isa)


@every_isa
@pytest.mark.parametrize("tokens", [13, 40])
def test_an_mlp_rounds_what_relu_leaves_to_steps_of_a_255th(tokens, isa):
    """Of the neurons that are positive for some token, side by side."""
    hidden, ffn = 192, 390
    x = rand(tokens, hidden, dtype=torch.float16)
    up, down = int8(ffn, hidden), int8(hidden, ffn, 2, transposed=True)
    up.weight[::3] = -up.weight[::3].abs()  # fewer are positive
    h = reference.linear(grouped(x) if is_grouped(x, isa) else x.float(), up).relu()
    alive = (h > 0).any(0)
    h, some = h[:, alive], down._replace(weight=down.weight[alive])
    expected = reference.linear(grouped(h, 255, ROW_GROUP) if is_grouped(x, isa) else h, some)
    assert_close(cpu.KERNELS.sparse_mlp(x, Mlp(up, down)), expected, torch.float16)


@every_isa_and_dtype
@some_tokens
def test_projections_of_selected_heads(tokens, dtype, isa):
    heads, size, hidden = 6, 24, 132
    lens = lens_of(tokens)
    scores = torch.where(rand_mask(tokens, heads, density=0.4), 1.0, -1.0)
    scores[:, 2] = -1
    read = (scores > 0).any(0).repeat_interleave(size)
    x = rand(tokens, hidden, dtype=dtype)
    qkv = int8(3 * heads * size, hidden, bias=rand(3 * heads * size, seed=4, dtype=dtype))
    wide = qkv._replace(bias=qkv.bias.float())
    expected = reference.sparse_qkv(x.float(), wide, scores, size, Call(lens))
    unread = torch.cat([~read, torch.zeros(2 * heads * size, dtype=torch.bool)])
    qkv.weight[unread], qkv.scale[unread], qkv.bias[unread] = 99, NAN, NAN
    assert_product(cpu.KERNELS.sparse_qkv(x, qkv, scores, size, Call(lens)), expected, x, isa)

    out = int8(hidden, heads * size, seed=2, transposed=True)
    attn = cpu.KERNELS.mask_heads(rand(tokens, heads, size, seed=5, dtype=dtype), scores)
    expected = reference.sparse_out_proj(attn.float(), out, scores)
    out.weight[~read] = 99
    attn.view(tokens, -1)[:, ~read] = NAN
    assert_product(cpu.KERNELS.sparse_out_proj(attn, out, scores), expected, attn, isa)


@every_isa_and_dtype
@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_a_token_that_is_not_finite_spoils_no_other(tokens, bad, dtype, isa):
    """Its own outputs are NaN, or infinite where inputs stay floats."""
    x, rows, down = rand(tokens, 256, dtype=dtype), int8(64, 256), int8(256, 64, seed=2, transposed=True)
    clean, spoilt = x.clone(), tokens // 2
    x[spoilt, 7] = bad
    rest = torch.arange(tokens) != spoilt
    for run in (
        lambda x: cpu.KERNELS.linear(x, rows),
        lambda x: cpu.KERNELS.linear(x, int8(48, 256, transposed=True)),
        lambda x: cpu.KERNELS.sparse_mlp(x, Mlp(rows, down)),
    ):
        found = run(x)
        assert torch.equal(found[rest], run(clean)[rest])
        assert not found[spoilt].isfinite().all()


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_sums_never_overflow(tokens, dtype, isa):
    """All weights at their largest and all inputs of one sign, so many that int32 could not hold sums of
    inputs in 16 bits.
    """
    inputs, outputs = 20_000, 40
    x = torch.full((tokens, inputs), 2.0**-8, dtype=dtype)
    x[:, 0] = 2.0**-7  # which all are rounded by
    scale = torch.full((outputs,), 1.0 / 127)
    for transposed in (False, True):
        shape = (inputs, outputs) if transposed else (outputs, inputs)
        rows = Rows(torch.full(shape, 127, dtype=torch.int8), None, scale, transposed)
        assert_close(cpu.KERNELS.linear(x, rows), x.float().sum(1, keepdim=True).expand(-1, outputs), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_few_tokens_give_the_same_on_every_instruction_set_with_integers(dtype):
    """Sums of integers are exact, whatever their order."""
    names = [name for name in ISAS if name != "generic"]
    x, rows, found = rand(5, 384, dtype=dtype), int8(64, 384), []
    for name in names:
        with instruction_set(name):
            found.append(cpu.KERNELS.linear(x, rows))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_many_tokens_in_large_batches():
    """Blocks of 32 tokens, chunks of rows and of tokens, the last of each a part."""
    x, rows = rand(301, 640, dtype=torch.bfloat16), int8(411, 640)
    down, isa = int8(640, 411, seed=2, transposed=True), ISAS[0]
    assert_product(cpu.KERNELS.linear(x, rows), reference.linear(x.float(), rows), x, isa)
    h = rand(301, 411, dtype=torch.bfloat16)
    assert_product(cpu.KERNELS.linear(h, down), reference.linear(h.float(), down), h, isa)


@every_isa
@few_tokens
def test_any_number_of_threads(tokens, isa):
    x, rows = rand(tokens, 96, dtype=torch.bfloat16), int8(700, 96, transposed=True)
    results = []
    for number in (1, 3):
        with threads(number):
            results.append(cpu.KERNELS.linear(x, rows))
    assert torch.equal(*results)


@every_isa
def test_a_thread_s_share_is_whole_groups(isa):
    """Where threads share the rows, each has its groups' own scales."""
    rows = int8(96, 700, transposed=True)
    h = rand(20, 700, dtype=torch.bfloat16) * torch.logspace(-2, 2, 700, base=2).bfloat16()
    results = []
    for number in (1, 3):
        with threads(number):
            results.append(cpu.KERNELS.linear(h, rows))
    assert_close(results[1], results[0], h.dtype)


REFUSED = {
    "no scale": (lambda rows: rows._replace(scale=None), "needs a scale"),
    "a scale too short": (lambda rows: rows._replace(scale=rows.scale[1:].clone()), "its scale"),
    "a scale in 16 bits": (lambda rows: rows._replace(scale=rows.scale.half()), "its scale"),
    "a scale of no int8": (lambda rows: rows._replace(weight=rows.weight.float()), "no scale"),
    "another dtype": (lambda rows: Rows(rows.weight.double(), transposed=rows.transposed), "x's dtype"),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_what_is_refused(transposed, change, said):
    x, rows = torch.ones(2, 8, device=CPU), int8(16, 8, transposed=transposed)
    with pytest.raises(RuntimeError, match=said):
        cpu.KERNELS.linear(x, change(rows))
