"""Everything that differs between the vLLM versions we support (>= 0.26, < 0.34), and nothing else."""
from __future__ import annotations

from torch import nn

try:  # whichever vLLM's own OPT takes; same parameters, same result
    from vllm.model_executor.models.opt import LayerNorm
except ImportError:  # before 0.32, where layers.layernorm has another class of that name
    LayerNorm = nn.LayerNorm

from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

__all__ = [
    "Attention",
    "LayerNameType",
    "LayerNorm",
    "direct_register_custom_op",
    "eager_break_during_capture",
    "encode_layer_name",
    "get_attention_context",
    "keep_plain_weight",
    "resolve_layer_name",
]

encode_layer_name = _encode_layer_name
resolve_layer_name = _resolve_layer_name


def keep_plain_weight(linear: nn.Module) -> nn.Module:
    """Tell vLLM's CPU linears not to repack `weight` and drop it: our ops gather rows of it, and run it dense too."""
    linear._cpu_skip_gemm_dispatch = True
    return linear
