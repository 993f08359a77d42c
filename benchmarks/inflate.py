"""A trained OPT or Nemotron and its predictors, widened to a target geometry with the same logits and the
same selections.

    python benchmarks/inflate.py --model examples/opt-books-7m --geometry 1.3b --output DIR

So speed, density, recall and perplexity come from one set of weights on real text. Every hidden channel,
neuron and head is there `factor` times:

- LayerNorm: mean and variance of channels that are all there equally often are those of the originals.
- A projection reads `factor` copies of every input, so its weights are divided by `factor`; its outputs are
  copied. Head size stays, so attention scores do too; query heads stay with copies of the keys they share.
- OPT's tied lm_head cannot be divided (it is the embedding), so the last LayerNorm's weight and bias are.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from vllm_dejavu import artifact
from vllm_dejavu.artifact import Artifact, WeightsFingerprint
from vllm_dejavu.families import Geometry, geometry_of
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


@dataclass(frozen=True)
class Form:
    """What an architecture is made of.

    Attributes:
        prefix: of its weights' names, but for lm_head's.
        axes: what rows and columns of a module's weight run over; a bias or LayerNorm has the first only.
        last_norm: what is divided where embeddings are tied.
        widened: sizes in its configuration. asked: what a configuration must have, and in words.
    """

    prefix: str
    axes: dict[str, tuple[str | None, ...]]
    last_norm: str
    widened: tuple[str, ...]
    asked: Callable[[PretrainedConfig], tuple[tuple[bool, str], ...]]


ATTENTION = {
    "self_attn.q_proj": ("head_rows", "channels"),
    "self_attn.k_proj": ("key_rows", "channels"),
    "self_attn.v_proj": ("key_rows", "channels"),
}
FORMS = {
    "opt": Form(
        "model.decoder.",
        ATTENTION
        | {
            "embed_tokens": (None, "channels"),
            "embed_positions": (None, "channels"),
            "self_attn_layer_norm": ("channels",),
            "self_attn.out_proj": ("channels", "head_rows"),
            "final_layer_norm": ("channels",),  # of a layer, or the model's last
            "fc1": ("neurons", "channels"),
            "fc2": ("channels", "neurons"),
        },
        "final_layer_norm",
        ("hidden_size", "word_embed_proj_dim", "ffn_dim", "num_attention_heads"),
        lambda config: (
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
        ),
    ),
    "nemotron": Form(
        "model.",
        ATTENTION
        | {
            "embed_tokens": (None, "channels"),
            "input_layernorm": ("channels",),
            "self_attn.o_proj": ("channels", "head_rows"),
            "post_attention_layernorm": ("channels",),
            "mlp.up_proj": ("neurons", "channels"),
            "mlp.down_proj": ("channels", "neurons"),
            "norm": ("channels",),
        },
        "norm",
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        # a tied one would have its last LayerNorm divided, whose weight has 1 added to it
        lambda config: ((not config.tie_word_embeddings, "a Nemotron with an LM head of its own"),),
    ),
}


def form_of(config: PretrainedConfig, name: Path) -> Form:
    """Of a model's configuration.

    Raises:
        ValueError: it cannot be inflated.
    """
    if config.model_type not in FORMS:
        asked = [(False, f"an OPT or a Nemotron, not {config.model_type}")]
    else:
        asked = FORMS[config.model_type].asked(config)
    for good, what in asked:
        if not good:
            raise ValueError(
                f"{name} cannot be inflated: it takes {what}. Take another model, such as"
                f" {DEFAULT_MODEL.relative_to(ROOT)}."
            )
    return FORMS[config.model_type]


@dataclass(frozen=True)
class Copies:
    """Which original each unit of the widened model copies; every tensor is int64 and holds each original
    `factor` times.

    Attributes:
        channels: [factor * hidden], one for the whole model, because the residual stream is.
        neurons: per layer, [factor * ffn]. keys: per layer, [factor * num_kv_heads], heads of keys and
            values. group: query heads that share one, beside each other.
    """

    factor: int
    head_size: int
    group: int
    channels: torch.Tensor
    neurons: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]

    @classmethod
    def draw(cls, config: PretrainedConfig, factor: int, seed: int = 0) -> Copies:
        generator, g = torch.Generator().manual_seed(seed), geometry_of(config)

        def shuffled(units: int) -> torch.Tensor:
            return torch.randperm(factor * units, generator=generator) % units

        layers = range(g.num_layers)
        return cls(
            factor,
            g.head_size,
            g.num_heads // g.num_kv_heads,
            shuffled(g.hidden_size),
            tuple(shuffled(g.ffn_dim) for _ in layers),
            tuple(shuffled(g.num_kv_heads) for _ in layers),
        )

    @property
    def heads(self) -> tuple[torch.Tensor, ...]:
        """Per layer, [factor * num_heads], query heads."""
        return tuple(_within(keys, self.group) for keys in self.keys)

    def along(self, axis: str | None, layer: int) -> torch.Tensor | None:
        """Sources of an axis of Form.axes; None: the axis stays as it is."""
        if axis is None or axis == "channels":
            return None if axis is None else self.channels
        if axis == "neurons":
            return self.neurons[layer]
        return _within((self.keys if axis == "key_rows" else self.heads)[layer], self.head_size)


def _within(sources: torch.Tensor, size: int) -> torch.Tensor:
    """Of what each source has `size` of."""
    return (sources[:, None] * size + torch.arange(size)).flatten()


def factor_for(config: PretrainedConfig, target: Geometry) -> int:
    """The factor that widens a model to a geometry.

    Raises:
        ValueError: the geometry is no multiple of the model, in hidden size, heads or neurons.
    """
    g = geometry_of(config)
    factor, rest = divmod(target.hidden_size, g.hidden_size)
    if rest or not factor:
        raise ValueError(
            f"The geometry has hidden size {target.hidden_size}, which is no multiple of the model's"
            f" {g.hidden_size}. Name another geometry."
        )
    if g.head_size != target.head_size:
        raise ValueError(
            f"The geometry has heads of {target.head_size}, the model of {g.head_size}; heads are copied,"
            f" never made larger. Name another geometry, or pass --factor {factor} for this width with"
            f" {factor * g.num_heads} heads of {g.head_size}."
        )
    if factor * g.ffn_dim != target.ffn_dim:
        raise ValueError(
            f"The geometry has {target.ffn_dim} neurons a layer, the model widened to its hidden size"
            f" {factor * g.ffn_dim}: the ratio of ffn to hidden size stays. Pass --factor {factor} for"
            " this width with that many neurons."
        )
    return factor


def inflate(
    model_dir: str | Path, output: str | Path, factor: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write the widened model, and in `output/dejavu` the widened artifact of `model_dir/dejavu` if there is
    one.

    Args:
        model_dir: a pre-LN OPT with tied embeddings, or a Nemotron without. output: a new or empty directory.
        factor: at least 2. With a power of two nothing is rounded (in the original's dtype or a wider one);
            otherwise every divided weight is, once.
        dtype: of the weights written. seed: of the shuffles.

    Returns:
        `output`.

    Raises:
        ValueError: no such factor, a model of another form, an output that is not empty. ArtifactError: the
            artifact is not that of the model.
    """
    model_dir, output = Path(model_dir), Path(output)
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
        raise ValueError(f"factor is {factor!r}; it must be an integer of at least 2.")
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"{model_dir} has no config.json; name the directory of a model.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"Output {output} exists and is not an empty directory; name another.")
    config = AutoConfig.from_pretrained(model_dir)
    form = form_of(config, model_dir)
    loaded = None
    if (model_dir / "dejavu").is_dir():
        loaded = artifact.load(model_dir / "dejavu")
        check_model(loaded.manifest, ModelSpec.from_hf_config(config, str(model_dir)))
        check_fingerprint(loaded.manifest, hf_model.fingerprint(str(model_dir)), str(model_dir))

    copies = Copies.draw(config, factor, seed)
    digest = WeightsFingerprint()
    output.mkdir(parents=True, exist_ok=True)
    save_file(
        dict(digest.tee(_weights(model_dir, form, config.tie_word_embeddings, copies, dtype))),
        output / "model.safetensors",
        metadata={"format": "pt"},
    )
    (output / "model.safetensors").chmod(0o644)  # safetensors makes what it writes private
    (output / "config.json").write_text(
        json.dumps(_config(model_dir, form, factor, dtype), indent=2) + "\n", encoding="utf-8"
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
                AutoConfig.from_pretrained(output), f"{name} inflated x{factor}", digest.hexdigest()
            ),
            seed,
        )
    (output / "README.md").write_text(
        _card(name, config, factor, dtype, seed, loaded is not None), encoding="utf-8"
    )
    return output


def _weights(
    model_dir: Path, form: Form, tied: bool, copies: Copies, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The widened checkpoint, a tensor at a time; tied: whether the embeddings are the LM head too."""
    for name, tensor in hf_model.checkpoint_tensors(str(model_dir)):
        if name == "lm_head.weight":
            if tied:  # the embedding once more
                continue
            yield name, (tensor.float() / copies.factor).to(dtype).index_select(1, copies.channels)
            continue
        for part in ("model.", "decoder."):
            name = name.removeprefix(part)
        found = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(?:weight|bias)", name)
        if found is None or found[2] not in form.axes:
            raise ValueError(f"{model_dir} holds a tensor {name!r} that no model of this form has.")
        axes = form.axes[found[2]][: tensor.ndim]
        layer = int(found[1] or 0)
        reads = len(axes) == 2 and axes[0] is not None
        if reads or (tied and name.startswith(f"{form.last_norm}.")):
            tensor = tensor.float() / copies.factor
        tensor = tensor.to(dtype)
        for dim, axis in enumerate(axes):
            if (sources := copies.along(axis, layer)) is not None:
                tensor = tensor.index_select(dim, sources)
        yield f"{form.prefix}{name}", tensor.contiguous()


def _config(model_dir: Path, form: Form, factor: int, dtype: torch.dtype) -> dict[str, Any]:
    # The file as it is, not what this version of transformers makes of it.
    written = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    written.pop("torch_dtype", None)  # the name before transformers 4.56
    config = AutoConfig.from_pretrained(model_dir)
    wider = {name: factor * getattr(config, name) for name in form.widened}
    if hasattr(config, "head_dim"):  # not what the wider hidden size would make of it
        wider["head_dim"] = geometry_of(config).head_size
    return written | wider | {"dtype": str(dtype).removeprefix("torch.")}


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


def _card(
    name: str, config: PretrainedConfig, factor: int, dtype: torch.dtype, seed: int, predictors: bool
) -> str:
    def row(what: str, value: int, times: int = factor) -> str:
        return f"| {what} | {value:,} | {times * value:,} |"

    exact, g = factor & (factor - 1) == 0, geometry_of(config)
    divided = ", and so is the last LayerNorm" if config.tie_word_embeddings else ""
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [inflated, {config.model_type}, vllm-dejavu]",
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
        row("hidden size", g.hidden_size),
        row("neurons a layer", g.ffn_dim),
        row("heads a layer", g.num_heads),
        row("head size", g.head_size, 1),
        row("layers", g.num_layers, 1),
        row("vocabulary", g.vocab_size, 1),
        row("positions", g.max_positions, 1),
        "",
        (
            f"- Every channel, neuron and head is there {factor} times, shuffled (seed {seed}); weights that"
            f" read copies are divided by {factor}{divided}."
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
        description="Widen a trained model and its predictors; logits and selections stay."
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
            else factor_for(AutoConfig.from_pretrained(args.model), GEOMETRIES[args.geometry])
        )
        print(
            f"{inflate(args.model, args.output, factor, DTYPES[args.dtype], args.seed)}:"
            f" {args.model.resolve().name}, inflated x{factor}, {args.dtype}"
        )
    except ValueError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
