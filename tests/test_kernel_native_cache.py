"""The paged cache of selected heads, read through vLLM's own CPU operators, against attention in fp32.

All that must not be read holds NaN: keys and values of the heads that a row did not select.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform

from vllm_dejavu import metrics
from vllm_dejavu.compat import (
    cpu_attention_isa,
    cpu_attention_schedule,
    cpu_attention_splits,
    key_and_value_cache,
)
from vllm_dejavu.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.MISSING)
SIZE, BLOCK = 32, 32
LENS = (1, 40, 300)  # with the token of this step
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def operators():
    current_platform.import_kernels()


class Case:
    """One attention block over a cache with three sequences, whose blocks are shuffled."""

    def __init__(self, heads, kv_heads, selected, dtype, padding=1, poison=True):
        torch.manual_seed(0)
        self.heads, self.kv, self.dtype, self.selected = heads, kv_heads, dtype, selected
        self.rows, self.padding, hidden = len(LENS), padding, heads * SIZE
        per_row = -(-max(LENS) // BLOCK)
        self.table = torch.randperm(self.rows * per_row).view(self.rows, per_row).int()
        cache = torch.zeros(self.rows * per_row, kv_heads, BLOCK, 2 * SIZE, dtype=dtype)
        self.keys, self.values = key_and_value_cache(cache, kv_heads, SIZE)
        self.isa = cpu_attention_isa(dtype, BLOCK, SIZE)
        self.lens = torch.tensor(LENS, dtype=torch.int32)
        # what came before this step
        self.past = [torch.randn(2, n - 1, kv_heads, SIZE).to(dtype) for n in LENS]
        read = selected.view(self.rows, kv_heads, -1).any(-1)
        for row, (key, value) in enumerate(self.past):
            stored = [key.clone(), value.clone()]
            for part in stored:
                part[:, ~read[row]] = NAN if poison else 0
            self.write(*stored, self.slots(row, torch.arange(len(key))))
        self.qkv = (torch.randn((heads + 2 * kv_heads) * SIZE, hidden) * hidden**-0.5).to(dtype)
        self.out = (torch.randn(hidden, hidden) * hidden**-0.5).to(dtype)
        self.x = torch.randn(self.rows + padding, hidden).to(dtype)
        self.counters = torch.zeros(len(metrics.GATE_COUNTERS), dtype=torch.int64)

    def slots(self, row, places):
        return self.table[row].long()[places // BLOCK] * BLOCK + places % BLOCK

    def write(self, key, value, slots):
        if len(key):
            vllm_ops.cpu_attn_reshape_and_cache(key, value, self.keys, self.values, slots, self.isa)

    def run(self, least_cached=0, most_tokens=-1, one_token_each=True, slopes=None):
        """What the block gives for the rows that are no padding."""
        model = torch.classes.dejavu_cpu.Model(1, False)
        counts = {"once": {"steps": 1, "read": self.heads, "above_crossover": 1}, "row": {"rows": 1}}
        once, row = (
            torch.tensor([counts[of].get(name, 0) for name in metrics.GATE_COUNTERS]) for of in counts
        )
        gate = [self.counters, once, row, row]
        predictor = [torch.zeros(self.heads, self.x.shape[1]), torch.zeros(self.heads)]
        weights = self.qkv, None, None, self.out, None, None, False
        heads = [self.heads, self.kv, SIZE]
        model.add_attention(0, "", gate, most_tokens, predictor, *weights, heads, None, False)
        numbers = [SIZE**-0.5, 0.0, 1.0, 1.0]
        fixed = self.isa, "auto", numbers, -1, slopes, None, cpu_attention_splits()
        self.way = model.use_cache(0, self.keys, self.values, *fixed, least_cached)
        starts = torch.arange(self.rows + 1, dtype=torch.int32)
        shape = self.rows, self.heads, self.kv, SIZE
        schedule = cpu_attention_schedule(*shape, self.lens, self.dtype, starts, self.isa)
        slots = torch.cat([self.slots(i, self.lens[i : i + 1].long() - 1) for i in range(self.rows)])
        lens = torch.nn.functional.pad(self.lens, (0, self.padding))
        scores = torch.where(self.selected, 1.0, -1.0)
        scores = torch.cat([scores, torch.full((self.padding, self.heads), -1.0)])
        sequences = [starts, self.lens, self.table, schedule]
        model.begin(True, [], [], lens, slots, sequences, self.rows, True, one_token_each)
        try:
            out = torch.ops.dejavu_cpu.attention(self.x, self.x, torch.zeros(0), scores, 0)
        finally:
            model.end()
        assert out.shape == self.x.shape
        return out[: self.rows]

    def expected(self):
        """Each row's own selected heads, in fp32."""
        x, selected = self.x[: self.rows].float(), self.selected
        qkv = (x @ self.qkv.float().T).to(self.dtype).float().view(self.rows, -1, SIZE)
        query, key, value = qkv.split([self.heads, self.kv, self.kv], 1)
        attn = torch.zeros(self.rows, self.heads, SIZE)
        for row, past in enumerate(self.past):
            for head in selected[row].nonzero().flatten().tolist():
                kv = head // (self.heads // self.kv)
                keys = torch.cat([past[0, :, kv].float(), key[row, kv][None]])
                values = torch.cat([past[1, :, kv].float(), value[row, kv][None]])
                attn[row, head] = (keys @ query[row, head] * SIZE**-0.5).softmax(0) @ values
        return attn.to(self.dtype).float().flatten(1) @ self.out.float().T

    def counted(self, name):
        return int(self.counters[metrics.GATE_COUNTERS.index(name)])


def random_heads(heads, seed=1):
    torch.manual_seed(seed)
    selected = torch.rand(len(LENS), heads) < 0.4
    selected[0] = False  # a row may select none
    selected[1:, heads - 1] = True
    return selected


@pytest.mark.parametrize("most_tokens", [-1, 1], ids=["sparse-projections", "dense-projections"])
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_selected_heads(dtype, kv_heads, most_tokens):
    selected = random_heads(8)
    case = Case(8, kv_heads, selected, dtype)
    assert_close(case.run(most_tokens=most_tokens), case.expected(), dtype)
    assert case.way == 2
    read = selected.view(len(LENS), kv_heads, -1).any(-1).sum(1)
    assert case.counted("cache_held") == kv_heads * sum(LENS)
    assert case.counted("cache_read") == sum(int(n) * length for n, length in zip(read, LENS, strict=True))
    assert case.counted("selected") == selected.sum() and case.counted("rows") == len(LENS)
    assert case.counted("steps") == 1
    dense = most_tokens == 1
    assert case.counted("read") == (8 if dense else selected.any(0).sum())
    assert case.counted("above_crossover") == dense


@pytest.mark.parametrize("chosen", [False, True], ids=["none", "all"])
def test_no_head_and_all_heads(chosen):
    case = Case(4, 4, torch.full((len(LENS), 4), chosen), torch.float32)
    assert_close(case.run(), case.expected(), torch.float32)


@pytest.mark.parametrize(
    "how",
    [{"least_cached": sum(LENS) + 1}, {"least_cached": None}, {"one_token_each": False}],
    ids=["too-short", "never", "not-one-token-each"],
)
def test_all_heads_are_attended_to_otherwise(how):
    """Of which those that a row did not select become 0."""
    case = Case(4, 4, random_heads(4), torch.float32, poison=False)
    assert_close(case.run(**how), case.expected(), torch.float32)
    held = 0 if "one_token_each" in how else 4 * sum(LENS)
    assert case.counted("cache_held") == case.counted("cache_read") == held


def test_the_limit_is_of_all_sequences_together():
    for limit, selected in ((sum(LENS), True), (sum(LENS) + 1, False)):
        case = Case(4, 4, random_heads(4), torch.float32, poison=False)
        case.run(least_cached=limit)
        assert (case.counted("cache_read") < case.counted("cache_held")) == selected


def test_slopes_are_of_heads_by_place():
    case = Case(4, 4, random_heads(4), torch.float32, poison=False)
    case.run(slopes=torch.zeros(4))
    assert case.way == 1 and case.counted("cache_read") == case.counted("cache_held")
