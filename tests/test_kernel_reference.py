"""The reference kernels against plainer dense math in fp64, which knows masks but no lists, slices or pages.

Everything a function must not read holds NaN, so that reading it shows in the result.
"""

import pytest
import torch
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st
from kernel_flat import flat_reference as reference
from kernel_inputs import (
    DENSITIES,
    DENSITY_IDS,
    NAN,
    paged_cache,
    poison,
    rand,
    rand_mask,
    row_lens_of,
    scores_of,
)
from tolerances import DTYPE_IDS, DTYPES, assert_close

FUZZ = fuzz(80)

# (tokens, hidden, units): odd sizes, one token, one neuron, and sizes that tile well.
SIZES = [(1, 64, 256), (3, 37, 301), (5, 16, 1), (1, 1, 1), (8, 48, 192)]
SIZE_IDS = ["one-token", "odd", "one-neuron", "all-one", "tiled"]


# Scores and selection


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("tokens", "hidden", "units"), SIZES, ids=SIZE_IDS)
def test_scores_are_the_predictors_matrix_products_in_fp32(tokens, hidden, units, dtype):
    """Low-rank and linear scores equal explicit sums over rank and hidden, whatever the stored dtype; they
    are fp32.
    """
    rank = 7
    x = rand(tokens, hidden, dtype=dtype)
    down, up = (
        rand(rank, hidden, seed=1, dtype=dtype, fan_in=hidden),
        rand(units, rank, seed=2, dtype=dtype, fan_in=rank),
    )
    weight, bias = rand(units, hidden, seed=3, dtype=dtype, fan_in=hidden), rand(units, seed=4)
    low_rank = torch.einsum("th,rh,ur->tu", x.double(), down.double(), up.double()) + bias.double()
    linear = (x.double()[:, None, :] * weight.double()[None]).sum(2) + bias.double()
    lens = torch.ones(tokens, dtype=torch.int32)
    for scores, expected in (
        (reference.low_rank_scores(x, down, up, bias), low_rank),
        (reference.linear_scores(x, weight, bias), linear),
        (reference.score_heads(x, weight, bias, lens), linear),
    ):
        assert scores.dtype == torch.float32
        assert_close(scores, expected)


def test_select_takes_positive_scores_of_valid_rows_only():
    """0 and -0 are not selected; a padded row selects nothing, whatever garbage its scores hold."""
    scores = torch.tensor(
        [[1.0, 0.0, -0.0, -1.0, 1e-38], [1.0, 1.0, 1.0, 1.0, 1.0], [NAN, float("inf"), 1.0, 0.0, -1.0]]
    )
    got = reference.select(scores, torch.tensor([7, 1, 0], dtype=torch.int32))
    assert got.tolist() == [[True, False, False, False, True], [True] * 5, [False] * 5]


def test_score_heads_gives_minus_one_to_padded_rows():
    """NaN in a padded row's input stays there; the other rows keep their scores."""
    x, weight, bias = rand(3, 8), rand(5, 8, seed=1, fan_in=8), rand(5, seed=2)
    valid = torch.tensor([True, False, True])
    got = reference.score_heads(poison(x, valid), weight, bias, row_lens_of(valid))
    assert got[1].tolist() == [-1.0] * 5
    assert_close(got[valid], (x.double() @ weight.double().t() + bias.double())[valid])


def plain_list(mask):
    """The neuron list of the units that any row selected, segment by segment, and the units themselves."""
    units, ids, counts = mask.shape[1], [], []
    chosen = [u for u in range(units) if any(mask[:, u].tolist())]
    for start in range(0, units, reference.SEGMENT):
        end = min(units, start + reference.SEGMENT)
        found = [u for u in chosen if start <= u < end]
        ids += found + [units] * (end - start - len(found))
        counts.append(len(found))
    return ids, counts, chosen


def check_list(mask, ids, counts):
    expected_ids, expected_counts, chosen = plain_list(mask)
    assert (ids.dtype, counts.dtype) == (torch.int32, torch.int32)
    assert ids.tolist() == expected_ids and counts.tolist() == expected_counts
    assert reference.listed(ids, counts).tolist() == chosen


@FUZZ
@given(tokens=st.integers(1, 6), units=st.integers(1, 300), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_compact_union_lists_every_selected_unit_once_ascending(tokens, units, density, seed):
    """Exactly the units that some row selected, in order inside their segment; the tails hold `units`; int32
    throughout.
    """
    mask = rand_mask(tokens, units, density=density, seed=seed)
    check_list(mask, *reference.compact_union(mask))


@pytest.mark.parametrize("units", [1, 127, 128, 129, 256], ids=lambda n: f"{n}-units")
@pytest.mark.parametrize("density", [0.0, 1.0], ids=["none-selected", "all-selected"])
def test_compact_union_of_nothing_and_of_everything(density, units):
    mask = rand_mask(4, units, density=density)
    check_list(mask, *reference.compact_union(mask))


@pytest.mark.parametrize("with_row_mask", [True, False], ids=["row-mask", "union"])
@pytest.mark.parametrize(
    "valid",
    [[True] * 4, [True, False, False, True], [False] * 4],
    ids=["no-padding", "padding", "all-padding"],
)
def test_select_neurons_predicts_unites_and_counts(valid, with_row_mask):
    """List, row mask and head scores equal plain math; padded rows (NaN) select nothing; counters add to what
    they held.
    """
    valid = torch.tensor(valid)
    x, down, up, bias = (
        rand(4, 24),
        rand(5, 24, seed=1, fan_in=24),
        rand(200, 5, seed=2, fan_in=5),
        rand(200, seed=3) - 1,
    )
    heads = poison(rand(4, 24, seed=4), valid), rand(3, 24, seed=5, fan_in=24), rand(3, seed=6)
    mask = (torch.einsum("th,rh,ur->tu", x.double(), down.double(), up.double()) + bias.double() > 0) & valid[
        :, None
    ]
    counters = torch.full((5,), 100)
    ids, counts, row_mask, scores = reference.select_neurons(
        poison(x, valid), down, up, bias, row_lens_of(valid), with_row_mask, heads, counters
    )
    check_list(mask, ids, counts)
    assert torch.equal(row_mask, mask if with_row_mask else mask[:0])
    assert torch.equal(scores, reference.score_heads(*heads, row_lens_of(valid)))
    assert counters.sub(100).tolist() == [1, int(valid.sum()), int(mask.sum()), int(mask.any(0).sum()), 0]
    assert reference.select_neurons(x, down, up, bias, row_lens_of(valid))[3] is None


# MLP


def dense_mlp(x, fc1_weight, fc1_bias, fc2_weight_t, mask):
    """All neurons in fp64, then the unselected of each row multiplied by 0."""
    h = x.double() @ fc1_weight.double().t() + (0 if fc1_bias is None else fc1_bias.double())
    return (h.clamp_min(0) * mask) @ fc2_weight_t.double()


def mlp_inputs(tokens, hidden, units, dtype, with_bias=True):
    x, fc1 = rand(tokens, hidden, dtype=dtype), rand(units, hidden, seed=1, dtype=dtype, fan_in=hidden)
    return (
        x,
        fc1,
        rand(units, seed=2, dtype=dtype) if with_bias else None,
        rand(units, hidden, seed=3, dtype=dtype, fan_in=units),
    )


def poisoned_mlp(x, fc1, bias, fc2_t, mask, row_mask=None, valid=None, **options):
    """sparse_mlp with NaN in all that the union of `mask` leaves out, and in rows that are not valid."""
    keep = mask.any(0)
    bias = None if bias is None else poison(bias, keep)
    valid = torch.ones(len(x), dtype=torch.bool) if valid is None else valid
    return reference.sparse_mlp(
        poison(x, valid),
        poison(fc1, keep),
        bias,
        poison(fc2_t, keep),
        *reference.compact_union(mask),
        row_lens_of(valid),
        row_mask,
        **options,
    )


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("row_exact", [False, True], ids=["union", "row-exact"])
@pytest.mark.parametrize("density", DENSITIES, ids=DENSITY_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("tokens", "hidden", "units"), SIZES, ids=SIZE_IDS)
def test_sparse_mlp_equals_the_masked_dense_mlp(tokens, hidden, units, dtype, density, row_exact, with_bias):
    """Rows read the union of the batch, or with a row mask their own neurons; nothing unselected is read."""
    inputs = mlp_inputs(tokens, hidden, units, dtype, with_bias)
    mask = rand_mask(tokens, units, density=density)
    out = poisoned_mlp(*inputs, mask, mask if row_exact else None)
    assert out.dtype == dtype
    assert_close(out, dense_mlp(*inputs, mask if row_exact else mask.any(0).expand_as(mask)))


def test_sparse_mlp_with_everything_selected_is_the_dense_mlp():
    """Density 1.0 equals torch's own linear layers."""
    x, fc1, bias, fc2_t = mlp_inputs(4, 32, 96, torch.float32)
    everything = torch.ones(4, 96, dtype=torch.bool)
    dense = torch.nn.functional.linear(torch.nn.functional.linear(x, fc1, bias).relu(), fc2_t.t())
    assert_close(poisoned_mlp(x, fc1, bias, fc2_t, everything, everything), dense)


def test_sparse_mlp_reads_fc2_only_where_a_neuron_came_out_positive():
    """fc2 rows of selected neurons that are <= 0 in every row hold NaN too; `survived` counts the rest, on
    top of what it held.
    """
    x, fc1, bias, fc2_t = mlp_inputs(3, 24, 60, torch.float32)
    mask = rand_mask(3, 60, density=0.5)
    h = torch.nn.functional.linear(x, fc1, bias)
    alive = ((h > 0) & mask).any(0)
    assert 0 < alive.sum() < mask.any(0).sum(), "the test needs selected neurons that are off"
    counters = torch.full((5,), 100)
    lens = torch.ones(3, dtype=torch.int32)
    out = reference.sparse_mlp(
        x, fc1, bias, poison(fc2_t, alive), *reference.compact_union(mask), lens, mask, counters=counters
    )
    assert_close(out, dense_mlp(x, fc1, bias, fc2_t, mask))
    assert counters.sub(100).tolist() == [0, 0, 0, 0, int(alive.sum())]


@pytest.mark.parametrize("row_exact", [False, True], ids=["union", "row-exact"])
def test_sparse_mlp_row_of_a_padded_token_is_zero(row_exact):
    """A padded row gives 0 even where its input is NaN, with a row mask or without, and adds nothing to its
    neighbours.
    """
    x, fc1, bias, fc2_t = mlp_inputs(3, 24, 60, torch.float32)
    valid = torch.tensor([True, False, True])
    mask = rand_mask(3, 60, density=0.5) & valid[:, None]
    out = poisoned_mlp(x, fc1, bias, fc2_t, mask, mask if row_exact else None, valid)
    assert out[1].eq(0).all()
    assert_close(out, dense_mlp(x, fc1, bias, fc2_t, mask if row_exact else mask.any(0) & valid[:, None]))


@FUZZ
@given(st.data())
def test_sparse_mlp_for_any_shape_selection_and_row_mask(data):
    """Any sizes, any selection (also none), any row mask inside it, in every dtype."""
    tokens, hidden, units = (data.draw(st.integers(1, n)) for n in (6, 40, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = mlp_inputs(tokens, hidden, units, dtype, data.draw(st.booleans()))
    mask = rand_mask(tokens, units, density=data.draw(st.floats(0, 1)), seed=data.draw(st.integers(0, 99)))
    row_mask = (
        mask & rand_mask(tokens, units, density=data.draw(st.floats(0, 1)), seed=1)
        if data.draw(st.booleans())
        else None
    )
    expected = dense_mlp(*inputs, mask.any(0).expand_as(mask) if row_mask is None else row_mask)
    assert_close(poisoned_mlp(*inputs, mask, row_mask), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_mlp_activations_are_fp32_pre_activations(dtype, with_bias):
    x, fc1, bias, _ = mlp_inputs(3, 37, 101, dtype, with_bias)
    out = reference.mlp_activations(x, fc1, bias)
    assert out.dtype == torch.float32
    assert_close(out, x.double() @ fc1.double().t() + (bias.double() if with_bias else 0))


# Attention

# (tokens, heads, KV heads, head_size): hidden is heads * head_size.
HEADS = [(1, 4, 4, 16), (3, 5, 5, 20), (2, 1, 1, 8), (4, 8, 2, 32)]
HEADS_IDS = ["one-token", "odd", "one-head", "grouped"]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("density", DENSITIES, ids=DENSITY_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_size"), HEADS, ids=HEADS_IDS)
def test_sparse_qkv_computes_all_keys_and_values_and_the_selected_queries(
    tokens, heads, kv_heads, head_size, dtype, density, with_bias
):
    """K and V equal the dense projection for every head and row; Q of heads that no row selected is 0 and its
    rows unread.
    """
    hidden, size = heads * head_size, (heads + 2 * kv_heads) * head_size
    x, weight = rand(tokens, hidden, dtype=dtype), rand(size, hidden, seed=1, dtype=dtype, fan_in=hidden)
    bias = rand(size, seed=2, dtype=dtype) if with_bias else None
    mask = rand_mask(tokens, heads, density=density)
    dense = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    wanted = torch.tensor([row >= hidden or bool(mask[:, row // head_size].any()) for row in range(size)])
    counters, lens = torch.full((5,), 100), torch.arange(tokens, dtype=torch.int32)  # one row of padding
    bias = poison(bias, wanted) if with_bias else None
    out = reference.sparse_qkv(x, poison(weight, wanted), bias, scores_of(mask), lens, head_size, counters)
    assert out.dtype == dtype
    assert_close(out, torch.where(wanted, dense, 0.0))
    assert counters.sub(100).tolist() == [1, tokens - 1, int(mask.sum()), int(mask.any(0).sum()), 0]


@pytest.mark.parametrize("density", DENSITIES, ids=DENSITY_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_size"), HEADS, ids=HEADS_IDS)
def test_masked_heads_through_out_proj_equal_a_sum_over_each_rows_heads(
    tokens, heads, kv_heads, head_size, dtype, density
):
    """mask_heads then sparse_out_proj: per row the sum of its own heads' parts; NaN in other heads and
    columns is unseen.
    """
    hidden = heads * head_size
    attn, weight = (
        rand(tokens, heads, head_size, dtype=dtype),
        rand(hidden, hidden, seed=1, dtype=dtype, fan_in=hidden),
    )
    mask = rand_mask(tokens, heads, density=density)
    expected = torch.einsum(
        "tnd,hnd->th", (attn * mask[:, :, None]).double(), weight.double().unflatten(1, (heads, head_size))
    )
    masked = reference.mask_heads(torch.where(mask[:, :, None], attn, NAN), scores_of(mask))
    assert masked.dtype == dtype and torch.equal(masked, attn * mask[:, :, None])
    weight = poison(weight, mask.any(0).repeat_interleave(head_size), dim=1)
    out = reference.sparse_out_proj(masked, weight, scores_of(mask))
    assert out.dtype == dtype
    assert_close(out, expected)
    output = torch.full_like(out, NAN)
    assert reference.sparse_out_proj(masked, weight, scores_of(mask), output) is output and torch.equal(
        output, out
    )


def plain_attention(query, keys, values, scale, head_mask):
    """Softmax attention one row and head at a time, in fp64, on contiguous keys and values."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys[0].shape[1]
    for row, head in head_mask.nonzero().tolist():
        if len(keys[row]):
            k, v = keys[row][:, head // group].double(), values[row][:, head // group].double()
            scores = scale * (k * query[row, head].double()).sum(1)
            weights = (scores - scores.max()).exp()
            out[row, head] = (weights[:, None] * v).sum(0) / weights.sum()
    return out


LENGTHS = {
    "one-token": [1],
    "uneven": [1, 16, 17, 33, 50],
    "with-padding": [7, 0, 40, 0],
    "all-padded": [0, 0],
}


@pytest.mark.parametrize("density", DENSITIES, ids=DENSITY_IDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("block_size", [16, 32], ids=["block-16", "block-32"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_paged_attention_reads_only_selected_heads_inside_each_sequence(layout, block_size, lengths, density):
    """NaN in other heads, other blocks and behind seq_len is unseen; unselected heads and padded rows come
    out as 0.
    """
    check_paged_attention(
        layout, block_size, lengths, density, heads=4, kv_heads=4, head_size=32, dtype=torch.float32
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("head_size", [32, 64, 80, 128], ids=lambda n: f"head-size-{n}")
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)], ids=["one-kv-head-each", "grouped", "one-kv-head"]
)
def test_paged_attention_for_every_head_size_grouping_and_dtype(heads, kv_heads, head_size, dtype):
    """Query heads that share a KV head may be selected apart from each other."""
    for layout in ("NHD", "HND"):
        check_paged_attention(
            layout,
            16,
            LENGTHS["uneven"],
            0.5,
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            dtype=dtype,
        )


def check_paged_attention(layout, block_size, lengths, density, *, heads, kv_heads, head_size, dtype):
    tokens = len(lengths)
    query = rand(tokens, heads, head_size, dtype=dtype)
    keys = [rand(n, kv_heads, head_size, seed=10 + i, dtype=dtype) for i, n in enumerate(lengths)]
    values = [rand(n, kv_heads, head_size, seed=50 + i, dtype=dtype) for i, n in enumerate(lengths)]
    head_mask = rand_mask(tokens, heads, density=density)
    needed = head_mask.unflatten(1, (kv_heads, -1)).any(2)
    cache, table = paged_cache(keys, values, needed, block_size, layout)
    assert cache.is_contiguous() == (layout == "HND") or kv_heads == 1
    # Queries of unselected heads and padded rows are not read either.
    read = head_mask & torch.tensor(lengths, dtype=torch.bool)[:, None]
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    scale = head_size**-0.5
    poisoned = torch.where(read[:, :, None], query, NAN)
    out = reference.paged_attention(poisoned, cache, table, seq_lens, scale, scores_of(head_mask))
    assert out.dtype == dtype and out[~read].eq(0).all()
    assert_close(out, plain_attention(query, keys, values, scale, head_mask))
