"""Weights rounded to few bits: INT8 as engines keep and read it, and, *simulated*, what INT4 would do to
quality.

Both are symmetric and round to nearest (RTN; neither GPTQ nor AWQ, which look at data and lose less).
Embeddings, LM head, biases and norms stay, but that INT8 may take the LM head along (`lm_head_bits`).

- 8 bits: one scale for each output, int8 in memory (`formats`).
- 4 bits: the layers' linear weights (q, k, v, out_proj, fc1, fc2) are rounded in compressed-tensors' scheme
  W4A16, groups of 128 along the input dimension with a scale each, turned back and computed with as usual: no
  byte is saved.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import torch

from vllm_dejavu.families import family_of

SCHEME = "W4A16"  # compressed-tensors' name of 4 bits
GROUP_SIZE = 128  # of that scheme; a test compares
# Of the scales: compressed-tensors takes the checkpoint's, which for facebook/opt-* is this one.
SCALE_DTYPE = torch.float16
# Load formats that put tensors into parameters without showing them to the model's load_weights, where what
# is simulated happens.
BLIND_FORMATS = {
    "dummy": "its weights are random",
    **dict.fromkeys(
        ("sharded_state", "runai_streamer_sharded", "ipc_cache"),
        "it copies tensors that an engine had loaded before",
    ),
}
_LINEAR = re.compile(
    r"(?:model\.)?(?:decoder\.)?layers\.\d+\."
    r"(?:self_attn\.(?:[qkv]|out|o)_proj|mlp\.(?:up|down)_proj|fc1|fc2)\.weight"
)


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


def quantize_dequantize(name: str, tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of a checkpoint's tensor in so many bits.

    Args:
        name: in the checkpoint; tensors other than `is_linear` names pass through, and with 16 bits all do.
        tensor: [outputs, inputs], whole: before tensor parallelism cuts it.

    Returns:
        float32, integer times scale without further rounding, so that the result does not depend on the
        checkpoint's dtype.

    Raises:
        ValueError: inputs cannot be cut into groups.
    """
    if bits == 16 or not is_linear(name):
        return tensor
    if bits == 8:
        integers, scale = int8_rows(tensor)
        return integers * scale[:, None]
    _check_inputs(tensor.shape[-1], name, bits)
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = _scheme()
    weight = tensor.float()
    groups = weight.unflatten(-1, (-1, args.group_size))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    return fake_quantize(weight, scale, zero_point, args)


@functools.cache
def _scheme() -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(SCHEME, ["Linear"]).weights.model_copy(update={"scale_dtype": SCALE_DTYPE})


@torch.no_grad()
def quantize_model(model: torch.nn.Module, bits: int) -> int:
    """The same for a transformers `OPTForCausalLM`, in place, as masked studies use it; returns how many
    weights were quantized.

    Raises:
        ValueError: inputs cannot be cut into groups, or weights are not in memory.
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
        sizes: with `hidden_size` and `ffn_dim`.

    Raises:
        ValueError: naming the size.
    """
    if bits == 4:
        _check_inputs(sizes.hidden_size, "hidden_size", bits)
        _check_inputs(sizes.ffn_dim, "ffn_dim", bits)


class Stored(NamedTuple):
    """How a checkpoint stores a linear.

    Attributes:
        bits: 16, or 8: int8 with a scale for each output. inputs: whether stock vLLM rounds its inputs too.
    """

    bits: int
    inputs: bool = False


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
            " compressed-tensors int8, symmetric, with a scale for each output (W8A8, W8A16). Serve the model"
            " without --model-impl dejavu."
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
    if (scheme.num_bits, kind, strategy, scheme.symmetric) != (8, "int", "channel", True):
        symmetry = "symmetric" if scheme.symmetric else "asymmetric"
        raise refuse(f"{kind}{scheme.num_bits} by {strategy}, {symmetry}")
    inputs = found.get("input_activations")
    if inputs is not None and not inputs.dynamic:
        raise refuse("int8 with fixed scales of its inputs (input_activations not dynamic)")
    if getattr(scheme, "actorder", None):
        raise refuse("int8 in the order of its activations (actorder)")
    return Stored(8, inputs is not None)


PACKED = "weight_packed"  # compressed-tensors' name of four int8 in an int32


def unpacked(tensor: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs / 4], int32, as compressed-tensors packs 8 bits (from 0 on, the first input lowest)
    -> [outputs, inputs], int8.
    """
    return (tensor.contiguous().view(torch.uint8) ^ 128).view(torch.int8)


def checkpoint_bits(quant_config: Any) -> int:
    """8 where a checkpoint has linears of which we read rows of integers (`stored_as`), or 16."""
    weights = [scheme.get("weights") for scheme in getattr(quant_config, "target_scheme_map", {}).values()]
    return 8 if any(w is not None and w.num_bits == 8 for w in weights) else 16


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


def check_load_format(load_format: Any, bits: int) -> None:
    """Refuse load formats that would leave weights as they are which are rounded where they lie.

    Raises:
        ValueError: naming the format and the remedy.
    """
    if bits == 4 and (reason := BLIND_FORMATS.get(str(load_format))):
        raise refusal(load_format, bits, reason)


def refusal(load_format: Any, bits: int, reason: str) -> ValueError:
    return ValueError(
        f"weight_bits={bits} rounds weights while they are read from a checkpoint, which"
        f" load_format={str(load_format)!r} does not do: {reason}. Use load_format='auto', or weight_bits=16."
    )


def describe(bits: int, head_bits: int) -> str:
    """For the start-up log."""
    simulated = (
        f"SIMULATED {SCHEME}: linear weights of the layers rounded to {bits} bits (symmetric, groups"
        f" of {GROUP_SIZE}, round to nearest) and computed with in the engine's dtype; for evaluation: it"
        " saves no byte and no time"
    )
    parts = [part for part, has in (("the layers' linears", bits), ("LM head", head_bits)) if has == 8]
    int8 = f"INT8 weights ({' and '.join(parts)}; a scale for each output, rounded to nearest while loading)"
    return "; ".join(([simulated] if bits == 4 else []) + ([int8] if parts else []))


def _check_inputs(inputs: int, what: str, bits: int) -> None:
    # As compressed-tensors has it: a last, shorter group is an error.
    if inputs % GROUP_SIZE:
        raise ValueError(
            f"weight_bits={bits} needs input sizes that are multiples of {GROUP_SIZE}, the group size of"
            f" {SCHEME}; {what} has {inputs}. Use weight_bits=16."
        )
