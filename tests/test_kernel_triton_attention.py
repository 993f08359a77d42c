"""The Triton kernel of paged attention against the reference: lengths, layouts, splits, grouping."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    every_density,
    every_dtype,
)
from kernel_flat import flat_reference as reference
from kernel_inputs import NAN, paged_cache, scores_of
from kernel_inputs import rand as cpu_rand
from kernel_inputs import rand_mask as cpu_rand_mask
from tolerances import DTYPES, assert_close
from triton_checks import DEVICE, FUZZ, multiprocessors, rand, triton_kernels

from vllm_dejavu.kernels import tables
from vllm_dejavu.kernels.workspace import Workspace

# Attention


def check_attention(
    lengths,
    dtype=torch.float32,
    heads=4,
    kv_heads=2,
    head_size=32,
    block_size=16,
    layout="NHD",
    density=0.6,
    max_model_len=None,
    sms=None,
    splits=None,
    workspace=None,
    seed=0,
):
    """paged_attention against the reference; query is a strided part of q, k and v.

    Args:
        splits: how many pieces a sequence must have been cut in, or None.
    """
    tokens, scale = len(lengths), head_size**-0.5
    keys = [cpu_rand(n, kv_heads, head_size, seed=seed + 10 + i, dtype=dtype) for i, n in enumerate(lengths)]
    values = [
        cpu_rand(n, kv_heads, head_size, seed=seed + 50 + i, dtype=dtype) for i, n in enumerate(lengths)
    ]
    mask = cpu_rand_mask(tokens, heads, density=density, seed=seed)
    cache, table = (
        t.to(DEVICE)
        for t in paged_cache(keys, values, mask.unflatten(1, (kv_heads, -1)).any(2), block_size, layout)
    )
    assert cache.is_contiguous() == (layout == "HND") or 1 in (kv_heads, block_size)
    mask, seq_lens = mask.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    read = mask & (seq_lens > 0)[:, None]
    qkv = torch.full((tokens, heads + 2 * kv_heads, head_size), NAN, dtype=dtype, device=DEVICE)
    qkv[:, :heads] = torch.where(
        read[:, :, None], 3 * rand(tokens, heads, head_size, seed=seed, dtype=dtype), NAN
    )
    query = qkv.flatten(1)[:, : heads * head_size].view(tokens, heads, head_size)
    args = query, cache, table, seq_lens, scale, scores_of(mask), max_model_len
    with multiprocessors(sms):
        if splits is not None:
            longest = table.shape[1] * block_size
            assert (
                tables.attention_splits(tokens, heads, min(max_model_len or longest, longest), DEVICE)
                == splits
            )
        out = triton_kernels.paged_attention(*args, workspace)
    assert out.dtype == dtype and out[~read].eq(0).all()
    assert_close(out, reference.paged_attention(*args))


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128], ids=lambda n: f"head-size-{n}")
@every_dtype
def test_paged_attention_for_every_head_size_and_dtype(dtype, head_size):
    """Lengths around a block and around a step, and a row of padding."""
    check_attention([1, 15, 16, 0, 17, 33], dtype, head_size=head_size, heads=2, kv_heads=1)


@pytest.mark.parametrize("block_size", [16, 32, 48], ids=lambda n: f"block-{n}")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("tokens", ["one", "several"])
def test_paged_attention_for_every_layout_and_length(tokens, layout, block_size):
    lengths = [0, 1, block_size - 1, block_size, block_size + 1, 3 * block_size - 5]
    for some in [[n] for n in lengths] if tokens == "one" else [lengths]:
        check_attention(some, block_size=block_size, layout=layout)


@every_density
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)], ids=["one-kv-head-each", "pairs", "fours"]
)
@pytest.mark.parametrize(
    "lengths", [[21], [40, 0, 7, 0], [0, 0]], ids=["one-token", "some-padded", "all-padded"]
)
def test_paged_attention_for_every_density_and_grouping(lengths, heads, kv_heads, density):
    """Query heads that share a KV head are selected apart from each other."""
    check_attention(lengths, heads=heads, kv_heads=kv_heads, density=density)


@pytest.mark.parametrize(
    "max_model_len", [None, 330, 10_000], ids=["unknown-length", "longest-known", "more-than-the-table"]
)
@pytest.mark.parametrize(
    ("sms", "splits"),
    [(1, 1), (2, 2), (6, 5), (999, 5)],
    ids=["one-split", "two", "as-many-as-fit", "huge-chip"],
)
def test_paged_attention_of_cut_sequences(sms, splits, max_model_len):
    """Whatever the number of pieces; short sequences use fewer of them than there are."""
    lengths = [330, 32, 0, 33]
    check_attention(
        lengths, heads=1, kv_heads=1, density=1.0, max_model_len=max_model_len, sms=sms, splits=splits
    )


@every_dtype
def test_paged_attention_of_cut_sequences_for_every_dtype(dtype):
    """The interpreter's own number of multiprocessors already cuts one long sequence."""
    splits = tables.attention_splits(1, 2, 23 * 16, DEVICE)
    assert splits > 1
    check_attention([350], dtype, heads=2, kv_heads=1, density=1.0, head_size=80, splits=splits)


def test_paged_attention_divides_the_live_length():
    """Each sequence is cut in whole steps as evenly as goes; only the pieces it needs are written."""
    lengths = [300, 64, 65, 32, 0]
    with multiprocessors(100):
        workspace = Workspace.for_model(DEVICE, torch.float32, len(lengths), ffn=1, head_size=32)
        splits = tables.attention_splits(len(lengths), 1, 20 * 16, DEVICE)
        partials = workspace.take("attention", len(lengths), splits, 32 + 2).fill_(NAN)
        check_attention(lengths, heads=1, kv_heads=1, density=1.0, workspace=workspace, splits=5)
    # of 64 tokens; 32 each; 32 each; one piece alone is not merged, so not written
    assert (~partials.isnan().any(2)).sum(1).tolist() == [5, 2, 3, 0, 0]


def test_paged_attention_of_one_score_far_above_all_others():
    """The largest score decides, in whatever lane, step or piece it is: others underflow to 0, none to
    NaN.
    """
    for position in (0, 31, 32, 100, 299):
        keys = torch.full((300, 1, 32), -5.0)
        keys[position] = 5.0
        values = cpu_rand(300, 1, 32, seed=1)
        cache, table = (
            t.to(DEVICE) for t in paged_cache([keys], [values], torch.ones(1, 1, dtype=torch.bool), 16, "NHD")
        )
        one = torch.ones(1, 1, device=DEVICE)
        with multiprocessors(3):
            out = triton_kernels.paged_attention(
                torch.full((1, 1, 32), 100.0, device=DEVICE),
                cache,
                table,
                torch.tensor([300], dtype=torch.int32, device=DEVICE),
                1.0,
                one,
            )
        assert_close(out[0].cpu(), values[position])


@FUZZ
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_size=st.sampled_from([8, 24, 32, 64, 80]),
    block_size=st.sampled_from([16, 32, 48]),
    layout=st.sampled_from(["NHD", "HND"]),
    density=st.floats(0, 1),
    sms=st.integers(1, 30),
    longest=st.sampled_from([None, 200, 256]),
    seed=st.integers(0, 99),
)
def test_paged_attention_for_any_shape_length_and_selection(
    lengths, dtype, kv_heads, group, head_size, block_size, layout, density, sms, longest, seed
):
    """Blocks are shuffled, entries behind a sequence's last block name a block outside the cache."""
    check_attention(
        lengths,
        dtype,
        kv_heads * group,
        kv_heads,
        head_size,
        block_size,
        layout,
        density,
        longest,
        sms,
        seed=seed,
    )
