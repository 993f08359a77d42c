"""How weights lie in memory, so that kernels can gather rows of them: in 16 or in 8 bits, one copy of each.

In 8 bits a weight [outputs, inputs] is int8 with one fp32 scale for each output. It is rounded whole, before
tensor parallelism cuts it, while a 16-bit checkpoint loads (`quantization.int8_rows`), so that its integers
depend neither on the number of ranks nor on how they are loaded.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import LinearMethodBase, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from vllm_dejavu import ops
from vllm_dejavu.blocks import Site
from vllm_dejavu.compat import keep_plain_weight
from vllm_dejavu.kernels.interface import Kernels, Rows, implementation
from vllm_dejavu.quantization import Stored, stored_as


class Int8Config(QuantizationConfig):
    """Gives vLLM's layers, which are asked to be in 8 bits by it, their weights and products."""

    def get_name(self) -> str:
        return "dejavu_int8"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int8Config:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Int8Method:
        return Int8Method()


class Int8Method(LinearMethodBase):
    """Of linears, embeddings and LM heads: `weight` [outputs, inputs], int8, and `weight_scale` [outputs].

    vLLM's own loaders cut both by their `output_dim`.
    """

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        outputs = sum(output_partition_sizes)
        weight = nn.Parameter(
            torch.empty(outputs, input_size_per_partition, dtype=torch.int8), requires_grad=False
        )
        scale = nn.Parameter(torch.empty(outputs, dtype=torch.float32), requires_grad=False)
        implementation(weight.device.type).prepare_weight(weight)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        set_weight_attrs(scale, {"output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", scale)
        layer.embedding_dtype = params_dtype

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.int8_linear(x, layer.weight, layer.weight_scale, bias, False)

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return (layer.weight[ids] * layer.weight_scale[ids, None]).to(layer.embedding_dtype)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        layer.weight, layer.weight_scale = embed_tokens.weight, embed_tokens.weight_scale
        return layer


class TransposedRowParallelLinear(nn.Module):
    """fc2 or out_proj stored as [inputs / tp, outputs], so that a neuron's, or a head's, weights are
    contiguous.

    Holds `weight`, in 8 bits `weight_scale` [outputs], and `bias` [outputs], which is added once, after the
    all-reduce.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool, bits: int = 16):
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.size = input_size // self.ranks
        dtype = torch.int8 if bits == 8 else None
        self.weight = nn.Parameter(torch.empty(self.size, output_size, dtype=dtype), requires_grad=False)
        self.weight.weight_loader = self.load_weight
        self.weight_scale = None
        if bits == 8:
            scale = torch.empty(output_size, dtype=torch.float32)
            self.weight_scale = nn.Parameter(scale, requires_grad=False)
            self.weight_scale.weight_loader = self.load_scale
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None

    def load_weight(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        """Checkpoint layout [outputs, inputs] -> this rank's rows, transposed."""
        start = get_tensor_model_parallel_rank() * self.size
        param.data.copy_(loaded.narrow(1, start, self.size).t())

    def load_scale(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        """[outputs], or, as compressed-tensors stores it, [outputs, 1]; of any float type."""
        param.data.copy_(loaded.flatten())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As vLLM's: [T, inputs / tp] -> [T, outputs], of all ranks. In 8 bits only: a layer without a gate
        is vLLM's own in 16.
        """
        out = ops.int8_linear(x, self.weight, self.weight_scale, None, True)
        if self.ranks > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out if self.bias is None else out + self.bias, None


def linear_config(site: Site, name: str) -> QuantizationConfig | None:
    """What a linear that is not gated takes as its `quant_config`: ours, or that of the checkpoint, but for
    int8 weights alone, which stock vLLM does not serve on a CPU.
    """
    quant_config = site.vllm_config.quant_config
    if site.settings.stored_bits == 8:
        return Int8Config()
    with contextlib.suppress(ValueError):  # what we cannot read is stock vLLM's affair here
        if stored_as(quant_config, f"{site.prefix}.{name}") == Stored(8, inputs=False):
            return Int8Config()
    return quant_config


def gated_bits(site: Site, *names: str) -> int:
    """Of a gated block's linears in memory: as the settings have it, or as a quantized checkpoint stores
    them.

    Raises:
        ValueError: rows of them cannot be read, or not by one kernel.
    """
    quant_config, most = site.vllm_config.quant_config, site.settings.stored_bits
    bits = {name: min(most, stored_as(quant_config, f"{site.prefix}.{name}").bits) for name in names}
    if len(set(bits.values())) > 1:
        raise ValueError(
            f"model_impl='dejavu' reads {' and '.join(names)} of {site.prefix} by one kernel, the checkpoint"
            f" stores them in {bits} bits. Quantize both or neither, or leave the block out of the setting"
            " 'blocks'."
        )
    return bits[names[0]]


def config_of(bits: int) -> QuantizationConfig | None:
    """What vLLM's layers take as their `quant_config`."""
    return Int8Config() if bits == 8 else None


def row_parallel(
    input_size: int, output_size: int, bias: bool, quant_config: QuantizationConfig | None, prefix: str
) -> RowParallelLinear | TransposedRowParallelLinear:
    """A linear that is cut by its inputs."""
    if isinstance(quant_config, Int8Config):
        return TransposedRowParallelLinear(input_size, output_size, bias, 8)
    return RowParallelLinear(input_size, output_size, bias=bias, quant_config=quant_config, prefix=prefix)


def keep_gathered(kernels: Kernels, *linears: nn.Module) -> None:
    """Keep the weights of linears as they are loaded, in memory that is good to gather from; before
    loading.
    """
    for linear in linears:
        if linear.weight.dtype != torch.int8 and not isinstance(linear, TransposedRowParallelLinear):
            keep_plain_weight(linear)
        kernels.prepare_weight(linear.weight)


def rows_of(linear: nn.Module, *, bias: bool = True) -> Rows:
    """A linear's weight as kernels take it; without the bias where that is added after the sum over ranks."""
    # Plain tensors: an op that is given one of vLLM's parameters asks its Python class first.
    added = linear.bias.data if bias and linear.bias is not None else None
    scale = getattr(linear, "weight_scale", None)
    transposed = isinstance(linear, TransposedRowParallelLinear)
    return Rows(linear.weight.data, added, None if scale is None else scale.data, transposed)


@torch.no_grad()
def fill_dummies(model: nn.Module) -> None:
    """Random integers, and scales that leave weights as small as vLLM's own dummy ones: those are floats
    only.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    for module in model.modules():
        ours = isinstance(module, TransposedRowParallelLinear) or isinstance(
            getattr(module, "quant_method", None), Int8Method
        )
        if ours and module.weight_scale is not None:
            integers = torch.randint(
                -127, 128, module.weight.shape, dtype=torch.int8, generator=generator, device="cpu"
            )
            module.weight.copy_(integers)
            module.weight_scale.fill_(1e-3 / 127)
