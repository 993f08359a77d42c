"""The Triton kernels against the references; on a GPU if there is one, else under Triton's interpreter.

Everything a kernel must not read holds NaN: unselected weights, other heads' KV, KV behind a sequence's end,
blocks of nobody, inputs of rows that only pad the batch. Selections and counts are compared exactly; biases
keep scores off 0.
"""

import contextlib
import inspect
from unittest.mock import MagicMock, patch

import pytest
import torch
from fuzz import fuzz
from hypothesis import Phase, given
from hypothesis import strategies as st
from kernel_checks import (
    PADDINGS,
    Checks,
    as_half,
    as_int64,
    column_major,
    every_density,
    every_dtype,
    every_padding,
    narrower,
    one_less,
    same_bits,
    wider_strides,
)
from kernel_flat import Flat
from kernel_flat import flat_reference as reference
from kernel_inputs import DENSITIES, NAN, paged_cache, scores_of
from kernel_inputs import rand as cpu_rand
from kernel_inputs import rand_mask as cpu_rand_mask
from tolerances import DTYPE_IDS, DTYPES, assert_close

from vllm_dejavu.kernels import cpu, gpu, predict, primitives, sparse_attention, sparse_mlp, tables
from vllm_dejavu.kernels.interface import COUNTERS, Kernels
from vllm_dejavu.kernels.workspace import Workspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# No shrinking: it takes minutes under the interpreter, and the sizes are small already.
FUZZ = fuzz(40, phases=[Phase.explicit, Phase.generate])
# One token has kernels of its own; then each tile from both sides, and more tokens than the largest tile
# takes.
TOKENS = [1, 2, 5, 16, 17, 33, 64, 70]
# All of them in fp32; the other types, which differ in the tiles' contents alone, with each kind of kernel.
SOME = [(tokens, dtype) for dtype in DTYPES for tokens in (TOKENS if dtype == torch.float32 else (1, 5, 70))]
some_tokens_and_dtypes = pytest.mark.parametrize(
    ("tokens", "dtype"), SOME, ids=[f"{n}-tokens-{DTYPE_IDS[DTYPES.index(dtype)]}" for n, dtype in SOME]
)

triton_kernels = Flat(gpu.KERNELS)
checks = Checks(triton_kernels, DEVICE)
rand = checks.rand


def multiprocessors(number):
    """Grids as on a chip of this size; None: as they are."""
    return (
        contextlib.nullcontext() if number is None else patch.object(tables, "num_sms", lambda device: number)
    )


# Every density meets every padding with few tokens; one token and two blocks of tokens meet each of them
# once.
densities_and_paddings = pytest.mark.parametrize(
    ("tokens", "density", "padding"),
    [(4, density, padding) for density in DENSITIES for padding in PADDINGS]
    + [
        (tokens, density, padding)
        for tokens in (1, 70)
        for density, padding in zip(DENSITIES, PADDINGS, strict=True)
    ],
    ids=lambda value: (
        {4: "few-tokens", 1: "one-token", 70: "two-token-blocks"}.get(value) if type(value) is int else None
    ),
)


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


# Scratch memory


KERNELS = ["score_heads", "select_neurons", "sparse_mlp", "sparse_qkv", "sparse_out_proj", "paged_attention"]


def run(name, tokens, workspace):
    out = getattr(triton_kernels, name)(**checks.arguments(name, tokens), workspace=workspace)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", KERNELS)
def test_the_workspace_changes_no_bit(name):
    """None, the model's (full of NaN, used twice) and one that is too small give the same; semaphores are 0
    again.
    """
    model = Workspace.for_model(DEVICE, torch.float32, 6, ffn=300, head_size=16)
    small = Workspace(DEVICE, dict.fromkeys(model._buffers, 5), torch.float32)
    with multiprocessors(12):  # enough that all are cut in pieces
        for tokens in (2, 6):
            expected = run(name, tokens, None)
            for workspace in (model, small):
                for buffer in workspace._buffers.values():
                    buffer.fill_(NAN)
                for _ in range(2):
                    assert same_bits(run(name, tokens, workspace), expected)
                    assert not any(s.any() for s in workspace._semaphores.values())


@every_dtype
@pytest.mark.parametrize("sms", [1, 3, 24, 132], ids=lambda n: f"{n}-sms")
def test_the_models_workspace_holds_every_request(sms, dtype):
    """No decode step asks for more than `Workspace.for_model` reserved, so memory is what vLLM's profile saw.
    Nothing is run.
    """
    workspace, taken = None, []

    def take(name, *shape, **options):
        taken.append((name, shape, Workspace.take(workspace, name, *shape, **options)))
        return taken[-1][2]

    kernels = [
        (predict, "_down_kernel"),
        (predict, "_up_select_kernel"),
        (sparse_mlp, "_fc1_kernel"),
        (sparse_mlp, "_fc2_kernel"),
        (sparse_attention, "_attention_kernel"),
    ]
    with multiprocessors(sms), contextlib.ExitStack() as stack:
        for module, kernel in kernels:
            stack.enter_context(patch.object(module, kernel, MagicMock()))
        workspace = Workspace.for_model(DEVICE, dtype, 70, ffn=300, head_size=16)
        own = {buffer.data_ptr() for buffer in workspace._buffers.values()}
        for tokens in TOKENS:
            for name in ("score_heads", "select_neurons", "sparse_mlp", "paged_attention"):
                arguments = checks.arguments(name, tokens, dtype)
                getattr(triton_kernels, name)(**arguments, workspace=MagicMock(take=take))
    assert not [(name, shape) for name, shape, tensor in taken if tensor.data_ptr() not in own]
    if sms == 24:
        assert {name for name, *_ in taken} == {
            "down",
            "down_partials",
            "heads_partials",
            "activations",
            "fc2_partials",
            "attention",
        }


def test_a_larger_workspace_request_gets_memory_of_its_own():
    workspace = Workspace(DEVICE, {"down": 6})
    assert workspace.take("down", 2, 3).data_ptr() == workspace.take("down", 5).data_ptr()
    assert workspace.take("down", 7).data_ptr() != workspace.take("down", 6).data_ptr()
    assert not workspace.semaphores("fc2", workspace.SEMAPHORES + 1).any()
    assert workspace.take("down", 2, dtype=torch.float16).dtype == torch.float16


# The interface


PARTS = [name for name in Kernels.__annotations__ if name.islower() and name not in vars(Kernels)]


@pytest.mark.parametrize("kernels", [gpu.KERNELS, cpu.KERNELS], ids=["triton", "native"])
def test_every_implementation_is_called_alike(kernels):
    """Each part that `Kernels` declares, with the reference's parameters in the reference's order."""
    parts = [name for name in PARTS if name != "name"]
    assert {"score_heads", "select_neurons", "sparse_mlp", "sparse_qkv", "paged_attention"} <= set(parts)
    for name in parts:
        ours, truth = getattr(kernels, name), getattr(reference.kernels, name)
        assert inspect.signature(ours) == inspect.signature(truth), name


def test_counters_have_the_same_places():
    places = [getattr(primitives, name.upper()).value for name in COUNTERS]
    assert places == list(range(len(COUNTERS)))


REFUSED = [
    ("score_heads", "x", column_major, "x contiguous"),
    ("score_heads", "x", narrower, "weight of shape"),
    ("score_heads", "weight", wider_strides, "weight contiguous"),
    ("score_heads", "bias", one_less, "bias of shape"),
    ("score_heads", "bias", as_half, "bias of dtype torch.float32, got torch.float16"),
    ("score_heads", "row_lens", one_less, "row_lens of shape"),
    ("score_heads", "row_lens", as_int64, "row_lens of dtype torch.int32, got torch.int64"),
    ("select_neurons", "down", narrower, r"down of shape \[None, 600\], got \[20, 599\]"),
    ("select_neurons", "up", narrower, r"up of shape \[None, 20\], got \[300, 19\]"),
    ("select_neurons", "up", wider_strides, "up contiguous"),
    ("select_neurons", "bias", as_half, "bias of dtype"),
    ("select_neurons", "heads", lambda h: (one_less(h[0]), *h[1:]), "row_lens of shape"),
    ("select_neurons", "heads", lambda h: (as_half(h[0]), *h[1:]), "head input like x"),
    ("select_neurons", "heads", lambda h: (*h[:2], one_less(h[2])), "head bias of shape"),
    ("sparse_mlp", "fc1_weight", as_half, "fc1_weight of dtype torch.float32, got torch.float16"),
    ("sparse_mlp", "fc1_weight", wider_strides, "fc1_weight contiguous"),
    ("sparse_mlp", "fc2_weight_t", one_less, r"fc2_weight_t of shape \[300, 100\], got \[299, 100\]"),
    ("sparse_mlp", "fc2_weight_t", column_major, "fc2_weight_t contiguous"),
    ("sparse_mlp", "neuron_ids", as_int64, "neuron_ids of dtype"),
    ("sparse_mlp", "counts", one_less, r"counts of shape \[3\], got \[2\]"),
    ("sparse_mlp", "row_lens", one_less, "row_lens of shape"),
    ("sparse_mlp", "row_mask", one_less, "row_mask of shape"),
    ("sparse_mlp", "row_mask", wider_strides, "row_mask contiguous"),
    ("sparse_mlp", "activation", lambda _: "gelu", "activation 'relu', got gelu"),
    ("sparse_qkv", "weight", as_half, "weight of dtype"),
    ("sparse_qkv", "weight", one_less, "rows a multiple of 16"),
    ("sparse_qkv", "head_scores", one_less, "head_scores of shape"),
    ("sparse_qkv", "head_scores", wider_strides, "head_scores contiguous"),
    ("sparse_qkv", "row_lens", as_int64, "row_lens of dtype"),
    ("sparse_out_proj", "attn", lambda a: wider_strides(a), "attn with heads side by side"),
    ("sparse_out_proj", "weight", narrower, r"weight of shape \[None, 64\], got \[100, 63\]"),
    ("sparse_out_proj", "head_scores", as_half, "head_scores of dtype"),
    ("sparse_out_proj", "output", lambda _: rand(20, 99), r"output of shape \[20, 100\], got \[20, 99\]"),
    ("paged_attention", "query", column_major, "query contiguous"),
    ("paged_attention", "kv_cache", as_half, "kv_cache of dtype"),
    ("paged_attention", "kv_cache", narrower, r"kv_cache \[..., 32\]"),
    ("paged_attention", "kv_cache", lambda c: torch.cat([c, c[:, :1]], 1), "query heads a multiple of 3"),
    ("paged_attention", "block_table", as_int64, "block_table int32, 20 rows"),
    ("paged_attention", "block_table", one_less, "block_table int32, 20 rows"),
    ("paged_attention", "seq_lens", one_less, "seq_lens int32, contiguous, 20 rows"),
    ("paged_attention", "head_scores", column_major, "head_scores contiguous"),
]


@pytest.mark.parametrize(
    ("name", "argument", "change", "message"), REFUSED, ids=[f"{n}-{a}-{m}" for n, a, _, m in REFUSED]
)
def test_wrong_arguments_are_refused_by_name(name, argument, change, message):
    """A wrong shape, dtype or stride is a ValueError that says what was expected and what came."""
    arguments = checks.arguments(name)
    with pytest.raises(ValueError, match=f"expected .*{message}") as error:
        getattr(triton_kernels, name)(**{**arguments, argument: change(arguments.get(argument))})
    assert ", got " in str(error.value)
