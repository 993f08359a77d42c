"""How the weights of gated blocks lie in memory, so that kernels can gather rows of them: 16 bits, one
copy.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from vllm_dejavu.compat import keep_plain_weight
from vllm_dejavu.kernels.interface import Kernels, Rows


class TransposedRowParallelLinear(nn.Module):
    """fc2 stored as [ffn / tp, hidden], so that a neuron's weights are contiguous. Never a second copy.

    Holds `weight` and `bias` [hidden]; the bias is added once, after the all-reduce.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool):
        super().__init__()
        self.size = input_size // get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.empty(self.size, output_size), requires_grad=False)
        self.weight.weight_loader = self.load_weight
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None

    def load_weight(self, param: nn.Parameter, loaded: torch.Tensor) -> None:
        """Checkpoint layout [hidden, ffn] -> this rank's rows, transposed."""
        start = get_tensor_model_parallel_rank() * self.size
        param.data.copy_(loaded.narrow(1, start, self.size).t())


def keep_gathered(kernels: Kernels, *linears: nn.Module) -> None:
    """Keep the weights of linears as they are loaded, in memory that is good to gather from; before
    loading.
    """
    for linear in linears:
        if not isinstance(linear, TransposedRowParallelLinear):
            keep_plain_weight(linear)
        kernels.prepare_weight(linear.weight)


def rows_of(linear: nn.Module, *, bias: bool = True) -> Rows:
    """A linear's weight as kernels take it; without the bias where that is added after the sum over ranks."""
    # Plain tensors: an op that is given one of vLLM's parameters asks its Python class first.
    return Rows(linear.weight.data, linear.bias.data if bias and linear.bias is not None else None)
