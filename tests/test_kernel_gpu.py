"""What only a GPU shows: programs that really run at once, CUDA graphs, streams, and memory errors.

The interpreter runs one program after the other, so races, missing fences and state left behind by a replay
cannot appear in test_kernel_triton.py.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import HANG_S
from kernel_flat import Flat
from kernel_flat import flat_reference as reference
from kernel_inputs import NAN, rand
from tolerances import assert_close

from vllm_dejavu.kernels import tables
from vllm_dejavu.kernels.gpu import KERNELS
from vllm_dejavu.kernels.workspace import Workspace

pytestmark = pytest.mark.gpu
gpu = Flat(KERNELS)

HIDDEN, FFN, RANK, HEADS, HEAD_SIZE, BLOCK_SIZE, MAX_LEN = 1024, 4096, 128, 16, 64, 16, 1024
QKV = 3 * HEADS * HEAD_SIZE
DTYPE = torch.float16
SIZES = pytest.mark.parametrize("tokens", [1, 8, 64], ids=lambda n: f"{n}-tokens")


def put(*shape, **options):
    return rand(*shape, **options).cuda()


def clear_bias(scores, share, seed):
    """A bias [units] that selects about `share` of each unit's scores, in the middle of the widest gap
    nearby.
    """
    number, units = scores.shape
    ordered = (
        torch.cat([scores, scores.amin(0, keepdim=True) - 0.05, scores.amax(0, keepdim=True) + 0.05])
        .sort(0)
        .values
    )
    aim = (
        ((1 - share) * number + torch.rand(units, generator=torch.Generator().manual_seed(seed)))
        .long()
        .to(scores.device)
    )
    far = (torch.arange(number + 1, device=scores.device)[:, None] - aim).abs() > min(3, number // 2)
    gap = ordered.diff(dim=0).masked_fill(far, 0).argmax(0, keepdim=True)
    return -(ordered.gather(0, gap) + ordered.gather(0, gap + 1))[0] / 2


@dataclass
class Layer:
    """Persistent buffers of a decode step at one padded batch size, and its weights."""

    tokens: int

    def __post_init__(self):
        tokens, half = self.tokens, {"dtype": DTYPE}
        self.x = put(tokens, HIDDEN, **half)
        self.down, self.up = (
            put(RANK, HIDDEN, seed=1, fan_in=HIDDEN, **half),
            put(FFN, RANK, seed=2, fan_in=RANK, **half),
        )
        self.bias = put(FFN, seed=3) * 0.1 - 1
        self.head_weight, self.head_bias = (
            put(HEADS, HIDDEN, seed=4, fan_in=HIDDEN, **half),
            put(HEADS, seed=5) * 0.1,
        )
        self.fc1, self.fc1_bias = put(FFN, HIDDEN, seed=6, fan_in=HIDDEN, **half), put(FFN, seed=7, **half)
        self.fc2_t = put(FFN, HIDDEN, seed=8, fan_in=FFN // 8, **half)
        self.qkv, self.qkv_bias = put(QKV, HIDDEN, seed=9, fan_in=HIDDEN, **half), put(QKV, seed=10, **half)
        self.out = put(HIDDEN, HEADS * HEAD_SIZE, seed=11, fan_in=HIDDEN, **half)
        blocks = tokens * MAX_LEN // BLOCK_SIZE
        self.kv_cache = put(blocks, BLOCK_SIZE, HEADS, 2 * HEAD_SIZE, seed=12, **half).transpose(1, 2)
        self.block_table = (
            torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
            .to("cuda", torch.int32)
            .view(tokens, -1)
        )
        self.seq_lens = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        self.counters = torch.zeros(5, dtype=torch.int64, device="cuda")
        self.workspace = Workspace.for_model(self.x.device, DTYPE, tokens, ffn=FFN, head_size=HEAD_SIZE)
        self.fill(tokens, seed=0)

    def fill(self, valid, seed):
        """New inputs in place: hidden states, lengths, block tables; NaN and 0 in rows that only pad the
        batch.
        """
        generator = torch.Generator().manual_seed(seed)
        self.x.copy_(rand(self.tokens, HIDDEN, seed=1000 + seed, dtype=DTYPE))
        self.x[valid:] = NAN
        lengths = torch.randint(1, MAX_LEN + 1, (self.tokens,), generator=generator, dtype=torch.int32)
        lengths[valid:] = 0
        self.seq_lens.copy_(lengths)
        shuffled = (
            torch.randperm(self.block_table.numel(), generator=generator)
            .to(torch.int32)
            .view(self.tokens, -1)
        )
        used = torch.arange(shuffled.shape[1])[None] * BLOCK_SIZE < lengths[:, None]
        self.block_table.copy_(torch.where(used, shuffled, 2**31 - 1))
        # scores near 0 would make exact comparison a coin toss
        share = 0.1 + 0.05 * (seed % 5)
        if valid:
            rows, none, no_heads = (
                self.x[:valid],
                torch.zeros_like(self.bias),
                torch.zeros_like(self.head_bias),
            )
            self.bias.copy_(
                clear_bias(
                    reference.low_rank_scores(rows, self.down, self.up, none), share / valid**0.5, seed
                )
            )
            self.head_bias.copy_(
                clear_bias(reference.linear_scores(rows, self.head_weight, no_heads), 0.3 + share, seed)
            )

    def mlp(self, module, counters=None, ids_from=None):
        lists = ids_from or module.select_neurons(
            self.x, self.down, self.up, self.bias, self.seq_lens, True, None, counters, self.workspace
        )
        ids, counts, mask = lists[:3]
        out = module.sparse_mlp(
            self.x,
            self.fc1,
            self.fc1_bias,
            self.fc2_t,
            ids,
            counts,
            self.seq_lens,
            mask,
            "relu",
            counters,
            self.workspace,
        )
        return {"ids": ids, "counts": counts, "mask": mask, "mlp": out}

    def attention(self, module, scores=None):
        if scores is None:
            scores = module.score_heads(
                self.x, self.head_weight, self.head_bias, self.seq_lens, self.workspace
            )
        qkv = module.sparse_qkv(
            self.x, self.qkv, self.qkv_bias, scores, self.seq_lens, HEAD_SIZE, None, self.workspace
        )
        query = qkv[:, : HEADS * HEAD_SIZE].view(self.tokens, HEADS, HEAD_SIZE)
        attn = module.paged_attention(
            query,
            self.kv_cache,
            self.block_table,
            self.seq_lens,
            HEAD_SIZE**-0.5,
            scores,
            MAX_LEN,
            self.workspace,
        )
        out = module.sparse_out_proj(attn, self.out, scores, None, self.workspace)
        return {"scores": scores, "qkv": qkv, "attn": attn, "attention": out}

    def step(self, module, counters=None):
        return {**self.mlp(module, counters), **self.attention(module)}


def compare(found, expected, valid):
    """Selections equal; everything else close, in the rows that hold a token."""
    for name, value in expected.items():
        if name in ("ids", "counts", "mask"):
            assert torch.equal(found[name], value), name
        else:
            if name == "scores":
                assert torch.equal(found[name] > 0, value > 0)
            if valid:
                # what comes after a rounding of another's result is compared at the model's precision
                assert_close(found[name][:valid], value[:valid], DTYPE)
    for name in ("mlp", "attn", "attention"):
        assert found[name][valid:].eq(0).all(), f"{name} of a padded row"


def capture(function):
    """(graph, what the function returned) after a warm-up on a side stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def clean(workspace):
    return not any(s.any() for s in workspace._semaphores.values())


def kernels_of(layer):
    """{name: call} of each kernel by itself, its inputs fixed."""
    given = layer.step(reference)
    lists, scores, attn = (given["ids"], given["counts"], given["mask"]), given["scores"], given["attn"]
    query = given["qkv"][:, : HEADS * HEAD_SIZE].view(layer.tokens, HEADS, HEAD_SIZE)
    common = {"workspace": layer.workspace}
    return {
        "score_heads": lambda m: [
            m.score_heads(layer.x, layer.head_weight, layer.head_bias, layer.seq_lens, **common)
        ],
        "select_neurons": lambda m: m.select_neurons(
            layer.x,
            layer.down,
            layer.up,
            layer.bias,
            layer.seq_lens,
            True,
            (layer.x, layer.head_weight, layer.head_bias),
            **common,
        ),
        "sparse_mlp": lambda m: [layer.mlp(m, None, lists)["mlp"]],
        "sparse_qkv": lambda m: [
            m.sparse_qkv(layer.x, layer.qkv, layer.qkv_bias, scores, layer.seq_lens, HEAD_SIZE, **common)
        ],
        "sparse_out_proj": lambda m: [m.sparse_out_proj(attn, layer.out, scores, **common)],
        "paged_attention": lambda m: [
            m.paged_attention(
                query,
                layer.kv_cache,
                layer.block_table,
                layer.seq_lens,
                HEAD_SIZE**-0.5,
                scores,
                MAX_LEN,
                **common,
            )
        ],
    }


@pytest.mark.parametrize(
    "name",
    ["score_heads", "select_neurons", "sparse_mlp", "sparse_qkv", "sparse_out_proj", "paged_attention"],
)
@SIZES
def test_a_kernel_gives_the_same_bits_a_hundred_times(tokens, name):
    """Sums are taken in a fixed order, whichever program comes last; and they are right."""
    layer = Layer(tokens)
    call = kernels_of(layer)[name]
    first = [t.clone() for t in call(gpu)]
    for ours, truth in zip(first, call(reference), strict=True):
        if ours.dtype.is_floating_point:
            assert_close(ours, truth, DTYPE)
        else:
            assert torch.equal(ours, truth)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        for ours, before in zip(call(gpu), first, strict=True):
            different += (ours != before).sum()
    assert different.item() == 0 and clean(layer.workspace)


def test_some_sizes_here_are_cut_in_pieces():
    """The tests above mean little where nothing is merged."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert tables.attention_splits(1, HEADS, MAX_LEN, device) > 1
    assert tables.down_grid(8, RANK, HEADS, HIDDEN, device) > 1
    assert tables.fc2_grid(8, HIDDEN, device) > 1


def test_one_graph_serves_every_number_of_valid_rows():
    """Captured at 8 rows, replayed with fewer: padding rows hold NaN in x and disturb nobody."""
    layer = Layer(8)
    graph, outputs = capture(lambda: layer.step(gpu))
    for seed, valid in enumerate([8, 5, 1, 7, 0, 8]):
        layer.fill(valid, seed)
        graph.replay()
        compare(outputs, layer.step(reference), valid)
    assert clean(layer.workspace)


@SIZES
def test_replays_follow_every_input_that_changes_in_place(tokens):
    """Fifty steps with other hidden states, thresholds, lengths and block tables each; counters add up over
    all of them.
    """
    layer = Layer(tokens)
    truth = torch.zeros_like(layer.counters)
    graph, outputs = capture(lambda: layer.step(gpu, layer.counters))
    layer.counters.zero_()  # the warm-up counted too
    for seed in range(50):
        valid = tokens - seed % (tokens + 1) // 2
        layer.fill(valid, seed)
        graph.replay()
        compare(outputs, layer.step(reference, truth), valid)
    torch.cuda.synchronize()
    assert torch.equal(layer.counters[:4], truth[:4])
    # an activation within rounding of 0 may fall on either side
    assert abs(layer.counters[4] - truth[4]) <= 1e-3 * truth[4]
    assert clean(layer.workspace)


def test_selection_on_a_stream_of_its_own():
    """Lookahead: select_neurons, which scores the heads too, beside qkv and attention; forked and joined in
    the capture.

    score_heads and select_neurons share scratch memory, so the streams never run both at once.
    """
    layer = Layer(8)
    side = torch.cuda.Stream()

    def step():
        forked, joined = torch.cuda.Event(), torch.cuda.Event()
        scores = gpu.score_heads(layer.x, layer.head_weight, layer.head_bias, layer.seq_lens, layer.workspace)
        forked.record()
        with torch.cuda.stream(side):
            side.wait_event(forked)
            lists = gpu.select_neurons(
                layer.x, layer.down, layer.up, layer.bias, layer.seq_lens, True, None, None, layer.workspace
            )
            joined.record(side)
        attention = layer.attention(gpu, scores)
        torch.cuda.current_stream().wait_event(joined)
        return {**attention, **layer.mlp(gpu, None, lists)}

    graph, outputs = capture(step)
    for seed, valid in enumerate([8, 3, 8, 1, 6] * 4):
        layer.fill(valid, seed)
        graph.replay()
        compare(outputs, layer.step(reference), valid)
    assert clean(layer.workspace)


SANITIZED = """
import torch
from test_kernel_gpu import Layer, compare, gpu, reference

for tokens in (1, 8):
    layer = Layer(tokens)
    compare(layer.step(gpu, layer.counters), layer.step(reference), tokens)
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    """Out-of-range accesses, and races over shared memory, that results need not show."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    here = Path(__file__).parent
    # torch's allocator would hide an access between two tensors of one block
    env = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": f"{here}:{here.parent}:{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANG_S)
    output = done.stdout + done.stderr
    if "Device not supported" in output:  # as under gVisor
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0, output[-4000:]
