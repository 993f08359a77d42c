"""The native CPU kernels against the references: selection, sparse MLP and projections."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    every_density,
    every_dtype,
    every_padding,
)
from kernel_flat import flat_reference as reference
from kernel_inputs import NAN, scores_of
from native import (
    FUZZ,
    ISAS,
    best_isa,
    check_linear,
    checks,
    every_isa,
    every_isa_and_dtype,
    few_tokens,
    instruction_set,
    kernels,
    native,
    rand,
    some_tokens,
    threads,
)
from tolerances import DTYPES

from vllm_dejavu.kernels import cpu


def test_the_best_instruction_set_is_the_default():
    """Plain C++ is always there, last; "" chooses the best one."""
    assert ISAS[-1] == "generic" and len(set(ISAS)) == len(ISAS)
    with instruction_set("generic"):
        cpu.use_isa("")
        assert cpu.isa() == ISAS[0]


# Selection


@every_isa_and_dtype
@some_tokens
def test_select_neurons_for_every_batch_size(tokens, dtype, isa):
    """The list, row mask, counters and head scores, with a row of padding in three; ffn ends inside a
    segment.
    """
    checks.select_neurons(tokens, dtype=dtype)


# Lists are made in ops.cpp, alike for every instruction set.
many_or_few_tokens = pytest.mark.parametrize(
    "tokens", [1, 4, 70], ids=["one-token", "few-tokens", "many-tokens"]
)


@best_isa
@every_padding
@every_density
@many_or_few_tokens
def test_select_neurons_for_every_density_and_padding(tokens, density, padding, isa):
    checks.select_neurons(tokens, density=density, padding=padding)


@every_isa
@many_or_few_tokens
def test_infinite_biases_select_everything(tokens, isa):
    """As the dense switch sets them: each instruction set has a threshold of its own."""
    checks.select_neurons(tokens, density=1)


@pytest.mark.parametrize("with_row_mask", [True, False], ids=["row-mask", "union"])
@pytest.mark.parametrize("heads", [0, 3], ids=["alone", "with-heads"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("tokens", [1, 6], ids=["one-token", "few-tokens"])
def test_select_neurons_does_what_is_asked_and_no_more(tokens, with_row_mask, heads, counted):
    checks.select_neurons(tokens, with_row_mask=with_row_mask, heads=heads, counted=counted)


@every_isa_and_dtype
@pytest.mark.parametrize(
    ("hidden", "rank", "ffn", "heads"),
    [(1, 1, 1, 1), (37, 3, 129, 33), (64, 32, 128, 1), (190, 65, 127, 4)],
    ids=["all-one", "odd", "tiled", "large"],
)
def test_select_neurons_for_every_size(hidden, rank, ffn, heads, dtype, isa):
    for tokens in (1, 5):
        checks.select_neurons(tokens, hidden=hidden, rank=rank, ffn=ffn, heads=heads, dtype=dtype)


every_predictor = pytest.mark.parametrize(
    "predictor",
    [*DTYPES, torch.int8],
    ids=["fp32-predictor", "fp16-predictor", "bf16-predictor", "int8-predictor"],
)


@every_isa
@every_predictor
@pytest.mark.parametrize("tokens", [1, 5, 33], ids=["one-token", "few-tokens", "many-tokens"])
def test_predictors_of_every_type(tokens, predictor, isa):
    """No instruction set rounds a score. Heads ride along."""
    checks.select_neurons(tokens, predictor=predictor)


@best_isa
@every_predictor
@every_dtype
def test_predictors_of_every_type_serve_every_model(dtype, predictor, isa):
    """Whatever the two types, they meet in fp32: PyTorch widens the inputs before any instruction set sees
    them.
    """
    checks.select_neurons(5, dtype=dtype, predictor=predictor)


@every_isa
def test_a_score_of_zero_selects_nothing(isa):
    """0 and -0 are not selected, the smallest positive score is."""
    bias, one = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1.0]), torch.ones(2, dtype=torch.int32)
    ids, counts, mask, _ = kernels.select_neurons(
        torch.zeros(2, 3), torch.ones(4, 3), torch.ones(5, 4), bias, one, True
    )
    assert ids.tolist() == [2, 4, 5, 5, 5] and counts.tolist() == [2]
    assert mask.tolist() == [[False, False, True, False, True]] * 2


@every_isa
@pytest.mark.parametrize("tokens", [1, 5, 17, 70], ids=lambda n: f"{n}-tokens")
def test_score_heads_for_every_batch_size(tokens, isa):
    checks.score_heads(tokens)


@best_isa
@every_padding
@every_dtype
@pytest.mark.parametrize("tokens", [1, 17], ids=lambda n: f"{n}-tokens")
def test_score_heads_for_every_type_and_padding(tokens, dtype, padding, isa):
    checks.score_heads(tokens, dtype, padding)


# MLP


@every_isa_and_dtype
@some_tokens
def test_sparse_mlp_for_every_batch_size(tokens, dtype, isa):
    """Each row its own neurons, a row of padding in three, fc2 rows counted over all tokens."""
    checks.sparse_mlp(tokens, dtype=dtype)


@best_isa
@every_padding
@every_density
@many_or_few_tokens
def test_sparse_mlp_for_every_density_and_padding(tokens, density, padding, isa):
    checks.sparse_mlp(tokens, density=density, padding=padding)


@pytest.mark.parametrize("row_exact", [True, False], ids=["row-exact", "union"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("tokens", [1, 6], ids=["one-token", "few-tokens"])
def test_sparse_mlp_with_every_option(tokens, row_exact, with_bias, counted):
    checks.sparse_mlp(tokens, row_exact=row_exact, with_bias=with_bias, counted=counted)


@every_isa_and_dtype
@pytest.mark.parametrize(
    ("hidden", "ffn"),
    [(1, 1), (37, 1), (37, 129), (64, 128), (80, 300), (190, 400)],
    ids=["all-one", "one-neuron", "odd", "tiled", "uneven", "large"],
)
def test_sparse_mlp_for_every_size(hidden, ffn, dtype, isa):
    """Columns that end inside a tile of 32, an odd number of survivors, more of them than a block holds."""
    for tokens in (1, 5, 9, 14, 40):
        checks.sparse_mlp(tokens, hidden=hidden, ffn=ffn, dtype=dtype, density=0.6)


@best_isa
def test_more_tokens_than_have_sums_in_the_cache(isa):
    """As many as a prompt's, where prompts are sparse: columns are still taken some hundred at a time."""
    checks.sparse_mlp(1100, hidden=300, ffn=130, padding="none")


@every_isa_and_dtype
@pytest.mark.parametrize("hidden", [256, 512], ids=lambda n: f"{n}-columns")
def test_rows_of_a_power_of_two_of_bytes(hidden, dtype, isa):
    """Such inputs are copied to rows that lie farther apart."""
    for tokens in (1, 2, 9):
        checks.select_neurons(tokens, hidden=hidden, dtype=dtype)
        checks.sparse_mlp(tokens, hidden=hidden, dtype=dtype)
        checks.sparse_qkv(tokens, hidden=hidden, dtype=dtype)
        checks.sparse_out_proj(tokens, heads=hidden // 16, dtype=dtype)
        check_linear(tokens, hidden, 20, dtype)


@every_isa_and_dtype
def test_sparse_mlp_of_one_neuron_in_every_segment(dtype, isa):
    checks.sparse_mlp_of_single_neurons(dtype)


@FUZZ
@given(
    tokens=st.integers(1, 70),
    hidden=st.integers(1, 200),
    ffn=st.integers(8, 400),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0.01, 0.99),
    padding=st.sampled_from(["none", "some", "all"]),
    with_bias=st.booleans(),
    row_exact=st.booleans(),
    name=st.sampled_from(ISAS),
    number=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_mlp_for_any_shape_selection_and_padding(
    tokens, hidden, ffn, rank, dtype, density, padding, with_bias, row_exact, name, number, seed
):
    """Selection and MLP, by any number of threads. The MLP's inputs are whole enough that a tolerance means
    something.
    """
    with instruction_set(name), threads(number):
        # With few tokens, as every unit needs a threshold away from all scores.
        checks.select_neurons(
            min(tokens, 20),
            max(hidden, 8),
            rank,
            ffn,
            dtype,
            density=density,
            padding=padding,
            with_row_mask=row_exact,
            seed=seed,
        )
        checks.sparse_mlp(
            tokens, max(hidden, 8), ffn, dtype, density, padding, with_bias, row_exact, seed=seed
        )


# Projections


@every_isa_and_dtype
@few_tokens
def test_sparse_qkv_for_every_batch_size(tokens, dtype, isa):
    checks.sparse_qkv(tokens, dtype=dtype, kv_heads=2)


@best_isa
@every_padding
@every_density
@many_or_few_tokens
def test_sparse_qkv_for_every_density_and_padding(tokens, density, padding, isa):
    checks.sparse_qkv(tokens, density=density, padding=padding)


def check_qkv_sizes(heads, kv_heads, head_size, **options):
    for tokens, hidden, dtype in ((1, 37, torch.float32), (5, 37, torch.float32), (20, 64, torch.bfloat16)):
        checks.sparse_qkv(tokens, heads, kv_heads, head_size, hidden, dtype, **options)


@pytest.mark.parametrize("head_size", [1, 8, 32, 80], ids=lambda n: f"head-size-{n}")
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)], ids=["one-kv-head-each", "grouped", "one-kv-head"]
)
def test_sparse_qkv_for_every_head_shape(heads, kv_heads, head_size):
    """Heads become rows in ops.cpp, before any instruction set."""
    check_qkv_sizes(heads, kv_heads, head_size)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_sparse_qkv_with_every_option(with_bias, counted):
    check_qkv_sizes(4, 2, 8, with_bias=with_bias, counted=counted)


@every_isa_and_dtype
@few_tokens
def test_sparse_out_proj_for_every_batch_size(tokens, dtype, isa):
    checks.sparse_out_proj(tokens, dtype=dtype)


@best_isa
@every_padding
@every_density
@pytest.mark.parametrize("given_output", [True, False], ids=["given-output", "new-output"])
@many_or_few_tokens
def test_sparse_out_proj_for_every_density_and_padding(tokens, given_output, density, padding, isa):
    """Segments of columns are made of the scores in ops.cpp, alike for every instruction set."""
    checks.sparse_out_proj(tokens, density=density, padding=padding, given_output=given_output)


@every_isa_and_dtype
@pytest.mark.parametrize(
    ("heads", "head_size", "hidden"),
    [(1, 8, 1), (5, 20, 37), (9, 7, 5), (2, 80, 64), (8, 16, 190), (32, 3, 40), (16, 6, 40)],
    ids=["one-head", "odd", "odder", "wide-heads", "large", "odd-heads-in-even-rows", "heads-inside-a-line"],
)
def test_sparse_out_proj_for_every_size(heads, head_size, hidden, dtype, isa):
    """Selected heads side by side are one segment of columns; between them lie NaN. Many rows select few
    heads each, or the union is all of them.
    """
    for tokens, densities in ((1, (0.4, 0.8)), (5, (0.1, 0.4)), (20, (0.03, 0.1))):
        for density in densities:
            checks.sparse_out_proj(tokens, heads, head_size, hidden, dtype, density)


@every_dtype
@pytest.mark.parametrize("head_size", [1, 20, 64], ids=lambda n: f"head-size-{n}")
@pytest.mark.parametrize("tokens", [0, 1, 7], ids=lambda n: f"{n}-tokens")
def test_mask_heads(tokens, head_size, dtype):
    """Unselected heads become 0 whatever they hold, of a part of a wider tensor too; the others keep every
    bit.
    """
    mask = checks.rand_mask(tokens, 5, density=0.5)
    attn = torch.where(mask[:, :, None], rand(tokens, 5, head_size, dtype=dtype), NAN)
    expected = reference.mask_heads(attn, scores_of(mask))
    for given_attn in (attn, torch.cat([attn, attn], 1)[:, :5], torch.cat([attn, attn], 2)[..., :head_size]):
        before = given_attn.clone()
        out = kernels.mask_heads(given_attn, scores_of(mask))
        assert out.dtype == dtype and torch.equal(out, expected)
        assert torch.equal(given_attn.nan_to_num(7), before.nan_to_num(7)), "the input stays as it is"


@pytest.mark.parametrize("lens", [[], [0, 0], [5], [3, 0, 1, 0]], ids=len)
def test_dense_passes_are_counted(lens):
    once, per_row, row_lens = (
        torch.tensor([1, 0, 0, 300, 300, 0, 0]),
        torch.tensor([0, 1, 300, 0, 0, 0, 0]),
        torch.tensor(lens, dtype=torch.int32),
    )
    ours, theirs = torch.arange(7), torch.arange(7)
    native.count_dense(ours, once, per_row, row_lens)
    reference.count_dense(theirs, once, per_row, row_lens)
    rows = sum(n > 0 for n in lens)
    assert ours.tolist() == theirs.tolist() == [1, 1 + rows, 2 + 300 * rows, 303, 304, 5, 6]
    with pytest.raises(
        RuntimeError, match=r"per_row must be a contiguous CPU tensor \[7\] of Long, got \[6\]"
    ):
        native.count_dense(ours, once, per_row[:6], row_lens)


def test_prepare_weight_changes_nothing():
    """An advice about pages only; smaller tensors than a page, and parts of tensors, get none or less of
    it.
    """
    for weight in (rand(1, 1), rand(2000, 1000), rand(2000, 1000)[7:, 3:], torch.empty(0)):
        before = weight.clone()
        assert kernels.prepare_weight(weight) is None and torch.equal(weight, before)


@FUZZ
@given(
    tokens=st.integers(1, 40),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    head_size=st.integers(1, 90),
    hidden=st.integers(8, 150),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0, 1),
    padding=st.sampled_from(["none", "some", "all"]),
    with_bias=st.booleans(),
    name=st.sampled_from(ISAS),
    number=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_projections_for_any_shape_selection_and_padding(
    tokens, kv_heads, group, head_size, hidden, dtype, density, padding, with_bias, name, number, seed
):
    with instruction_set(name), threads(number):
        checks.sparse_qkv(
            tokens,
            kv_heads * group,
            kv_heads,
            head_size,
            hidden,
            dtype,
            density,
            padding,
            with_bias,
            seed=seed,
        )
        checks.sparse_out_proj(
            tokens, kv_heads * group, head_size, hidden, dtype, density, padding, seed=seed
        )
