"""Stock vLLM's quantized baselines: a compressed-tensors W8A8 or W4A16 copy of a 16-bit checkpoint, rounded
to nearest.

    python benchmarks/quantized.py MODEL OUT w8a8|w4a16

MODEL is a directory with config.json and, of a synthetic model, nothing else: then only OUT's config.json
is written; its weights are drawn as the engine starts (`synthetic_weights.init_weights`). W8A8: int8 with a
scale for each output, activations rounded to int8 for each token. W4A16: groups of 128 inputs. Embeddings, LM
head, biases and norms stay.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 128
# The kernel that vLLM's log must name: another one would be another baseline.
KERNELS = {"w8a8": "CPUInt8ScaledMMLinearKernel", "w4a16": "CPUWNA16LinearKernel"}


def _arguments(bits: int, strategy: str, *, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": GROUP if strategy == "group" else None,
        "dynamic": dynamic,
    }


def quantization_config(scheme: str) -> dict[str, Any]:
    """As compressed-tensors documents it."""
    four = scheme == "w4a16"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if four else "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _arguments(4, "group") if four else _arguments(8, "channel"),
                "input_activations": None if four else _arguments(8, "token", dynamic=True),
            }
        },
    }


def round_w8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[outputs, inputs] -> int8, and a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def round_w4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """[outputs, inputs] -> eight inputs in an int32, and a scale for each group of inputs."""
    outputs, inputs = weight.shape
    groups = weight.view(outputs, inputs // GROUP, GROUP)
    scale = groups.abs().amax(-1).clamp_min(1e-12) / 7
    integers = ((groups / scale[..., None]).round().clamp(-8, 7) + 8).to(torch.int64)
    packed = (integers.view(outputs, inputs // 8, 8) << (torch.arange(8) * 4)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([outputs, inputs])}


def write(model: Path, out: Path, scheme: str) -> Path:
    """The copy; made once."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(scheme)
    out.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, out / file.name)
    weights = model / "model.safetensors"
    if weights.exists() and not (out / weights.name).exists():
        result: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(weights).items():
            if not (tensor.ndim == 2 and name.endswith(".weight") and ".layers." in name):
                result[name] = tensor
                continue
            parts = (round_w8 if scheme == "w8a8" else round_w4)(tensor.float())
            parts["weight_scale"] = parts["weight_scale"].to(
                torch.float32 if scheme == "w8a8" else tensor.dtype
            )
            result |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        save_file(result, out / weights.name)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return out


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
