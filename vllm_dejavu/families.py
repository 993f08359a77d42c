"""Each architecture that is served: its sizes, what its weights are called, and the class that serves it.

Whatever depends on an architecture, but for the arithmetic of its layers, is read from here: by the plugin,
the manifest, training, planning. Imports neither torch, vLLM nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Exactly 0 for half of their inputs, so that a neuron that came out 0 is skipped without an error.
SPARSE_ACTIVATIONS = ("relu", "relu2")


@dataclass(frozen=True)
class Geometry:
    """The sizes of a checkpoint, in the terms that everything here shares.

    Attributes:
        num_heads: query heads; num_kv_heads: those of keys and values, a divisor.
        activation: transformers' name of it, as in the checkpoint's configuration.
        gated: whether the MLP multiplies two projections (gate and up) before the one down.
        norm: "pre" or "post": whether blocks are normalised in front of them or behind.
        max_positions: tokens of the longest sequence.
    """

    num_layers: int
    hidden_size: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    activation: str
    gated: bool
    norm: str
    max_positions: int
    vocab_size: int

    def units(self, block: str) -> int:
        """What a gate of a block (config.BLOCKS) selects among in a layer: neurons or query heads."""
        return self.ffn_dim if block == "mlp" else self.num_heads


@dataclass(frozen=True)
class Names:
    """Modules of a transformers model, by their paths: `layers` and `behind` below the model, the others
    below a layer.

    Attributes:
        behind: what hidden states pass between the last layer and the head, in order; skipped where a model
            has None.
        qkv: the three projections. mlp_norm: what normalises the residual in front of the MLP, where `norm`
            is "pre". norm_offset: what that one adds to its weight.
    """

    layers: str
    behind: tuple[str, ...]
    qkv: tuple[str, str, str]
    out: str
    up: str
    down: str
    mlp_norm: str
    norm_offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        architecture: as checkpoints name it. serving: "module:class" of the model that vLLM runs.
        geometry: of a transformers configuration.
    """

    architecture: str
    serving: str
    names: Names
    geometry: Callable[[Any], Geometry]

    @property
    def serving_architecture(self) -> str:
        """The name that the serving class is registered by."""
        return self.serving.partition(":")[2]


def _opt(config: Any) -> Geometry:
    return Geometry(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_dim=config.ffn_dim,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_size=config.hidden_size // config.num_attention_heads,
        activation=config.activation_function,
        gated=False,
        norm="pre" if config.do_layer_norm_before else "post",
        max_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )


def _nemotron(config: Any) -> Geometry:
    return Geometry(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_dim=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        activation=config.hidden_act,
        gated=False,
        norm="pre",
        max_positions=config.max_position_embeddings,
        vocab_size=config.vocab_size,
    )


FAMILIES = (
    Family(
        architecture="OPTForCausalLM",
        serving="vllm_dejavu.models.opt:DejaVuOPTForCausalLM",
        names=Names(
            layers="model.decoder.layers",
            behind=("model.decoder.final_layer_norm", "model.decoder.project_out"),
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out="self_attn.out_proj",
            up="fc1",
            down="fc2",
            mlp_norm="final_layer_norm",
        ),
        geometry=_opt,
    ),
    Family(
        architecture="NemotronForCausalLM",
        serving="vllm_dejavu.models.nemotron:DejaVuNemotronForCausalLM",
        names=Names(
            layers="model.layers",
            behind=("model.norm",),
            qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out="self_attn.o_proj",
            up="mlp.up_proj",
            down="mlp.down_proj",
            mlp_norm="post_attention_layernorm",
            norm_offset=1.0,
        ),
        geometry=_nemotron,
    ),
)


def family_of(architectures: str | Sequence[str] | None) -> Family:
    """The family of a model, by the architectures that its configuration names, or by ours.

    Raises:
        ValueError: none of them is supported.
    """
    named = [architectures] if isinstance(architectures, str) else list(architectures or ())
    for family in FAMILIES:
        if {family.architecture, family.serving_architecture} & set(named):
            return family
    raise ValueError(
        f"model_impl='dejavu' supports the architectures {[f.architecture for f in FAMILIES]}, this model has"
        f" {named}. Serve it without --model-impl dejavu; `vllm-dejavu probe MODEL` says how sparse it is, if"
        " its activation leaves neurons at exactly 0 (ReLU and its square do; SiLU and GELU leave nothing to"
        " skip exactly)."
    )


def geometry_of(config: Any) -> Geometry:
    """The sizes of a transformers configuration.

    Raises:
        ValueError: its architecture is not supported, or its activation leaves no neuron at exactly 0.
    """
    geometry = family_of(config.architectures).geometry(config)
    if geometry.activation not in SPARSE_ACTIVATIONS:
        raise ValueError(
            "model_impl='dejavu' needs an activation that is exactly 0 for many neurons (one of"
            f" {list(SPARSE_ACTIVATIONS)}), this model has {geometry.activation!r}: no neuron could be"
            " skipped without error. Serve it without --model-impl dejavu."
        )
    return geometry
