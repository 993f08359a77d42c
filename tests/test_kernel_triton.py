"""The Triton kernels against the references: selection, MLP and projections.

Everything a kernel must not read holds NaN; selections and counts are compared exactly.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    every_dtype,
    every_padding,
)
from tolerances import DTYPES
from triton_checks import (
    DEVICE,
    FUZZ,
    checks,
    densities_and_paddings,
    multiprocessors,
    some_tokens_and_dtypes,
)

from vllm_dejavu.kernels import tables

# Selection


@some_tokens_and_dtypes
def test_select_neurons_for_every_batch_size(tokens, dtype):
    """The list, row mask, counters and head scores, with a row of padding in three; ffn ends inside a
    segment.
    """
    checks.select_neurons(tokens, dtype=dtype)


@densities_and_paddings
def test_select_neurons_for_every_density_and_padding(tokens, density, padding):
    checks.select_neurons(tokens, density=density, padding=padding)


@pytest.mark.parametrize("with_row_mask", [True, False], ids=["row-mask", "union"])
@pytest.mark.parametrize("heads", [0, 3], ids=["alone", "with-heads"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("tokens", [1, 6], ids=["one-token", "few-tokens"])
def test_select_neurons_does_what_is_asked_and_no_more(tokens, with_row_mask, heads, counted):
    checks.select_neurons(tokens, with_row_mask=with_row_mask, heads=heads, counted=counted)


@every_dtype
@pytest.mark.parametrize(
    ("hidden", "rank", "ffn", "heads"),
    [(1, 1, 1, 1), (37, 3, 129, 33), (64, 32, 128, 1), (190, 65, 127, 4)],
    ids=["all-one", "odd", "tiled", "large"],
)
def test_select_neurons_for_every_size(hidden, rank, ffn, heads, dtype):
    for tokens in (1, 5):
        checks.select_neurons(tokens, hidden=hidden, rank=rank, ffn=ffn, heads=heads, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("predictor", [torch.float16, torch.int8], ids=["fp16-predictor", "int8-predictor"])
@pytest.mark.parametrize("tokens", [1, 5, 33], ids=["one-token", "few-tokens", "many-tokens"])
def test_fp16_and_int8_predictors_serve_every_model(tokens, predictor, dtype):
    """Floats of two types meet in fp32; integers become the activations' type, which holds them exactly.
    Heads ride along.
    """
    checks.select_neurons(tokens, dtype=dtype, predictor=predictor)


@every_dtype
@pytest.mark.parametrize(
    ("tokens", "heads"), [(2, 0), (5, 18), (70, 3)], ids=["alone", "with-heads", "two-token-blocks"]
)
def test_down_projection_cut_in_pieces(tokens, heads, dtype):
    """On a large chip the hidden size is divided too; the last piece is shorter."""
    hidden = 7 * tables.tile("down", tokens).k + 3
    for sms in (12, 132):
        with multiprocessors(sms):
            assert tables.down_grid(tokens, 20, heads, hidden, DEVICE) == (
                2 if sms == 12 and tokens == 70 else 3
            )
            checks.select_neurons(tokens, hidden=hidden, rank=20, ffn=40, heads=heads, dtype=dtype)


@every_padding
@pytest.mark.parametrize("tokens", [1, 5, 70], ids=lambda n: f"{n}-tokens")
def test_score_heads_for_every_padding(tokens, padding):
    checks.score_heads(tokens, padding=padding)


@some_tokens_and_dtypes
def test_score_heads_for_every_batch_size(tokens, dtype):
    checks.score_heads(tokens, dtype)


# MLP


@some_tokens_and_dtypes
def test_sparse_mlp_for_every_batch_size(tokens, dtype):
    """Each row its own neurons, a row of padding in three, fc2 rows counted over all token blocks."""
    checks.sparse_mlp(tokens, dtype=dtype)


@densities_and_paddings
def test_sparse_mlp_for_every_density_and_padding(tokens, density, padding):
    checks.sparse_mlp(tokens, density=density, padding=padding)


@pytest.mark.parametrize("row_exact", [True, False], ids=["row-exact", "union"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("tokens", [1, 6], ids=["one-token", "few-tokens"])
def test_sparse_mlp_with_every_option(tokens, row_exact, with_bias, counted):
    checks.sparse_mlp(tokens, row_exact=row_exact, with_bias=with_bias, counted=counted)


@every_dtype
@pytest.mark.parametrize(
    ("hidden", "ffn"), [(1, 1), (37, 129), (64, 128), (190, 400)], ids=["all-one", "odd", "tiled", "large"]
)
def test_sparse_mlp_for_every_size(hidden, ffn, dtype):
    for tokens in (1, 5):
        checks.sparse_mlp(tokens, hidden=hidden, ffn=ffn, dtype=dtype, density=0.6)


@pytest.mark.parametrize("sms", [1, 40], ids=["small-chip", "large-chip"])
@pytest.mark.parametrize("tokens", [1, 5, 70], ids=lambda n: f"{n}-tokens")
def test_sparse_mlp_divides_its_neurons_over_any_grid(tokens, sms):
    """One program takes several blocks of neurons; or there are more programs than neurons."""
    with multiprocessors(sms):
        checks.sparse_mlp(tokens, hidden=20, density=0.05 if sms == 40 else 0.9)


def test_sparse_mlp_of_one_neuron_in_every_segment():
    checks.sparse_mlp_of_single_neurons()


@FUZZ
@given(
    tokens=st.sampled_from([1, 2, 3, 7, 16, 20, 40, 66]),
    hidden=st.integers(8, 130),
    ffn=st.integers(8, 400),
    rank=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0.01, 0.99),
    padding=st.sampled_from(["none", "some", "all"]),
    with_bias=st.booleans(),
    row_exact=st.booleans(),
    sms=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_mlp_for_any_shape_selection_and_padding(
    tokens, hidden, ffn, rank, dtype, density, padding, with_bias, row_exact, sms, seed
):
    """Selection and MLP, on chips of any size."""
    with multiprocessors(sms):
        checks.select_neurons(
            tokens,
            hidden,
            rank,
            ffn,
            dtype,
            density=density,
            padding=padding,
            with_row_mask=row_exact,
            seed=seed,
        )
        checks.sparse_mlp(tokens, hidden, ffn, dtype, density, padding, with_bias, row_exact, seed=seed)


# Projections


@some_tokens_and_dtypes
def test_sparse_qkv_for_every_batch_size(tokens, dtype):
    checks.sparse_qkv(tokens, dtype=dtype, kv_heads=2)


@densities_and_paddings
def test_sparse_qkv_for_every_density_and_padding(tokens, density, padding):
    checks.sparse_qkv(tokens, density=density, padding=padding)


@pytest.mark.parametrize("head_size", [8, 32, 80], ids=lambda n: f"head-size-{n}")
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)], ids=["one-kv-head-each", "grouped", "one-kv-head"]
)
def test_sparse_qkv_for_every_head_shape(heads, kv_heads, head_size):
    for tokens in (1, 5):
        checks.sparse_qkv(tokens, heads, kv_heads, head_size)


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_sparse_qkv_with_every_option(with_bias, counted):
    for tokens in (1, 5):
        checks.sparse_qkv(tokens, 4, 2, with_bias=with_bias, counted=counted)


@some_tokens_and_dtypes
def test_sparse_out_proj_for_every_batch_size(tokens, dtype):
    checks.sparse_out_proj(tokens, dtype=dtype)


@densities_and_paddings
def test_sparse_out_proj_for_every_density_and_padding(tokens, density, padding):
    checks.sparse_out_proj(tokens, density=density, padding=padding, given_output=False)


@pytest.mark.parametrize(
    ("heads", "head_size", "hidden"),
    [(1, 8, 1), (5, 20, 37), (2, 80, 64), (8, 16, 190)],
    ids=["one-head", "odd", "wide-heads", "large"],
)
def test_sparse_out_proj_for_every_size(heads, head_size, hidden):
    for tokens in (1, 5):
        checks.sparse_out_proj(tokens, heads, head_size, hidden)
