"""Weights of 4 bits, two in a byte, with a scale for each 128 columns or, transposed, for rows that share it,
on every instruction set, against fp32 math on the weights that they stand for.

What must not be read holds NaN where it can: scales of unselected rows, biases, activations of unselected
heads; bytes of unselected rows are others. With VNNI inputs are rounded to 8 bits at every number of tokens,
which is checked twice: loosely against exact inputs, and closely against inputs rounded likewise.
"""

import pytest
import torch
from kernel_inputs import NAN, rand_mask
from native import ISAS, every_isa, every_isa_and_dtype, few_tokens, rand, some_tokens, threads
from test_kernel_int8 import GROUPED_RMS, LANES_TOKENS, ROW_GROUP, grouped, lens_of
from tolerances import assert_close

from vllm_dejavu.kernels import cpu, packing, reference
from vllm_dejavu.kernels.interface import Call, Mlp, Rows
from vllm_dejavu.quantization import Integers, int4_rows

SIZES = [(128, 131), (256, 300), (640, 257)]
every_size = pytest.mark.parametrize(("hidden", "outputs"), SIZES, ids=str)
every_sharing = pytest.mark.parametrize("sharing", [None, 128, "all"], ids=str)


def is_rounded(x, isa):
    return isa in ("avx512_bf16", "avx512_vnni") and x.dtype != torch.float32


def assert_product(actual, expected, x, isa):
    """Of inputs x [T, ...]: loosely where they are rounded."""
    assert_close(actual, expected, x.dtype, GROUPED_RMS if is_rounded(x, isa) else None)


def int4(outputs, inputs, seed=1, bias=None):
    weight = rand(outputs, inputs, seed=seed, dtype=torch.float32, fan_in=inputs)
    weight *= torch.logspace(-2, 2, outputs, base=2)[:, None]  # scales that differ
    weight[outputs // 2] = 0
    integers, scale = int4_rows(weight, signed=outputs % 2 == 1)
    return Rows(integers, bias, scale)


def transposed(inputs, outputs, sharing=None, seed=2):
    """sharing: rows with one scale for each column, as checkpoints have it; None: rows have their own."""
    if sharing is None:
        weight = rand(outputs, inputs, seed=seed, dtype=torch.float32, fan_in=inputs)
        weight *= torch.logspace(-3, 3, outputs, base=2)[:, None]  # scales that differ
        weight[outputs // 2] = 0
        return transposed_of(weight)
    rows = int4(inputs, outputs, seed)
    groups = 1 if sharing == "all" else inputs // sharing
    scale = (rand(groups, outputs, seed=7, dtype=torch.float32).abs() + 0.1) * inputs**-0.5 / 4
    return Rows(rows.weight, None, scale.half(), True)


@pytest.mark.parametrize("columns", [64, 192])
def test_packing(columns):
    """Where each column's bits lie; and back."""
    integers = torch.arange(3 * columns).view(3, columns) % 16 - 8
    packed = packing.pack(integers)
    assert packed.dtype == torch.uint8 and packed.shape == (3, columns // 2)
    assert torch.equal(packing.unpack(packed), integers.to(torch.int8))
    for column in (0, 31, 32, columns - 1):
        piece, place = divmod(column, 64)
        byte = packed[:, 32 * piece + place % 32].int()
        assert torch.equal((byte >> (4 if place >= 32 else 0) & 15) - 8, integers[:, column].int())
    with pytest.raises(ValueError, match="a multiple of 64 columns, got 96"):
        packing.pack(torch.zeros(2, 96, dtype=torch.int8))


@pytest.mark.parametrize("signed", [False, True])
def test_rounding(signed):
    """Within half a step, but for the largest of a group, which may be cut, and better than with one fixed
    number of steps; rows of zeros stay.
    """
    weight = rand(60, 384, dtype=torch.bfloat16)
    weight[1] = 0
    weight[2, :128] = 1e-44
    integers, scale = int4_rows(weight, signed)
    assert integers.shape == (60, 192) and scale.shape == (60, 3) and scale.dtype == torch.bfloat16
    assert scale.isfinite().all() and (scale != 0).all() and ((scale > 0).all() != signed)
    rows, step = Rows(integers, None, scale), packing.expand(scale, 60, 384).abs()
    error = (rows.floats() - weight.float()).abs()
    assert (rows.floats()[1] == 0).all() and (error <= 2.1 * step).all()
    assert (error <= step / 2 * 1.001).float().mean() > 0.97
    for steps in (7, 7.5, 8):
        groups = weight.float().view(-1, 128)
        fixed = (groups.abs().amax(1, keepdim=True) / steps).clamp_min(1e-30)
        plain = ((groups / fixed).round().clamp(-8, 7) * fixed - groups).square().sum()
        assert error.square().sum() < 0.98 * plain


def test_outputs_are_made_alike_before_rows_share_their_scale():
    """A weight transposed, one output of which is a thousand times as large as the others: these keep their
    bits.
    """
    weight = rand(256, 64, dtype=torch.float32)
    weight[5] *= 1000
    found = transposed_of(weight).floats()
    others = torch.arange(256) != 5
    assert (found - weight)[others].norm() < 0.1 * weight[others].norm()
    plain = Rows(*_plain(weight), True).floats()
    assert (plain - weight)[others].norm() > 0.2 * weight[others].norm()


def transposed_of(weight):
    integers, scale, each = Integers(4, transposed=True).rounded(weight)
    return Rows(integers, None, scale, True, each)


def _plain(weight):
    integers, scale = int4_rows(weight.t(), signed=False)
    return integers, None, scale


@every_isa_and_dtype
@every_size
@some_tokens
def test_linear(tokens, hidden, outputs, dtype, isa):
    x = rand(tokens, hidden, dtype=dtype)
    rows = int4(outputs, hidden, bias=rand(outputs, seed=3, dtype=dtype))
    plain = rows._replace(bias=None)
    taken = grouped(x, size=64 if tokens >= LANES_TOKENS else 128) if is_rounded(x, isa) else x.float()
    expected = reference.linear(taken, plain)
    assert_close(expected, reference.linear(x.float(), plain), allowed=GROUPED_RMS)
    assert_close(cpu.KERNELS.linear(x, plain), expected, dtype)
    assert_close(cpu.KERNELS.linear(x, rows), expected + rows.bias.float(), dtype)


def rounded_products(x, rows):
    """x [T, n] times a transposed weight, as kernels with VNNI round it: where rows have their own scales, x
    times these, group by group of rows and of columns.
    """
    integers = packing.unpack(rows.weight).float()
    scale = packing.expand(rows.scale, *integers.shape)
    if len(rows.scale) != len(integers):
        most = 128 if len(rows.scale) > 1 else len(integers)
        assert most % ROW_GROUP == 0 or len(rows.scale) == 1
        return grouped(x, size=ROW_GROUP) @ (integers * scale)
    parts = []
    for column in range(0, integers.shape[1], 128):
        scaled = torch.stack([grouped(row * scale[:, column], size=ROW_GROUP) for row in x.float()[:, None]])
        parts.append(scaled[:, 0] @ integers[:, column : column + 128])
    return torch.cat(parts, 1) * rows.output_scale


@every_isa_and_dtype
@every_sharing
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 128), (384, 256), (256, 640)], ids=str)
@some_tokens
def test_a_transposed_linear(tokens, inputs, outputs, sharing, dtype, isa):
    x, rows = rand(tokens, inputs, dtype=dtype), transposed(inputs, outputs, sharing)
    exact = reference.linear(x.float(), rows)
    expected = rounded_products(x, rows) if is_rounded(x, isa) else exact
    assert_close(expected, exact, allowed=GROUPED_RMS)
    assert_close(cpu.KERNELS.linear(x, rows), expected, dtype)


@every_isa_and_dtype
@every_sharing
@pytest.mark.parametrize("masked", [False, True], ids=["union", "row-mask"])
@some_tokens
def test_sparse_mlp(tokens, masked, sharing, dtype, isa):
    hidden, ffn = 256, 384
    x = rand(tokens, hidden, dtype=dtype)
    lens, mask = lens_of(tokens, padded=tokens > 2), rand_mask(tokens, ffn, density=0.3)
    x[lens == 0] = NAN
    mask = mask & (lens > 0)[:, None]
    chosen = reference.compact_union(mask)._replace(mask=mask if masked else None)
    up = int4(ffn, hidden, bias=rand(ffn, seed=4, dtype=dtype))
    mlp = Mlp(up, transposed(ffn, hidden, sharing))
    counters = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    wide = mlp._replace(up=up._replace(bias=up.bias.float()))
    expected = reference.sparse_mlp(x.float(), wide, chosen, Call(lens, counters[0]))
    unread = ~mask.any(0)
    up.weight[unread], up.scale[unread], up.bias[unread] = 99, NAN, NAN
    mlp.down.weight[unread] = 99
    if sharing is None:
        mlp.down.scale[unread] = NAN
    found = cpu.KERNELS.sparse_mlp(x, mlp, chosen, Call(lens, counters[1]))
    assert_product(found, expected, x[lens > 0], isa)
    assert counters[0].tolist()[:4] == counters[1].tolist()[:4]
    # a neuron near 0 may come out on the other side where inputs are rounded
    assert abs(int(counters[0][4] - counters[1][4])) <= (tokens if is_rounded(x, isa) else 0)


@every_isa_and_dtype
@pytest.mark.parametrize("square", [False, True], ids=["relu", "relu2"])
@some_tokens
def test_dense_mlp_and_its_second_half(tokens, square, dtype, isa):
    hidden, ffn = 256, 384
    x = rand(tokens, hidden, dtype=dtype)
    activation = "relu2" if square else "relu"
    mlp = Mlp(int4(ffn, hidden, bias=rand(ffn, seed=4, dtype=dtype)), transposed(ffn, hidden), activation)
    wide = mlp._replace(up=mlp.up._replace(bias=mlp.up.bias.float()))
    allowed = 2 * GROUPED_RMS if square and is_rounded(x, isa) else None
    found, expected = cpu.KERNELS.sparse_mlp(x, mlp), reference.sparse_mlp(x.float(), wide)
    if allowed is None:
        assert_product(found, expected, x, isa)
    else:
        assert_close(found, expected, dtype, allowed)
    h, call = rand(tokens, ffn, seed=6, dtype=dtype), Call(torch.ones(tokens, dtype=torch.int32))
    expected = reference.exact_down(h.float(), mlp.down, activation, 0.5, call)
    assert_product(cpu.KERNELS.exact_down(h, mlp.down, activation, 0.5, call), expected, h, isa)


@every_isa
@pytest.mark.parametrize("tokens", [128, 200])
def test_second_halves_go_by_tiles_of_tokens(tokens, isa):
    """Where a few tokens need few of the neurons that all of them do."""
    hidden, ffn = 384, 640
    h = rand(tokens, ffn, dtype=torch.bfloat16).relu() * rand_mask(tokens, ffn, density=0.05)
    counters = torch.zeros(10, dtype=torch.int64)
    call = Call(torch.ones(tokens, dtype=torch.int32), counters)
    for sharing in (None, 128):
        down = transposed(ffn, hidden, sharing)
        found = cpu.KERNELS.exact_down(h, down, "relu", 0.5, call)
        assert_product(
            found, reference.exact_down(h.float(), down, "relu", 0.5, call._replace(counters=None)), h, isa
        )
    assert counters[0] == 2 * (tokens // 4)


@every_isa_and_dtype
@some_tokens
def test_projections_of_selected_heads(tokens, dtype, isa):
    heads, size, hidden = 4, 32, 256
    lens = lens_of(tokens)
    scores = torch.where(rand_mask(tokens, heads, density=0.4), 1.0, -1.0)
    scores[:, 2] = -1
    read = (scores > 0).any(0).repeat_interleave(size)
    x = rand(tokens, hidden, dtype=dtype)
    qkv = int4(3 * heads * size, hidden, bias=rand(3 * heads * size, seed=4, dtype=dtype))
    wide = qkv._replace(bias=qkv.bias.float())
    expected = reference.sparse_qkv(x.float(), wide, scores, size, Call(lens))
    unread = torch.cat([~read, torch.zeros(2 * heads * size, dtype=torch.bool)])
    qkv.weight[unread], qkv.scale[unread], qkv.bias[unread] = 99, NAN, NAN
    assert_product(cpu.KERNELS.sparse_qkv(x, qkv, scores, size, Call(lens)), expected, x, isa)

    out = transposed(heads * size, hidden)
    attn = cpu.KERNELS.mask_heads(rand(tokens, heads, size, seed=5, dtype=dtype), scores)
    expected = reference.sparse_out_proj(attn.float(), out, scores)
    out.weight[~read], out.scale[~read] = 99, NAN
    attn.view(tokens, -1)[:, ~read] = NAN
    assert_product(cpu.KERNELS.sparse_out_proj(attn, out, scores), expected, attn, isa)


@every_isa_and_dtype
@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_a_token_that_is_not_finite_spoils_no_other(tokens, bad, dtype, isa):
    x, rows, down = rand(tokens, 256, dtype=dtype), int4(128, 256), transposed(128, 256)
    clean, spoilt = x.clone(), tokens // 2
    x[spoilt, 7] = bad
    rest = torch.arange(tokens) != spoilt
    for run in (
        lambda x: cpu.KERNELS.linear(x, rows),
        lambda x: cpu.KERNELS.linear(x, transposed(256, 128)),
        lambda x: cpu.KERNELS.sparse_mlp(x, Mlp(rows, down)),
    ):
        found = run(x)
        assert torch.equal(found[rest], run(clean)[rest])
        assert not found[spoilt].isfinite().all()


def test_many_tokens_in_large_batches():
    """Blocks of 32 tokens, chunks of rows and of tokens, the last of each a part."""
    isa = ISAS[0]
    x, rows = rand(301, 640, dtype=torch.bfloat16), int4(411, 640)
    assert_product(cpu.KERNELS.linear(x, rows), reference.linear(x.float(), rows), x, isa)
    down, h = transposed(411, 640), rand(301, 411, dtype=torch.bfloat16)
    assert_product(cpu.KERNELS.linear(h, down), reference.linear(h.float(), down), h, isa)


@every_isa
@few_tokens
def test_any_number_of_threads(tokens, isa):
    x, rows = rand(tokens, 128, dtype=torch.bfloat16), transposed(128, 768)
    results = []
    for number in (1, 3):
        with threads(number):
            results.append(cpu.KERNELS.linear(x, rows))
    assert torch.equal(*results)


def test_rows_that_are_too_long_are_refused():
    rows = Rows(torch.zeros(1, 16448, dtype=torch.uint8), None, torch.ones(1, 257))
    with pytest.raises(RuntimeError, match="32896 columns, more than 32768"):
        cpu.KERNELS.linear(torch.ones(1, 32896, dtype=torch.bfloat16), rows)


REFUSED = {
    "no scale": (lambda rows: rows._replace(scale=None), "got none"),
    "a scale too short": (lambda rows: rows._replace(scale=rows.scale[1:]), "as its scale"),
    "a scale of integers": (lambda rows: rows._replace(scale=rows.scale.int()), "of Int"),
    "an output's scale": (lambda rows: rows._replace(output_scale=torch.ones(7)), "output_scale"),
    "columns": (
        lambda rows: rows._replace(weight=rows.weight[:, :32].contiguous()),
        "a multiple of 128 columns",
    ),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("of", ["rows", "transposed"])
def test_what_is_refused(of, change, said):
    rows = change(transposed(128, 128) if of == "transposed" else int4(128, 128))
    if "output_scale" in said and of == "rows":
        pytest.skip("it has none")
    inputs = 64 if "columns" in said and of == "rows" else 128
    with pytest.raises(RuntimeError, match=said):
        cpu.KERNELS.linear(torch.ones(2, inputs, dtype=torch.bfloat16), rows)
