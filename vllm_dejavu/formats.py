"""How weights lie in memory, so that kernels can gather rows of them: in 16, 8 or 4 bits, one copy of each.

- In 8 bits a weight [outputs, inputs] is int8 with one fp32 scale for each output.
- In 4 bits it is uint8 (`kernels.packing`), with a scale for each 128 columns of what is read together: of an
  output's inputs or, transposed, of an input's outputs. As compressed-tensors stores it inputs share scales,
  and a transposed weight has them for groups of rows.

Weights are rounded whole, before tensor parallelism cuts them, while a 16-bit checkpoint loads
(`quantization.rounding`), so that their integers depend neither on the number of ranks nor on how they are
loaded.
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
from vllm_dejavu.kernels.packing import WEIGHT_GROUP
from vllm_dejavu.quantization import Integers, Stored, stored_as


class IntegersConfig(QuantizationConfig):
    """Gives vLLM's layers, which are asked to be in 8 or 4 bits by it, their weights and products."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def get_name(self) -> str:
        return f"dejavu_int{self.bits}"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> IntegersConfig:
        return cls(config["bits"])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> IntegersMethod:
        return IntegersMethod(self.bits)


def empty_weight(bits: int, rows: int, columns: int) -> torch.Tensor:
    """Memory of a weight, of the default dtype in 16 bits."""
    if bits == 4:
        return torch.empty(rows, columns // 2, dtype=torch.uint8)
    return torch.empty(rows, columns, dtype=torch.int8 if bits == 8 else None)


class IntegersMethod(LinearMethodBase):
    """Of linears, and in 8 bits of embeddings and LM heads: `weight` and `weight_scale` as `Rows` has them.

    vLLM's own loaders cut both by their `output_dim`.
    """

    def __init__(self, bits: int):
        self.bits = bits

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
        outputs, inputs = sum(output_partition_sizes), input_size_per_partition
        weight = nn.Parameter(empty_weight(self.bits, outputs, inputs), requires_grad=False)
        scale = torch.empty(outputs, dtype=torch.float32)
        if self.bits == 4:
            if inputs % WEIGHT_GROUP:
                raise ValueError(
                    f"weights of 4 bits need a multiple of {WEIGHT_GROUP} inputs, of which so many share a"
                    f" scale; a linear has {inputs}. Serve the model without --model-impl dejavu."
                )
            scale = torch.empty(outputs, inputs // WEIGHT_GROUP, dtype=params_dtype)
        scale = nn.Parameter(scale, requires_grad=False)
        implementation(weight.device.type).prepare_weight(weight)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        set_weight_attrs(weight, {"integers": Integers(self.bits)})
        set_weight_attrs(scale, {"output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)
        layer.register_parameter("weight_scale", scale)
        layer.embedding_dtype = params_dtype

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.integer_linear(x, layer.weight, layer.weight_scale, bias, None, False)

    def embedding(self, layer: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return (layer.weight[ids] * layer.weight_scale[ids, None]).to(layer.embedding_dtype)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        layer.weight, layer.weight_scale = embed_tokens.weight, embed_tokens.weight_scale
        return layer


class TransposedRowParallelLinear(nn.Module):
    """fc2 or out_proj stored as [inputs / tp, outputs], so that a neuron's, or a head's, weights are
    contiguous.

    Holds `weight`, of integers `weight_scale`, of those that we round to 4 bits `output_scale`, as `Rows` has
    them, and `bias` [outputs], which is added once, after the all-reduce.

    Args:
        stored: in how many bits, and in 4 which of them share a scale.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool, stored: Stored):
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.size, self.stored = input_size // self.ranks, stored
        weight = empty_weight(stored.bits, self.size, output_size)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight.weight_loader = self.load_weight
        self.weight_scale = self.output_scale = None
        if stored.bits < 16:
            self.weight.integers = Integers(stored.bits, transposed=True)
            if stored.bits == 8:
                scale = torch.empty(output_size, dtype=torch.float32)
            elif stored.group is None:
                scale = torch.empty(self.size, output_size // WEIGHT_GROUP)
                each = torch.empty(output_size, dtype=torch.float32)
                self.output_scale = nn.Parameter(each, requires_grad=False)
            else:
                scale = torch.empty(self.groups, output_size)
            self.weight_scale = nn.Parameter(scale, requires_grad=False)
            self.weight_scale.weight_loader = self.load_scale
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None

    @property
    def groups(self) -> int:
        """Of this rank's rows that share scales."""
        if self.stored.group == 0:
            return 1
        if self.size % self.stored.group:
            raise ValueError(
                f"the checkpoint has a scale for each {self.stored.group} inputs of fc2 and out_proj, a rank"
                f" {self.size} of these: use a tensor_parallel_size that cuts between groups."
            )
        return self.size // self.stored.group

    def load_weight(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        """Checkpoint layout [outputs, inputs] -> this rank's rows, transposed; in 4 bits they are already."""
        rows = loaded if self.stored.bits == 4 else loaded.t()
        param.data.copy_(rows.narrow(0, get_tensor_model_parallel_rank() * self.size, self.size))

    def load_scale(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        """[outputs], or, as compressed-tensors stores it, [outputs, 1]; in 4 bits of all ranks' rows, or of
        their groups. Of any float type.
        """
        if self.stored.bits == 8:
            param.data.copy_(loaded.flatten())
            return
        mine = len(param)
        start = 0 if len(loaded) == mine else get_tensor_model_parallel_rank() * mine
        param.data.copy_(loaded.narrow(0, start, mine))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As vLLM's: [T, inputs / tp] -> [T, outputs], of all ranks. Of integers only: a layer without a gate
        is vLLM's own in 16 bits.
        """
        each = None if self.output_scale is None else self.output_scale.data
        out = ops.integer_linear(x, self.weight, self.weight_scale, None, each, True)
        if self.ranks > 1:
            out = tensor_model_parallel_all_reduce(out)
        return out if self.bias is None else out + self.bias, None


def linear_config(site: Site, name: str) -> QuantizationConfig | None:
    """What a linear that is not gated takes as its `quant_config`: ours, or that of the checkpoint, but for
    int8 weights alone, which stock vLLM does not serve on a CPU.
    """
    quant_config = site.vllm_config.quant_config
    if site.settings.weight_bits < 16:
        return IntegersConfig(site.settings.weight_bits)
    with contextlib.suppress(ValueError):  # what we cannot read is stock vLLM's affair here
        if stored_as(quant_config, f"{site.prefix}.{name}") == Stored(8, inputs=False):
            return IntegersConfig(8)
    return quant_config


def gated_form(site: Site, *names: str) -> Stored:
    """Of a gated block's linears in memory: as the settings have it, or as a quantized checkpoint stores
    them.

    Raises:
        ValueError: rows of them cannot be read, or not by one kernel.
    """
    if site.settings.weight_bits < 16:
        return Stored(site.settings.weight_bits)
    stored = [stored_as(site.vllm_config.quant_config, f"{site.prefix}.{name}") for name in names]
    bits = {name: each.bits for name, each in zip(names, stored, strict=True)}
    if len(set(bits.values())) > 1:
        raise ValueError(
            f"model_impl='dejavu' reads {' and '.join(names)} of {site.prefix} by one kernel, the checkpoint"
            f" stores them in {bits} bits. Quantize both or neither, or leave the block out of the setting"
            " 'blocks'."
        )
    return stored[-1]  # by which rows are skipped


def config_of(bits: int) -> QuantizationConfig | None:
    """What vLLM's layers take as their `quant_config`."""
    return IntegersConfig(bits) if bits < 16 else None


def row_parallel(
    input_size: int,
    output_size: int,
    bias: bool,
    quant_config: QuantizationConfig | None,
    prefix: str,
    form: Stored | None = None,
) -> RowParallelLinear | TransposedRowParallelLinear:
    """A linear that is cut by its inputs; form: of a gated block's, or None."""
    if isinstance(quant_config, IntegersConfig):
        return TransposedRowParallelLinear(input_size, output_size, bias, form or Stored(quant_config.bits))
    return RowParallelLinear(input_size, output_size, bias=bias, quant_config=quant_config, prefix=prefix)


def keep_gathered(kernels: Kernels, *linears: nn.Module) -> None:
    """Keep the weights of linears as they are loaded, in memory that is good to gather from; before
    loading.
    """
    for linear in linears:
        if linear.weight.is_floating_point() and not isinstance(linear, TransposedRowParallelLinear):
            keep_plain_weight(linear)
        kernels.prepare_weight(linear.weight)


def rows_of(linear: nn.Module, *, bias: bool = True) -> Rows:
    """A linear's weight as kernels take it; without the bias where that is added after the sum over ranks."""
    # Plain tensors: an op that is given one of vLLM's parameters asks its Python class first.
    added = linear.bias.data if bias and linear.bias is not None else None
    scale, each = (getattr(linear, name, None) for name in ("weight_scale", "output_scale"))
    scale, each = (None if of is None else of.data for of in (scale, each))
    return Rows(linear.weight.data, added, scale, isinstance(linear, TransposedRowParallelLinear), each)


@torch.no_grad()
def fill_dummies(model: nn.Module) -> None:
    """Random integers, and scales that leave weights as small as vLLM's own dummy ones: those are floats
    only.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    for module in model.modules():
        ours = isinstance(module, TransposedRowParallelLinear) or isinstance(
            getattr(module, "quant_method", None), IntegersMethod
        )
        if ours and module.weight_scale is not None:
            kind = module.weight.dtype
            least, most = (0, 255) if kind == torch.uint8 else (-127, 127)
            integers = torch.randint(
                least, most + 1, module.weight.shape, dtype=kind, generator=generator, device="cpu"
            )
            module.weight.copy_(integers)
            module.weight_scale.fill_(1e-3 / (8 if kind == torch.uint8 else 127))
            if getattr(module, "output_scale", None) is not None:
                module.output_scale.fill_(1)
