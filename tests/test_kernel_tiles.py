"""A batch or prompt whose tokens go through fc2 a few at a time: selected neurons, all of them, and in int8.

fc2's row of a neuron that fires for one token holds infinity: times 0 that is no number, for every token that
it is multiplied with.
"""

import pytest
import torch
from kernel_inputs import rand
from native import every_isa_and_dtype, threads
from tolerances import assert_close

from vllm_dejavu.kernels import cpu, reference
from vllm_dejavu.kernels.interface import Call, Mlp, Rows
from vllm_dejavu.metrics import GATE_COUNTERS, new_gate_counters
from vllm_dejavu.quantization import int8_rows

TILE, LEAST_TILED = 4, 40  # as in kernels/csrc/transposed.h
HIDDEN, FFN, NEURON, TOKEN = 96, 640, 77, 6
ALWAYS, NEVER = 1.0, 1e-6  # shares of what all tokens need


@pytest.fixture
def use_share(monkeypatch):
    """Sets the share up to which tokens go by tiles."""

    def use(share):
        monkeypatch.setattr(cpu.NativeKernels, "tile_crossover", {16: share, 8: share})

    return use


def case(tokens, dtype, bits=16):
    """(x, the MLP): about a tenth of the neurons fire for a token, NEURON for TOKEN alone."""
    x, fc1 = rand(tokens, HIDDEN, dtype=dtype), rand(FFN, HIDDEN, seed=1, fan_in=HIDDEN)
    fc2 = rand(FFN, HIDDEN, seed=2, fan_in=FFN)
    bias = -(x.float() @ fc1.T).quantile(0.9, dim=0)
    x[:, 0], fc1[NEURON], bias[NEURON] = 0, 0, -1
    x[TOKEN, 0] = fc1[NEURON, 0] = 3
    if bits == 16:
        fc1, bias, fc2 = fc1.to(dtype), bias.to(dtype), fc2.to(dtype)
        return x, Mlp(Rows(fc1, bias), Rows(fc2, transposed=True), "relu")
    (up, up_scale), (down, down_scale) = int8_rows(fc1), int8_rows(fc2.T.contiguous())
    return x, Mlp(Rows(up, bias, up_scale), Rows(down.T.contiguous(), None, down_scale, True), "relu")


def run(x, mlp, selected):
    """The result, and the counts by name; selected: two of three neurons, or all of a dense step."""
    if not selected:
        return cpu.KERNELS.sparse_mlp(x, mlp), {}
    mask = (torch.arange(FFN) % 3 != 0).expand(len(x), FFN)
    counters, lens = new_gate_counters(x.device), torch.ones(len(x), dtype=torch.int32)
    out = cpu.KERNELS.sparse_mlp(x, mlp, reference.compact_union(mask), Call(lens, counters))
    return out, dict(zip(GATE_COUNTERS, counters.tolist(), strict=True))


def truth(x, mlp, selected):
    """In fp32."""
    h = torch.relu(reference.mlp_activations(x, mlp.up))
    if selected:
        h[:, ::3] = 0
    return h @ mlp.down.floats().T


selected_or_all = pytest.mark.parametrize("selected", [True, False], ids=["selected", "all"])


@every_isa_and_dtype
@selected_or_all
@pytest.mark.parametrize("tokens", [LEAST_TILED - 1, LEAST_TILED, 61, 257])
def test_tiles_change_nothing(tokens, selected, dtype, isa, use_share):
    x, mlp = case(tokens, dtype)
    counts = []
    for share in (ALWAYS, NEVER):
        use_share(share)
        out, counted = run(x, mlp, selected)
        assert_close(out, truth(x, mlp, selected), dtype)
        counts.append(counted)
    assert counts[0] == counts[1] and (not selected or 0 < counts[0]["survived"] <= FFN)


@every_isa_and_dtype
@selected_or_all
def test_a_tile_reads_what_its_own_tokens_need(selected, dtype, isa, use_share):
    if not selected and (isa != "avx512_bf16" or dtype != torch.bfloat16):
        pytest.skip("PyTorch's own linears run there")
    tokens = 61
    x, mlp = case(tokens, dtype)
    mlp.down.weight[NEURON] = torch.inf
    tile = [t for t in range(tokens) if t // TILE == TOKEN // TILE]
    others = [t for t in range(tokens) if t not in tile]
    for share in (ALWAYS, NEVER):
        use_share(share)
        out, _ = run(x, mlp, selected)
        assert not out[tile].isfinite().any()
        assert out[others].isfinite().all() == (share == ALWAYS)


@every_isa_and_dtype
@selected_or_all
def test_int8(selected, dtype, isa, use_share):
    """From 128 tokens on, whose values are rounded to 8 bits in groups either way."""
    x, mlp = case(130, dtype, bits=8)
    for share in (ALWAYS, NEVER):
        use_share(share)
        assert_close(run(x, mlp, selected)[0], truth(x, mlp, selected), dtype, 1.5e-2)


def test_threads_do_not_change_a_tile():
    x, mlp = case(61, torch.bfloat16)
    results = []
    for number in (1, 2, 3):
        with threads(number):
            results.append(run(x, mlp, True)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
