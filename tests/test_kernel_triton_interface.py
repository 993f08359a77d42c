"""The Triton kernels' scratch memory, their interface beside the native one's, and what they refuse."""

import contextlib
import inspect
from unittest.mock import MagicMock, patch

import pytest
import torch
from kernel_checks import (
    as_half,
    as_int64,
    column_major,
    every_dtype,
    narrower,
    one_less,
    same_bits,
    wider_strides,
)
from kernel_flat import flat_reference as reference
from kernel_inputs import NAN
from triton_checks import DEVICE, TOKENS, checks, multiprocessors, rand, triton_kernels

from vllm_dejavu.kernels import cpu, gpu, predict, primitives, sparse_attention, sparse_mlp
from vllm_dejavu.kernels.interface import COUNTERS, Kernels
from vllm_dejavu.kernels.workspace import Workspace

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
    ("sparse_mlp", "activation", lambda _: "gelu", r"activation out of \['relu', 'relu2'\], got gelu"),
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
