"""Weights rounded to 8 or 4 bits, and how checkpoints store them.

Both are symmetric and round to nearest (RTN; neither GPTQ nor AWQ, which look at data and lose less).
Embeddings, biases and norms stay; the LM head may go along in 8 bits (`lm_head_bits`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from vllm_dejavu.families import family_of
from vllm_dejavu.kernels import packing
from vllm_dejavu.kernels.interface import Rows
from vllm_dejavu.kernels.packing import WEIGHT_GROUP

# In 4 bits, how many steps the largest of a group makes: of these, what leaves the smallest error.
STEPS = (7.0, 7.5, 8.0, 8.5, 9.0)
SIGNED_STEPS = (-7.5, -8.0, -8.5, -9.0, 7.0, 7.5, 8.0, 8.5)
CHUNK = 1 << 20  # weights that are rounded at once: in the caches
_LINEAR = re.compile(
    r"(?:model\.)?(?:decoder\.)?layers\.\d+\."
    r"(?:self_attn\.(?:[qkv]|out|o)_proj|mlp\.(?:up|down)_proj|fc1|fc2)\.weight"
)

# Of which an input is a row in memory.
_TRANSPOSED = re.compile(r"\.(?:out_proj|o_proj|fc2|down_proj)\.weight$")


def is_linear(name: str) -> bool:
    """Whether a checkpoint's tensor is one that is quantized."""
    return _LINEAR.fullmatch(name) is not None


def int8_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear's weight [outputs, inputs] as int8, one scale for each output: symmetric, round to nearest.

    Returns:
        Integers of at most 127 in magnitude, [outputs, inputs], int8; scales [outputs], fp32, positive also
        where an output is all zeros.
    """
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale


def int4_rows(weight: torch.Tensor, signed: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] in 4 bits, a scale for each WEIGHT_GROUP columns of a row, no zero point: round to
    nearest.

    Args:
        signed: whether scales may be negative, so that the largest of a group can be any end of what 4 bits
            hold.

    Returns:
        The integers from -8 to 7, packed (`packing`): [rows, columns / 2], uint8; scales, none of them 0,
        [rows, columns / WEIGHT_GROUP], bf16.
    """
    parts = [_int4_rows(part, signed) for part in weight.split(max(1, CHUNK // weight.shape[1]))]
    integers, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return integers, scales


def _int4_rows(weight: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, WEIGHT_GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True)) if signed else groups.abs().amax(2, True)
    tiny = torch.finfo(torch.bfloat16).tiny * 16
    largest = torch.where(largest.abs() < tiny, tiny, largest)
    best: tuple[torch.Tensor, ...] | None = None
    for steps in SIGNED_STEPS if signed else STEPS:
        scale = (largest / steps).bfloat16()
        integers = (groups / scale).round_().clamp_(-8, 7)
        found = (integers * scale).sub_(groups).square_().sum(2, keepdim=True), scale, integers
        if best is None:
            best = found
            continue
        better = found[0] < best[0]
        best = tuple(torch.where(better, *pair) for pair in zip(found, best, strict=True))
    _, scale, integers = best
    return packing.pack(integers.view(rows, columns)), scale.squeeze(2)


class Integers(NamedTuple):
    """How a 16-bit weight becomes integers as it loads.

    Attributes:
        bits: 8 or 4. transposed: whether in memory the columns are the outputs, groups of which share scales
            in 4 bits.
    """

    bits: int
    transposed: bool = False

    def rounded(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[outputs, inputs] -> integers and scales as `Rows` has them, of all ranks; in 8 bits not yet
        transposed. In 4 bits, transposed, a third: each output's, which its weights are divided by first: a
        group is of different outputs, of which one may have weights much larger than another's.
        """
        if self.bits == 8:
            return int8_rows(weight)
        if not self.transposed:
            return int4_rows(weight)
        each = weight.float().abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        # positive scales: neurons' values stay positive when they are multiplied with them
        return *int4_rows((weight / each[:, None]).t(), signed=False), each

    def laid_out(self, integers: torch.Tensor) -> torch.Tensor:
        """A checkpoint's own integers [outputs, inputs], int8, as `rounded` gives them."""
        if self.bits == 8:
            return integers
        return packing.pack(integers.t() if self.transposed else integers)

    def scales_of(self, scale: torch.Tensor, groups: int) -> torch.Tensor:
        """A checkpoint's scales of such integers, [outputs, groups of inputs or 1].

        Args:
            groups: of inputs, that have scales of their own in memory.
        """
        if self.bits == 8:
            return scale.flatten()
        if self.transposed:
            return scale.t()
        return scale.expand(-1, groups)


def quantize_dequantize(name: str, tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of a checkpoint's tensor in so many bits.

    Args:
        name: in the checkpoint; tensors other than `is_linear` names pass through, and with 16 bits all do.
        tensor: [outputs, inputs], whole: before tensor parallelism cuts it.

    Returns:
        float32, integer times scale without further rounding, so that the result does not depend on the
        checkpoint's dtype.

    Raises:
        ValueError: the weight cannot be cut into groups.
    """
    if bits == 16 or not is_linear(name):
        return tensor
    if bits == 8:
        integers, scale = int8_rows(tensor)
        return integers * scale[:, None]
    transposed = _TRANSPOSED.search(name) is not None
    _check_columns(tensor.shape[0 if transposed else 1], name)
    weight, scale, *each = Integers(4, transposed).rounded(tensor)
    return Rows(weight, None, scale, transposed, *each).floats()


@torch.no_grad()
def quantize_model(model: torch.nn.Module, bits: int) -> int:
    """The same for a transformers `OPTForCausalLM`, in place, as masked studies use it; returns how many
    weights were quantized.

    Raises:
        ValueError: weights cannot be cut into groups, or are not in memory.
    """
    count = 0
    for name, parameter in model.named_parameters():
        if bits == 16 or not is_linear(name):
            continue
        if parameter.device.type == "meta":
            raise ValueError(
                f"weight_bits={bits}: {name} is offloaded to disk, so it cannot be changed. Load the model"
                " into memory."
            )
        parameter.copy_(quantize_dequantize(name, parameter, bits))
        count += 1
    return count


def check_model(sizes: Any, bits: int) -> None:
    """Refuse a model whose weights cannot be cut into groups, before any of them is read.

    Args:
        sizes: with `hidden_size`.

    Raises:
        ValueError: naming the size.
    """
    if bits == 4:
        _check_columns(sizes.hidden_size, "hidden_size")


class Stored(NamedTuple):
    """How a checkpoint stores a linear.

    Attributes:
        bits: 16, or 8: int8 with a scale for each output; or 4. inputs: whether stock vLLM rounds its inputs
            too. group: of 4 bits, how many inputs share a scale of an output, 0: all; None: as we round.
    """

    bits: int
    inputs: bool = False
    group: int | None = None


def stored_as(quant_config: Any, name: str) -> Stored:
    """Of a linear.

    Args:
        quant_config: vLLM's, of the checkpoint, or None. name: the linear's, as `quant_config` knows it.

    Raises:
        ValueError: rows of it cannot be read as integers, with the reason.
    """
    if quant_config is None:
        return Stored(16)

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"model_impl='dejavu' reads single rows of {name}, stored as {what}: it takes 16 bits, or"
            " compressed-tensors integers, symmetric: int8 with a scale for each output (W8A8, W8A16), int4"
            f" with one for each output or each {WEIGHT_GROUP} of its inputs (W4A16). Serve the model without"
            " --model-impl dejavu."
        )

    if quant_config.get_name() != "compressed-tensors":
        raise refuse(str(quant_config.get_name()))
    if getattr(quant_config, "transform_config", None):
        raise refuse("integers of rotated weights (transform_config)")
    if getattr(quant_config, "kv_cache_scheme", None):
        raise refuse("part of a checkpoint with scales of the KV cache (kv_cache_scheme)")
    # a linear by its class's name, which is what schemes ask for
    found = quant_config.get_scheme_dict(torch.nn.Linear(1, 1, device="meta"), name)
    scheme = None if found is None else found["weights"]
    if scheme is None:
        return Stored(16)
    kind, strategy = (str(getattr(value, "value", value)) for value in (scheme.type, scheme.strategy))
    known = {8: ("channel",), 4: ("channel", "group")} if kind == "int" and scheme.symmetric else {}
    inputs = found.get("input_activations")
    other_group = strategy == "group" and scheme.group_size != WEIGHT_GROUP
    if strategy not in known.get(scheme.num_bits, ()) or other_group or (scheme.num_bits == 4 and inputs):
        symmetry = "symmetric" if scheme.symmetric else "asymmetric"
        size = f" of {scheme.group_size}" if strategy == "group" else ""
        rounded = ", with rounded inputs" if scheme.num_bits == 4 and inputs else ""
        raise refuse(f"{kind}{scheme.num_bits} by {strategy}{size}, {symmetry}{rounded}")
    if inputs is not None and not inputs.dynamic:
        raise refuse("int8 with fixed scales of its inputs (input_activations not dynamic)")
    if getattr(scheme, "actorder", None):
        raise refuse(f"int{scheme.num_bits} in the order of its activations (actorder)")
    if scheme.num_bits == 8:
        return Stored(8, inputs is not None)
    return Stored(4, group=WEIGHT_GROUP if strategy == "group" else 0)


PACKED = "weight_packed"  # compressed-tensors' name of integers in an int32


def unpacked(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """[outputs, inputs / n], int32, as compressed-tensors packs n = 4 or 8 integers of 8 or 4 bits (from 0
    on, the first input lowest) -> [outputs, inputs], int8.
    """
    packed = tensor.contiguous().view(torch.uint8)
    if bits == 8:
        return (packed ^ 128).view(torch.int8)
    return torch.stack((packed & 15, packed >> 4), 2).view(len(packed), -1).to(torch.int8) - 8


def checkpoint_bits(quant_config: Any) -> int:
    """The fewest of a checkpoint's linears of which we read rows of integers (`stored_as`), or 16."""
    weights = [scheme.get("weights") for scheme in getattr(quant_config, "target_scheme_map", {}).values()]
    return min((w.num_bits for w in weights if w is not None and w.num_bits in (4, 8)), default=16)


def check_checkpoint(quant_config: Any, hf_config: Any, bits: int, exact: bool = False) -> None:
    """Refuse a quantized checkpoint that cannot be served, by its first layer.

    Args:
        bits: asked for (`weight_bits`). exact: whether of each layer only what is behind the activation is
            read by rows.

    Raises:
        ValueError: naming the linear and how it is stored.
    """
    if quant_config is None:
        return
    names = family_of(hf_config.architectures).names
    for name in (names.down,) if exact else (names.down, names.up, *names.qkv, names.out):
        stored_as(quant_config, f"{names.layers}.0.{name}")
    if bits < 16:
        raise ValueError(
            f"weight_bits={bits} rounds 16-bit weights, this checkpoint is quantized already: use"
            " weight_bits=16, which serves them as they are."
        )


def describe(bits: int, head_bits: int) -> str:
    """For the start-up log."""
    rounded = "rounded to nearest while loading"
    parts = {
        8: [part for part, has in (("the layers' linears", bits), ("LM head", head_bits)) if has == 8],
        4: ["the layers' linears"] if bits == 4 else [],
    }
    scales = {8: "a scale for each output", 4: f"a scale for each {WEIGHT_GROUP} weights read together"}
    return "; ".join(
        f"INT{width} weights ({' and '.join(of)}; {scales[width]}, {rounded})"
        for width, of in parts.items()
        if of
    )


def _check_columns(columns: int, what: str) -> None:
    if columns % WEIGHT_GROUP:
        raise ValueError(
            f"weight_bits=4 needs a hidden size that is a multiple of {WEIGHT_GROUP}, which share a scale;"
            f" {what} has {columns}. Use weight_bits=8."
        )
