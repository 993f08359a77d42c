"""A trained OPT and its predictors, widened to a target geometry with the same logits and the same
selections.

    python benchmarks/inflate.py --model examples/opt-books-7m --geometry 1.3b --output DIR

So speed, density, recall and perplexity come from one set of weights on real text. Every hidden channel,
neuron and head is there `factor` times:

- LayerNorm: mean and variance of channels that are all there equally often are those of the originals.
- A projection reads `factor` copies of every input, so its weights are divided by `factor`; its outputs are
  copied. Head size stays, so attention scores do too.
- The tied lm_head cannot be divided (it is the embedding), so the last LayerNorm's weight and bias are.
- Gates read copied channels, so their scores come out `factor` times as large, and so do their biases: `score
  > 0` stays as it is and so do int8 integers. A head's copy adds 1/factor of what the head added, to `factor`
  copies of every channel: the norm of its contribution, and with it the threshold of truly active heads, is
  1/sqrt(factor) of the original's.

All copies weigh the same, so copied rows are equal to the bit. Unequal shares would tell them apart, but
round every weight anew, where dividing by a power of two is exact in any dtype, and one threshold a layer
holds only if all copies of a head add the same. No kernel's time depends on a weight's value: what counts is
which rows are read.

Copies are shuffled, uniformly, so that a selection lies where any set of its size may lie: side by side,
copies would be read as blocks of rows. Neighbours that are copies are left to chance: about factor - 1 pairs
an axis.

Not inflated: depth, vocabulary, positions and the predictors' rank. A rank is a smaller share of the bytes of
a wider block, and copies tell a predictor nothing new: a model trained at this width would need more. Rows
made with it are labelled inflated.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from safetensors.torch import save_file
from transformers import OPTConfig

from vllm_dejavu import artifact
from vllm_dejavu.artifact import Artifact, WeightsFingerprint
from vllm_dejavu.families import Geometry
from vllm_dejavu.manifest import GateSpec, ModelSpec, check_fingerprint, check_model
from vllm_dejavu.predictor_training import hf_model
from vllm_dejavu.published import GEOMETRIES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_MODEL = ROOT / "examples" / "opt-books-7m"
BESIDE_WEIGHTS = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
# What rows and columns of a module's weight run over; a bias or LayerNorm has the first only.
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens": (None, "channels"),
    "embed_positions": (None, "channels"),
    "self_attn_layer_norm": ("channels",),
    "self_attn.q_proj": ("head_rows", "channels"),
    "self_attn.k_proj": ("head_rows", "channels"),
    "self_attn.v_proj": ("head_rows", "channels"),
    "self_attn.out_proj": ("channels", "head_rows"),
    "final_layer_norm": ("channels",),  # of a layer, or the model's last
    "fc1": ("neurons", "channels"),
    "fc2": ("channels", "neurons"),
}


@dataclass(frozen=True)
class Copies:
    """Which original each unit of the widened model copies; every tensor is int64 and holds each original
    `factor` times.

    Attributes:
        channels: [factor * hidden], one for the whole model, because the residual stream is.
        neurons: per layer, [factor * ffn]. heads: per layer, [factor * num_heads].
    """

    factor: int
    head_size: int
    channels: torch.Tensor
    neurons: tuple[torch.Tensor, ...]
    heads: tuple[torch.Tensor, ...]

    @classmethod
    def draw(cls, config: OPTConfig, factor: int, seed: int = 0) -> Copies:
        generator = torch.Generator().manual_seed(seed)

        def shuffled(units: int) -> torch.Tensor:
            return torch.randperm(factor * units, generator=generator) % units

        layers, heads = range(config.num_hidden_layers), config.num_attention_heads
        return cls(
            factor,
            config.hidden_size // heads,
            shuffled(config.hidden_size),
            tuple(shuffled(config.ffn_dim) for _ in layers),
            tuple(shuffled(heads) for _ in layers),
        )

    def along(self, axis: str | None, layer: int) -> torch.Tensor | None:
        """Sources of an axis of AXES; None: the axis stays as it is."""
        if axis is None or axis == "channels":
            return None if axis is None else self.channels
        if axis == "neurons":
            return self.neurons[layer]
        return (self.heads[layer][:, None] * self.head_size + torch.arange(self.head_size)).flatten()


def factor_for(config: OPTConfig, target: Geometry) -> int:
    """The factor that widens a model to a geometry.

    Raises:
        ValueError: the geometry is no multiple of the model, in hidden size, heads or neurons.
    """
    factor, rest = divmod(target.hidden_size, config.hidden_size)
    if rest or not factor:
        raise ValueError(
            f"The geometry has hidden size {target.hidden_size}, which is no multiple of the model's"
            f" {config.hidden_size}. Name another geometry."
        )
    head_size = config.hidden_size // config.num_attention_heads
    if head_size != target.head_size:
        raise ValueError(
            f"The geometry has heads of {target.head_size}, the model of {head_size}; heads are copied,"
            f" never made larger. Name another geometry, or pass --factor {factor} for this width with"
            f" {factor * config.num_attention_heads} heads of {head_size}."
        )
    if factor * config.ffn_dim != target.ffn_dim:
        raise ValueError(
            f"The geometry has {target.ffn_dim} neurons a layer, the model widened to its hidden size"
            f" {factor * config.ffn_dim}: the ratio of ffn to hidden size stays. Pass --factor {factor} for"
            " this width with that many neurons."
        )
    return factor


def inflate(
    model_dir: str | Path, output: str | Path, factor: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write the widened model, and in `output/dejavu` the widened artifact of `model_dir/dejavu` if there is
    one.

    Args:
        model_dir: a pre-LN OPT with tied embeddings. output: a new or empty directory.
        factor: at least 2. With a power of two nothing is rounded (in the original's dtype or a wider one);
            otherwise every divided weight is, once.
        dtype: of the weights written. seed: of the shuffles.

    Returns:
        `output`.

    Raises:
        ValueError: no such factor, an OPT of another form, an output that is not empty. ArtifactError: the
            artifact is not that of the model.
    """
    model_dir, output = Path(model_dir), Path(output)
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise ValueError(f"factor is {factor!r}; it must be an integer of at least 2.")
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"{model_dir} has no config.json; name the directory of a model.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Output {output} exists and is not an empty directory; name another.")
    config = OPTConfig.from_pretrained(model_dir)
    _check_form(config, model_dir)
    loaded = None
    if (model_dir / "dejavu").is_dir():
        loaded = artifact.load(model_dir / "dejavu")
        check_model(loaded.manifest, ModelSpec.from_hf_config(config, str(model_dir)))
        check_fingerprint(loaded.manifest, hf_model.fingerprint(str(model_dir)), str(model_dir))

    copies = Copies.draw(config, factor, seed)
    digest = WeightsFingerprint()
    output.mkdir(parents=True, exist_ok=True)
    save_file(
        dict(digest.tee(_weights(model_dir, copies, dtype))),
        output / "model.safetensors",
        metadata={"format": "pt"},
    )
    (output / "model.safetensors").chmod(0o644)  # safetensors makes what it writes private
    (output / "config.json").write_text(
        json.dumps(_config(model_dir, config, factor, dtype), indent=2) + "\n", encoding="utf-8"
    )
    for pattern in BESIDE_WEIGHTS:
        for path in model_dir.glob(pattern):
            shutil.copyfile(path, output / path.name)
    name = model_dir.resolve().name
    if loaded is not None:
        _write_artifact(
            output / "dejavu",
            loaded,
            copies,
            ModelSpec.from_hf_config(
                OPTConfig.from_pretrained(output), f"{name} inflated x{factor}", digest.hexdigest()
            ),
            seed,
        )
    (output / "README.md").write_text(
        _card(name, config, factor, dtype, seed, loaded is not None), encoding="utf-8"
    )
    return output


def _check_form(config: OPTConfig, name: Path) -> None:
    for good, what in (
        (config.model_type == "opt", f"an OPT, not {config.model_type}"),
        (
            config.do_layer_norm_before and not config._remove_final_layer_norm,
            "a pre-LN OPT with a last LayerNorm",
        ),
        (
            config.layer_norm_elementwise_affine,
            "LayerNorms with weights: the last one's are divided for the tied embeddings",
        ),
        (config.tie_word_embeddings, "tied embeddings"),
        (config.word_embed_proj_dim == config.hidden_size, "embeddings as wide as the hidden state"),
    ):
        if not good:
            raise ValueError(
                f"{name} cannot be inflated: it takes {what}. Take another model, such as"
                f" {DEFAULT_MODEL.relative_to(ROOT)}."
            )


def _weights(model_dir: Path, copies: Copies, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The widened checkpoint, a tensor at a time."""
    for name, tensor in hf_model.checkpoint_tensors(str(model_dir)):
        name = name.removeprefix("model.").removeprefix("decoder.")
        if name == "lm_head.weight":  # the embedding once more
            continue
        found = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(?:weight|bias)", name)
        if found is None or found[2] not in AXES:
            raise ValueError(f"{model_dir} holds a tensor {name!r} that no OPT of this form has.")
        axes = AXES[found[2]][: tensor.ndim]
        layer = int(found[1] or 0)
        reads = len(axes) == 2 and axes[0] is not None
        if reads or name.startswith("final_layer_norm."):
            tensor = tensor.float() / copies.factor
        tensor = tensor.to(dtype)
        for dim, axis in enumerate(axes):
            if (sources := copies.along(axis, layer)) is not None:
                tensor = tensor.index_select(dim, sources)
        yield f"model.decoder.{name}", tensor.contiguous()


def _config(model_dir: Path, config: OPTConfig, factor: int, dtype: torch.dtype) -> dict[str, Any]:
    # The file as it is, not what this version of transformers makes of it.
    written = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    written.pop("torch_dtype", None)  # the name before transformers 4.56
    return written | {
        "hidden_size": factor * config.hidden_size,
        "word_embed_proj_dim": factor * config.hidden_size,
        "ffn_dim": factor * config.ffn_dim,
        "num_attention_heads": factor * config.num_attention_heads,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _write_artifact(directory: Path, original: Artifact, copies: Copies, model: ModelSpec, seed: int) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer, gates in enumerate(original.manifest.layers):
        for block in gates:
            units = (copies.neurons if block == "mlp" else copies.heads)[layer]
            for name, tensor in original.gate(layer, block)[1].items():
                if name in ("down", "weight"):
                    tensor = tensor.index_select(1, copies.channels)
                if name != "down":
                    tensor = tensor.index_select(0, units)
                tensors[f"layers.{layer}.{block}.{name}"] = (
                    tensor * copies.factor if name == "bias" else tensor
                )

    def widened(gate: GateSpec) -> GateSpec:
        # Shares of units stay. A margin is in units of the original's scores, and a record.
        return (
            gate
            if gate.threshold is None
            else replace(gate, threshold=gate.threshold / math.sqrt(copies.factor))
        )

    manifest = original.manifest
    record = {
        "inflated": True,
        "inflated_from": manifest.model.name,
        "inflated_factor": copies.factor,
        "inflated_seed": seed,
        "measured_on": "the original",
    }
    layers = tuple({block: widened(gate) for block, gate in gates.items()} for gates in manifest.layers)
    artifact.save(
        directory,
        replace(manifest, model=model, layers=layers, calibration=manifest.calibration | record),
        tensors,
    )


def _card(name: str, config: OPTConfig, factor: int, dtype: torch.dtype, seed: int, predictors: bool) -> str:
    def row(what: str, value: int, times: int = factor) -> str:
        return f"| {what} | {value:,} | {times * value:,} |"

    exact = factor & (factor - 1) == 0
    lines = [
        "---",
        "library_name: transformers",
        "tags: [inflated, opt, vllm-dejavu]",
        "---",
        "",
        f"# {name}, inflated x{factor}",
        "",
        (
            f"**Inflated**: {name} widened by {factor} with the same logits, to measure speed and quality on"
            f" the same weights. It knows nothing that {name} does not."
        ),
        "",
        "| | original | inflated |",
        "|---|---|---|",
        row("hidden size", config.hidden_size),
        row("neurons a layer", config.ffn_dim),
        row("heads a layer", config.num_attention_heads),
        row("head size", config.hidden_size // config.num_attention_heads, 1),
        row("layers", config.num_hidden_layers, 1),
        row("vocabulary", config.vocab_size, 1),
        row("positions", config.max_position_embeddings, 1),
        "",
        (
            f"- Every channel, neuron and head is there {factor} times, shuffled (seed {seed}); weights that"
            f" read copies are divided by {factor}, and so is the last LayerNorm."
        ),
        f"- Weights in {str(dtype).removeprefix('torch.')}. "
        + (
            "Dividing by a power of two rounds nothing."
            if exact
            else f"{factor} is no power of two: divided weights were rounded once."
        ),
        (
            "- **Depth is not inflated**, nor are vocabulary and positions: embeddings and lm_head have"
            " another share of a step than in a real model of this width. Report per layer as well."
        ),
    ]
    if predictors:
        lines += [
            (
                "- `dejavu/` holds the original's predictors, widened likewise: they select the copies of"
                " what the original's select. Densities, recall and perplexity in the manifest were measured"
                " on the original."
            ),
            (
                "- Their rank is the original's, so their share of a block's bytes is smaller than a model"
                " trained at this width would need."
            ),
        ]
    lines += ["", f"License: that of {name}.", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Widen a trained OPT and its predictors; logits and selections stay."
    )
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    width = parser.add_mutually_exclusive_group(required=True)
    width.add_argument("--geometry", choices=GEOMETRIES, help="whose width to reach")
    width.add_argument("--factor", type=int)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        factor = (
            args.factor
            if args.geometry is None
            else factor_for(OPTConfig.from_pretrained(args.model), GEOMETRIES[args.geometry])
        )
        print(
            f"{inflate(args.model, args.output, factor, DTYPES[args.dtype], args.seed)}:"
            f" {args.model.resolve().name}, inflated x{factor}, {args.dtype}"
        )
    except ValueError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
