"""`exact_down`: an activation, and the rows of fc2 of neurons that came out positive; the reference, every
instruction set, and Triton under its interpreter, against fp32 math over all neurons.

Rows of neurons that are positive for no token hold NaN.
"""

import pytest
import torch
from kernel_inputs import NAN, poison, rand, row_lens_of
from native import every_isa, every_isa_and_dtype, threads
from tolerances import DTYPE_IDS, DTYPES, assert_close
from triton_checks import DEVICE, multiprocessors

from vllm_dejavu.kernels import cpu, gpu, reference, tables
from vllm_dejavu.kernels.interface import Call, Rows
from vllm_dejavu.metrics import GATE_COUNTERS, new_gate_counters
from vllm_dejavu.quantization import int8_rows

TILE, LEAST_TILED = 4, 40  # as in kernels/csrc/transposed.h
BLOCK_ROWS, BLOCK_COLUMNS = 512, 256
CHUNK = 256  # MLP_TOKENS
# Alone, few, many at once, tiles that are full and not, a chunk and one more.
TOKENS = [1, 5, 13, LEAST_TILED - 1, LEAST_TILED, 61, CHUNK + 1]
activations = pytest.mark.parametrize("activation", ["relu", "relu2"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)


def hidden_states(tokens, ffn, dtype, density=0.2, seed=0):
    """What fc1 gave: positive at rates that differ from neuron to neuron, so that some are for no token."""
    rates = (torch.rand(ffn, generator=torch.Generator().manual_seed(seed)) * 3 * density - density).clamp(
        0, 1
    )
    alive = torch.rand(tokens, ffn, generator=torch.Generator().manual_seed(seed + 1)) < rates
    size = rand(tokens, ffn, seed=seed + 2).abs()
    return torch.where(alive, size + 0.01, -size).to(dtype)


def truth(h, weight, activation):
    """All neurons, in fp32; weight [ffn, hidden]."""
    positive = torch.relu(h.float())
    return (positive.square() if activation == "relu2" else positive) @ weight.float()


def tiles_of(tokens):
    """(first, last) of each tile, in chunks."""
    chunks, found = max(1, -(-tokens // CHUNK)), []
    for chunk in range(chunks):
        begin, end = tokens * chunk // chunks, tokens * (chunk + 1) // chunks
        of_tile = end - begin if end - begin < LEAST_TILED else TILE
        found += [(first, min(first + of_tile, end)) for first in range(begin, end, of_tile)]
    return found


def run(kernels, h, rows, activation, crossover=1.0, row_lens=None):
    """The result and the counts by name."""
    counters = new_gate_counters(h.device)
    lens = torch.ones(len(h), dtype=torch.int32, device=h.device) if row_lens is None else row_lens
    out = kernels.exact_down(h, rows, activation, crossover, Call(lens, counters))
    assert out.dtype == h.dtype
    return out, dict(zip(GATE_COUNTERS, counters.tolist(), strict=True))


def weight_of(h, hidden, dtype, seed=5):
    """fc2 with NaN in what must not be read, and without."""
    weight = rand(h.shape[1], hidden, seed=seed, dtype=dtype, fan_in=h.shape[1])
    return poison(weight, (h > 0).any(0)), weight


@activations
@every_dtype
def test_reference(dtype, activation):
    h = hidden_states(7, 150, dtype)
    h[3] = h[3].abs()  # a row that only pads the batch: nothing of it is needed
    lens = row_lens_of(torch.arange(7) != 3)
    poisoned, weight = weight_of(torch.cat([h[:3], h[4:]]), 37, dtype)
    out, counts = run(reference, h, Rows(poisoned, transposed=True), activation, row_lens=lens)
    expected = truth(h, weight, activation)
    expected[3] = 0
    assert_close(out, expected, dtype)
    alive = (h > 0) & (lens > 0)[:, None]
    read = int(alive.any(0).sum())
    assert 0 < read < 150
    expected = {"steps": 1, "rows": 6, "selected": int(alive.sum()), "read": read, "survived": read}
    assert {k: v for k, v in counts.items() if v} == expected


# Sizes that fill no vector, pair or tile; columns for several panels, rows for several blocks.
SIZES = [(1, 1), (75, 131), (BLOCK_COLUMNS + 44, 2 * BLOCK_ROWS + 3), (4 * BLOCK_COLUMNS, BLOCK_ROWS)]
every_size = pytest.mark.parametrize(("hidden", "ffn"), SIZES, ids=["one", "odd", "blocks", "panels"])


@every_isa_and_dtype
@every_size
def test_native(hidden, ffn, dtype, isa):
    """Tile by tile: each reads what some token of it needs, which the counters tell."""
    for number, tokens in enumerate(TOKENS):
        h = hidden_states(tokens, ffn, dtype, seed=tokens)
        h[0, 0] = 1  # not nothing, in the smallest
        poisoned, weight = weight_of(h, hidden, dtype)
        activation = ("relu", "relu2")[number % 2]
        out, counts = run(cpu.KERNELS, h, Rows(poisoned, transposed=True), activation)
        assert_close(out, truth(h, weight, activation), dtype)
        tiles = tiles_of(tokens)
        read = sum(int((h[a:b] > 0).any(0).sum()) for a, b in tiles)
        expected = {"steps": len(tiles), "rows": tokens, "selected": int((h > 0).sum())}
        assert {k: v for k, v in counts.items() if v} == expected | {"read": read, "survived": read}


@every_isa_and_dtype
def test_native_all_at_once_above_the_crossover(dtype, isa):
    """What all tokens of a chunk together need, as few tokens do anyway."""
    hidden, ffn = 96, 301
    for tokens in TOKENS:
        h = hidden_states(tokens, ffn, dtype, seed=tokens)
        h[0, 0] = 1
        chunks = h.split(CHUNK) if tokens <= CHUNK else (h[: tokens // 2], h[tokens // 2 :])
        poisoned, weight = weight_of(h, hidden, dtype)
        out, counts = run(cpu.KERNELS, h, Rows(poisoned, transposed=True), "relu", crossover=1e-6)
        assert_close(out, truth(h, weight, "relu"), dtype)
        assert counts["steps"] == len(chunks)
        assert counts["above_crossover"] == (len(chunks) if tokens >= LEAST_TILED else 0)
        assert counts["read"] == counts["survived"] == sum(int((part > 0).any(0).sum()) for part in chunks)


@every_isa
@activations
@pytest.mark.parametrize("crossover", [1.0, 1e-6], ids=["tiles", "all-at-once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_native_int8(dtype, crossover, activation, isa):
    """Rows of neurons that nobody needs hold other integers. From 13 tokens on inputs have 8 bits."""
    hidden, ffn = 300, 700
    for tokens in (1, 9, 127, 130):
        h = hidden_states(tokens, ffn, dtype, seed=tokens)
        integers, scale = int8_rows(
            rand(hidden, ffn, seed=5, fan_in=ffn) * torch.logspace(-1, 1, hidden)[:, None]
        )
        weight = integers.t().contiguous()
        other = torch.where((h > 0).any(0)[:, None], weight, (weight.int() * 57 % 127).to(torch.int8))
        out, _ = run(cpu.KERNELS, h, Rows(other, None, scale, True), activation, crossover)
        grouped = tokens >= 13 and dtype != torch.float32
        assert_close(out, truth(h, weight * scale, activation), dtype, 1.2e-2 if grouped else None)


@every_isa
def test_native_keeps_what_is_not_a_number(isa):
    """As a dense layer would: in the rows of the token that has it."""
    h = hidden_states(LEAST_TILED, 96, torch.float32)
    h[2, 5], h[6, 40] = NAN, torch.inf
    weight, others = rand(96, 64, seed=5), [t for t in range(LEAST_TILED) if t not in (2, 6)]
    for crossover in (1.0, 1e-6):
        out, _ = run(cpu.KERNELS, h, Rows(weight, transposed=True), "relu", crossover)
        assert out[2].isnan().all() and not out[6].isfinite().any()
        assert out[others].isfinite().all()


@every_isa
def test_native_threads_and_strides(isa):
    """One thread or three, inputs that are columns of something wider, no tokens: the same."""
    wide = hidden_states(61, 400, torch.bfloat16)
    h, weight = wide[:, 50:350], rand(300, 640, seed=5, dtype=torch.bfloat16, fan_in=300)
    results = []
    for number in (1, 2, 3):
        with threads(number):
            results += [
                run(cpu.KERNELS, x, Rows(weight, transposed=True), "relu")[0] for x in (h, h.contiguous())
            ]
    assert all(torch.equal(result, results[0]) for result in results)
    assert run(cpu.KERNELS, h[:0], Rows(weight, transposed=True), "relu")[0].shape == (0, 640)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(h=c["h"][:, :-1]), "x must be a CPU tensor"),
        (lambda c: c.update(h=c["h"].half()), "must have x's dtype"),
        (lambda c: c.update(scale=torch.ones(64)), "and no scale"),
        (lambda c: c.update(each=torch.ones(64)), "only weights of 4 bits have an output_scale"),
        (lambda c: c.update(counters=torch.zeros(5, dtype=torch.int64)), "at least 10 elements"),
    ],
    ids=["columns", "dtype", "scale", "output-scale", "counters"],
)
def test_native_refuses(change, message):
    c = {"h": rand(3, 96), "weight": rand(96, 64), "scale": None, "each": None, "counters": None}
    change(c)
    weight = c["weight"], c["scale"], c["each"]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dejavu_cpu.exact_down(c["h"], *weight, False, 1.0, c["counters"])


@activations
@every_dtype
@pytest.mark.parametrize("tokens", [1, 5, 33, 64])
def test_triton(tokens, dtype, activation):
    """All rows share their neurons; padding rows need none."""
    valid = torch.arange(tokens) % 3 != 1
    h = hidden_states(tokens, 300, dtype)
    h[~valid] = h[~valid].abs()
    poisoned, weight = weight_of(h[valid], 75, dtype)
    with multiprocessors(3 if tokens < 33 else None):
        out, counts = run(
            gpu.KERNELS,
            h.to(DEVICE),
            Rows(poisoned.to(DEVICE), transposed=True),
            activation,
            row_lens=row_lens_of(valid).to(DEVICE),
        )
    expected = truth(h, weight, activation) * valid[:, None]
    assert_close(out.cpu(), expected, dtype)
    alive = (h > 0) & valid[:, None]
    read = int(alive.any(0).sum())
    expected = {
        "steps": 1,
        "rows": int(valid.sum()),
        "selected": int(alive.sum()),
        "read": read,
        "survived": read,
    }
    assert {k: v for k, v in counts.items() if v} == expected


def test_triton_squares_fit_into_fp16():
    """700² does not, a sixteenth of it does; small ones keep their digits."""
    h = torch.tensor([[700.0, 0.25, -3.0]], dtype=torch.float16)
    weight = torch.tensor([[0.01], [1.0], [NAN]], dtype=torch.float16)
    out, _ = run(gpu.KERNELS, h.to(DEVICE), Rows(weight.to(DEVICE), transposed=True), "relu2")
    assert_close(
        out.cpu(), truth(h, weight[:2].float().new_tensor([[0.01], [1.0], [0.0]]), "relu2"), torch.float16
    )


def test_triton_runs_many_rows_dense():
    """By their number alone: a graph cannot change it."""
    tokens = gpu.KERNELS.largest_batch + 1
    h, weight = hidden_states(tokens, 96, torch.float32), rand(96, 64, fan_in=96)
    assert tokens > max(tables.buckets("fc2"))
    out, counts = run(gpu.KERNELS, h.to(DEVICE), Rows(weight.to(DEVICE), transposed=True), "relu")
    assert_close(out.cpu(), truth(h, weight, "relu"))
    assert counts["read"] == counts["survived"] == 96
