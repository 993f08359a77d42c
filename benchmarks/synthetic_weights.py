"""Random weights of synthetic models: of their real sizes, and tokens stay different from each other.

Of a model with ReLU squared, whose MLP has no biases, fc1 is what its predictor is of low rank: what a token
selects comes out positive, and so do half of all neurons.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from vllm_dejavu import artifact
from vllm_dejavu.families import geometry_of

NORMAL = NormalDist()
# Standard deviation of the residual stream: embeddings have it, and blocks add little to it (WRITE of it
# each), so that a token stays itself through all layers instead of drowning in what every token is given.
RESIDUAL_STD = 4.0
WRITE = 0.05
POSITION_STD = 0.1 * RESIDUAL_STD  # tokens at one position must not look alike
ALWAYS_POSITIVE = 5.0  # fc1's bias, in standard deviations of its output: one neuron in 3e6 comes out <= 0
# random numbers drawn on a CPU; primes, so that no two rows of a matrix get the same ones
TILES = (
    65_537,
    16_777_259,
)


class _Normals:
    """Fills tensors with N(0, std^2); on a CPU out of one block of random numbers, laid in from a random
    place for each tensor.

    Drawing them all would take every engine its time: 1.3e9 in bf16 take 9 s on 2 cores, 1.6 s from the
    block.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}
        self.tiles: dict[torch.dtype, torch.Tensor] = {}

    def generator(self, device: torch.device) -> torch.Generator:
        return self.generators.setdefault(device, torch.Generator(device).manual_seed(self.seed))

    def fill(self, p: torch.Tensor, std: float) -> None:
        generator = self.generator(p.device)
        if p.device.type != "cpu" or not p.is_contiguous():
            p.normal_(std=std, generator=generator)
            return
        if p.dtype not in self.tiles:  # the embeddings come first: the largest
            self.tiles[p.dtype] = torch.randn(TILES[p.numel() > TILES[0]], generator=generator).to(p.dtype)
        tile, flat, done = self.tiles[p.dtype], p.detach().view(-1), 0
        start = int(torch.randint(tile.numel(), (), generator=generator))
        while done < flat.numel():
            count = min(tile.numel() - start, flat.numel() - done)
            torch.mul(tile[start : start + count], std, out=flat[done : done + count])
            done, start = done + count, 0


def rates_of(directory: str | Path) -> list[torch.Tensor]:
    """How often the neurons of each layer are selected, by an artifact's gates; a dense one's: always."""
    loaded = artifact.load(Path(directory))
    ffn = loaded.manifest.model.ffn_dim
    gates = [loaded.gate(i, "mlp") for i in range(loaded.manifest.model.num_layers)]
    return [tensors["activation_rate"] if spec.sparse else torch.ones(ffn) for spec, tensors in gates]


def fc1_of(directory: str | Path) -> list[torch.Tensor | None]:
    """[ffn, hidden] of each layer, what its gate's predictor is of low rank; None: its gate is dense."""
    loaded = artifact.load(Path(directory))
    gates = [loaded.gate(i, "mlp") for i in range(loaded.manifest.model.num_layers)]
    # Scales of integers are left out: a positive factor.
    return [t["up"].float() @ t["down"].float() if spec.sparse else None for spec, t in gates]


@torch.inference_mode()
def init_weights(
    model: torch.nn.Module,
    *,
    survive: float = 1.0,
    rates: Sequence[torch.Tensor] | None = None,
    fc1: Sequence[torch.Tensor | None] | None = None,
    seed: int = 0,
) -> None:
    """Random weights, on the model's device: addresses stay, so captured graphs hold.

    For vLLM's own OPT and Nemotron and ours, which name parameters alike (ours stores fc2 transposed, and
    calls Nemotron's up_proj and down_proj fc1 and fc2), and Transformers'.

    vLLM's CPU linears pack their weight as soon as it is loaded and drop the original: a parameter of no
    elements, skipped here. On a CPU this must therefore run while the model is being loaded
    (`engine_drive.build_llm`), or packed layers would keep what they had. Values do not change the speed of a
    CPU's dense layers as long as none is denormal, and none of these is.

    Args:
        survive: share of neurons that fc1 brings out positive for a token. A batch reads what survives for
            any of its rows, which is more; the engine counts it.
        rates: instead, how often each neuron is positive, [ffn] for each layer (`rates_of`).
        fc1: its weights in each layer (`fc1_of`), for models without biases, where neither of the two holds.
    """
    bias = ALWAYS_POSITIVE if survive >= 1 else NORMAL.inv_cdf(survive)
    normals, params = _Normals(seed), dict(model.named_parameters())
    for name, p in params.items():
        if p.numel() == 0:  # taken over by a backend's packed copy
            continue
        if name.endswith("decoder.final_layer_norm.weight"):
            # random signs: with tied embeddings the last token would otherwise be every next token
            p.fill_(1).mul_(
                torch.randint(0, 2, p.shape, generator=normals.generator(p.device), device=p.device) * 2 - 1
            )
        elif "layer_norm.weight" in name:
            p.fill_(1)
        elif "layernorm.weight" in name or name.endswith("model.norm.weight"):
            p.zero_()  # of LayerNorm1P, which adds 1
        elif fc1 is not None and (found := FC1.search(name)) and fc1[layer_of(name)] is not None:
            if found[2] is None:
                _fill_fc1(p, params.get(f"{name}_scale"), fc1[layer_of(name)])
        elif name.endswith("fc1.bias"):
            if rates is None:
                p.fill_(bias)
            else:  # of all ranks: tensor parallelism is not asked for here; of a rate of 1, finite
                rate = rates[layer_of(name)].double()
                p.copy_(torch.special.ndtri(rate.clamp(max=NORMAL.cdf(ALWAYS_POSITIVE))))
        elif name.endswith(".bias"):
            p.zero_()
        elif "embed_positions" in name:
            normals.fill(p, POSITION_STD)
        elif name.endswith((".q_scale", ".k_scale", ".v_scale", ".prob_scale")):
            continue  # of an fp8 cache: as they are where a checkpoint has none
        elif name.endswith("weight_scale"):
            p.fill_(
                _std(name, model.config, bias)
                / INTEGER_STDS[f"{name.removesuffix('_scale')}_packed" in params]
            )
        elif not p.is_floating_point():
            if not name.endswith("weight_shape"):
                whole = torch.iinfo(p.dtype)
                low = -127 if p.dtype == torch.int8 else whole.min
                p.random_(low, whole.max + 1, generator=normals.generator(p.device))
        else:
            normals.fill(p, _std(name, model.config, bias))


def layer_of(name: str) -> int:
    """Of a parameter."""
    return int(name.split(".layers.")[1].split(".")[0])


FC1 = re.compile(r"\.(fc1|up_proj)\.weight(_scale)?$")


def _fill_fc1(weight: torch.Tensor, scale: torch.Tensor | None, values: torch.Tensor) -> None:
    """Rows of length 1; as int8 integers with a scale for each."""
    values = values / values.norm(dim=1, keepdim=True)
    if scale is None:
        weight.copy_(values)
        return
    steps = values.abs().amax(dim=1, keepdim=True) / 127
    weight.copy_((values / steps).round())
    scale.copy_(steps.view_as(scale))


# Of int8 and of nibbles, evenly drawn.
INTEGER_STDS = {False: 127 / math.sqrt(3), True: 16 / math.sqrt(12)}


def _std(name: str, config: Any, bias: float) -> float:
    """Of a weight's values, by what it reads and adds to."""
    if "embed_tokens" in name or "lm_head" in name:
        return RESIDUAL_STD
    ffn = geometry_of(config).ffn_dim
    if "fc2" in name:
        return WRITE * RESIDUAL_STD / (max(1.0, bias) * math.sqrt(ffn))
    if "down_proj" in name:  # a normal's square has a mean square of 3
        return WRITE * RESIDUAL_STD / math.sqrt(3 / 2 * ffn)
    if "out_proj" in name or "o_proj" in name:
        return WRITE * RESIDUAL_STD / math.sqrt(config.hidden_size)
    return config.hidden_size**-0.5  # qkv_proj, fc1
