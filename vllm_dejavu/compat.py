"""Everything that differs between the vLLM versions we support (>= 0.26, < 0.34), and nothing else."""

from __future__ import annotations

import torch
from torch import nn
from vllm import envs

try:  # whichever vLLM's own OPT takes; same parameters, same result
    from vllm.model_executor.models.opt import LayerNorm
except ImportError:  # before 0.32, where layers.layernorm has another class of that name
    LayerNorm = nn.LayerNorm

from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

__all__ = [
    "CPU_ATTENTION_SETTINGS",
    "Attention",
    "LayerNameType",
    "LayerNorm",
    "cpu_attention_isa",
    "cpu_attention_schedule",
    "cpu_attention_splits",
    "direct_register_custom_op",
    "eager_break_during_capture",
    "encode_layer_name",
    "get_attention_context",
    "keep_plain_weight",
    "key_and_value_cache",
    "resolve_layer_name",
    "rotary_cache",
]

encode_layer_name = _encode_layer_name
resolve_layer_name = _resolve_layer_name


# What the native attention asks of vLLM's implementation on a CPU; where one lacks some, Python attends.
CPU_ATTENTION_SETTINGS = {
    "scale",
    "logits_soft_cap",
    "kv_cache_dtype",
    "sliding_window",
    "alibi_slopes",
    "sinks",
}


def key_and_value_cache(
    cache: torch.Tensor, kv_heads: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A layer's cache on a CPU as vLLM's operators take it, [blocks, kv_heads, block_size, head_size] each;
    None of a version that lays it out otherwise than 0.32's CPUAttentionBackendImpl.forward says.
    """
    if cache.dim() != 4 or cache.shape[1] != kv_heads or cache.shape[3] != 2 * head_size:
        return None
    blocks, _, block_size, _ = cache.shape
    key, value = cache.view(blocks, kv_heads, 2 * block_size, -1).chunk(2, dim=2)
    return key, value


def rotary_cache(rotary: nn.Module | None, dtype: torch.dtype) -> tuple[torch.Tensor | None, bool] | None:
    """What vLLM's operator turns queries and keys by: cosines and sines [positions, rotated], in the queries'
    dtype, and whether it turns halves of a head; (None, False) without a rotary embedding, and None of one
    that does more than call that operator.
    """
    if rotary is None:
        return None, False
    if type(rotary).forward_cpu is not RotaryEmbedding.forward_cpu:
        return None
    return rotary.cos_sin_cache.to(dtype), rotary.is_neox_style


def cpu_attention_splits() -> bool:
    """Whether threads may share a long sequence, as vLLM's metadata builder asks for it."""
    return bool(getattr(envs, "VLLM_CPU_ATTN_SPLIT_KV", True))


def cpu_attention_isa(dtype: torch.dtype, block_size: int, head_size: int) -> str:
    """By which vLLM's operators pack a cache on this CPU."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return _get_attn_isa(dtype, block_size, head_size)


def cpu_attention_schedule(
    rows: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    seq_lens: torch.Tensor,
    dtype: torch.dtype,
    starts: torch.Tensor,
    isa: str,
) -> torch.Tensor:
    """How vLLM's operator shares out a decode step, as its metadata builder has it made."""
    from vllm import _custom_ops

    shape = rows, heads, kv_heads, head_size, seq_lens, dtype, starts
    return _custom_ops.cpu_attn_get_scheduler_metadata(*shape, True, -1, isa, cpu_attention_splits())


class PlainLinearMethod(UnquantizedLinearMethod):
    """vLLM's for unquantized weights, but that they stay as they were loaded."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight, bias)


def keep_plain_weight(linear: nn.Module) -> nn.Module:
    """Keep vLLM's CPU linears from repacking `weight` and dropping it: our ops gather rows of it, and run it
    dense too.

    Some versions have an attribute that asks for that, `_cpu_skip_gemm_dispatch`; 0.26 to 0.28 and 0.30 have
    none.
    """
    if current_platform.is_cpu():
        linear.quant_method = PlainLinearMethod()
    return linear
