"""Synthetic models and predictors: geometries without weights, selections with densities that are asked for.

    python benchmarks/synthetic.py --geometry 6.7b --output DIR

Speed depends on which neurons and heads are read, not on what they mean. So weights are random and the
predictors are too, but they run at their real rank and decide the selection: neuron j of a layer is selected
by a token with a rate p_j of its own, and these rates are drawn so that one token, 8 and 64 tokens select the
shares of a given profile. Nothing here says anything about quality, and every row made with it is labelled
synthetic.

How the rates come out: rows of `down` are orthonormal and the input x is normalised, so down(x) is close to
N(0, I) over tokens; rows of `up` have length 1, so each score is N(0, 1) before its bias, and bias_j = normal
quantile of p_j. `synthetic_weights` makes tokens of the model as different as this takes; densities are
counted in every timed run, and `calibrate` corrects what remains.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy
import torch
from common import ENGINE_GEOMETRIES, geometry, geometry_name
from synthetic_rates import Rates, fit_rates, target
from synthetic_weights import RESIDUAL_STD

from vllm_dejavu import artifact
from vllm_dejavu.artifact import DTYPES
from vllm_dejavu.families import Geometry
from vllm_dejavu.manifest import GateSpec, Manifest, ModelSpec
from vllm_dejavu.predictor import quantize

NORMAL = NormalDist()
# Of what a predictor reads, by lookahead: `previous` is the residual stream, which is not normalised.
INPUT_STD = {"self": 1.0, "attn_input": 1.0, "previous": RESIDUAL_STD}
PREDICTOR_DTYPES = ("float16", "int8")


def rank_of(g: Geometry, dtype: str = "float16") -> int:
    """Of the MLP predictor, as `vllm-dejavu train` takes it: at most 3% of the block's bytes where hidden >=
    2048.
    """
    from vllm_dejavu.sizes import default_rank

    return default_rank(g.hidden_size, g.ffn_dim, DTYPES[dtype].itemsize)


def hf_config(g: Geometry) -> dict[str, Any]:
    """An OPT's, or with ReLU squared a Nemotron's."""
    if g.activation == "relu2":
        return {
            "architectures": ["NemotronForCausalLM"],
            "model_type": "nemotron",
            "hidden_act": "relu2",
            "hidden_size": g.hidden_size,
            "intermediate_size": g.ffn_dim,
            "num_attention_heads": g.num_heads,
            "num_key_value_heads": g.num_kv_heads,
            "head_dim": g.head_size,
            "num_hidden_layers": g.num_layers,
            "vocab_size": g.vocab_size,
            "max_position_embeddings": g.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
            "partial_rotary_factor": 0.5,
            "norm_eps": 1e-5,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 1,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "use_cache": True,
            "torch_dtype": "float16",
        }
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "hidden_size": g.hidden_size,
        "word_embed_proj_dim": g.hidden_size,
        "ffn_dim": g.ffn_dim,
        "num_attention_heads": g.num_heads,
        "num_hidden_layers": g.num_layers,
        "vocab_size": g.vocab_size,
        "max_position_embeddings": g.max_positions,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "use_cache": True,
        "torch_dtype": "float16",
    }


def write_model(directory: Path, g: Geometry) -> Path:
    """config.json alone: weights are dummies (`load_format="dummy"`), then `init_weights`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(g), indent=1) + "\n", encoding="utf-8")
    return directory


def _unit_rows(rows: int, columns: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=generator, device=device)
    return weight / weight.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class Recipe:
    """What predictors are made with, besides the densities.

    Attributes:
        name: of the model they are for. rank: of the MLP predictors; None: `rank_of`. dtype: one of
            PREDICTOR_DTYPES.
        mlp_lookahead: any of config.LOOKAHEADS["mlp"] whose input is normalised: `self` or `attn_input`.
        spread: densities of layers vary by up to this share around the profile, evenly, in random order.
    """

    name: str = "model"
    rank: int | None = None
    dtype: str = "float16"
    mlp_lookahead: str = "self"
    spread: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mlp_lookahead not in ("self", "attn_input"):
            raise ValueError(
                f"mlp_lookahead is {self.mlp_lookahead!r}; synthetic predictors read a normalised input:"
                " 'self' or 'attn_input'."
            )
        if self.dtype not in PREDICTOR_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; predictors come in {PREDICTOR_DTYPES}.")


def write_artifact(
    directory: Path, g: Geometry, profile: Mapping[int, float], head_density: float, recipe: Recipe
) -> Path:
    """An artifact whose selections follow a profile. A density of 1 makes dense gates: nothing is predicted
    there.

    Args:
        profile: {batch: share of neurons that any of `batch` tokens selects}, mean over layers.
        head_density: heads a token selects; each with this rate, on its own.
    """
    dtype, seed = recipe.dtype, recipe.seed
    rank = recipe.rank or rank_of(g, dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator, numbers = torch.Generator(device).manual_seed(seed), numpy.random.default_rng(seed)
    factors = 1 + recipe.spread * numbers.permutation(numpy.linspace(-1, 1, g.num_layers))
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    rates_by_factor: dict[float, Rates] = {}

    def gate(
        prefix: str, density: Callable[[int], float], gate_tensors: dict[str, torch.Tensor], **fields: Any
    ) -> GateSpec:
        if dtype == "int8":
            gate_tensors = quantize(gate_tensors, 8)
        for name, tensor in gate_tensors.items():
            tensors[prefix + name] = (
                tensor.half() if dtype == "float16" and name in ("down", "up", "weight") else tensor
            ).cpu()
        return GateSpec(
            state="sparse",
            dtype=dtype,
            density={"mean": density(1), "upper": density(1)},
            union_density={str(b): {"mean": density(b), "upper": density(b)} for b in (1, 8, 32, 64)},
            **fields,
        )

    for layer, factor in enumerate(factors):
        mlp = attention = GateSpec(state="dense")
        if profile[1] < 1:
            factor = round(float(factor), 6)
            if factor not in rates_by_factor:
                rates_by_factor[factor] = fit_rates({b: min(0.98, d * factor) for b, d in profile.items()})
            rates = rates_by_factor[factor]
            p = torch.from_numpy(rates.draw(g.ffn_dim, numbers))
            down = torch.linalg.qr(torch.randn(g.hidden_size, rank, generator=generator, device=device))[
                0
            ].t()
            up = _unit_rows(g.ffn_dim, rank, generator, device)
            parts = {
                "down": down,
                "up": up,
                "bias": torch.special.ndtri(p).float().to(device),
                "activation_rate": p.float(),
            }
            mlp = gate(
                f"layers.{layer}.mlp.",
                rates.union,
                parts,
                form="low_rank",
                lookahead=recipe.mlp_lookahead,
                rank=rank,
            )
        if head_density < 1:
            lookahead = "self" if layer == 0 else "previous"
            parts = {
                "weight": _unit_rows(g.num_heads, g.hidden_size, generator, device) / INPUT_STD[lookahead],
                "bias": torch.full((g.num_heads,), NORMAL.inv_cdf(head_density), device=device),
                "activation_rate": torch.full((g.num_heads,), head_density),
            }
            union = lambda b: 1 - (1 - head_density) ** b  # noqa: E731
            attention = gate(
                f"layers.{layer}.attention.", union, parts, form="linear", lookahead=lookahead, threshold=0.0
            )
        layers.append({"mlp": mlp, "attention": attention})
    model = ModelSpec(
        name=f"synthetic {recipe.name}",
        architecture=hf_config(g)["architectures"][0],
        num_layers=g.num_layers,
        hidden_size=g.hidden_size,
        ffn_dim=g.ffn_dim,
        num_heads=g.num_heads,
        num_kv_heads=g.num_kv_heads,
        head_size=g.head_size,
        activation=g.activation,
        gated=False,
        layer_norm="pre",
        fingerprint="sha256:synthetic",
    )
    record = {
        "synthetic": True,
        "profile": {str(b): d for b, d in profile.items()},
        "head_density": head_density,
        "seed": seed,
        "spread": recipe.spread,
    }
    artifact.save(directory, Manifest(model, tuple(layers), calibration=record), tensors, overwrite=True)
    return Path(directory)


def _shift(bias: torch.Tensor, density: float) -> float:
    """s with mean(Phi(bias + s)) = density, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(torch.special.ndtr(bias + middle).mean()) < density:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _score_std(gate: Any) -> torch.Tensor | float:
    """[units] or one number: standard deviation of a gate's scores before the bias. 1 as drawn; integers
    bring steps of their own.
    """
    if gate.spec.dtype != "int8":
        return 1.0
    p = gate.predictor
    if gate.block == "attention":
        return INPUT_STD[gate.spec.lookahead] * p.weight.float().norm(dim=1)
    return (p.up.float() * p.down.float().norm(dim=1)).norm(dim=1)


@torch.inference_mode()
def calibrate(model: torch.nn.Module, layers: list[dict[str, Any]], tolerance: float = 0.1) -> float:
    """Shift the biases of gates whose counted density per token misses the artifact's, in place.

    Args:
        model: ours, with `gates`. layers: of `metrics.summarize`, counted since the last change.

    Returns:
        The largest relative miss before the shift, of those that chance does not explain.
    """
    worst = 0.0
    for gate in model.gates:
        counted, target = layers[gate.layer][gate.block]["density"], gate.spec.density["mean"]
        if counted is None:
            continue
        samples = layers[gate.layer][gate.block]["rows"] * gate.units
        noise = 3 * math.sqrt(target * (1 - target) / samples) / target
        miss = abs(counted / target - 1)
        if miss <= noise:
            continue
        worst = max(worst, miss)
        if miss > tolerance:
            bias, std = gate.predictor.bias, _score_std(gate)
            scores = (bias / std).double().cpu()
            unit = 1 / gate.units
            bias.add_(
                std * (_shift(scores, target) - _shift(scores, min(1 - unit, max(unit / 100, counted))))
            )
    return worst


def dense_projections(kernels: Any) -> Any:
    """An ablation: these kernels, but Q and out_proj read every head's weights; attention stays selective.

    Head selections are not counted then: the projection that counts them is told that all heads are selected.
    """
    ones: dict[Any, Any] = {}

    def everything(head_scores: Any) -> Any:
        # made in the warm-up, in front of graph capture, and kept: no launch in a step
        key = (tuple(head_scores.shape), head_scores.device)
        if key not in ones:
            ones[key] = head_scores.new_ones(head_scores.shape)
        return ones[key]

    class DenseProjections(type(kernels)):
        def sparse_qkv(self, x: Any, qkv: Any, head_scores: Any, head_size: int, call: Any) -> Any:
            uncounted = call._replace(counters=None)
            return super().sparse_qkv(x, qkv, everything(head_scores), head_size, uncounted)

        def sparse_out_proj(self, attn: Any, out: Any, head_scores: Any, output: Any = None) -> Any:
            return super().sparse_out_proj(attn, out, everything(head_scores), output)

    return DenseProjections()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a synthetic model (config only) and its predictor artifact."
    )
    parser.add_argument("--geometry", choices=ENGINE_GEOMETRIES, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--predictor-dtype", choices=PREDICTOR_DTYPES, default="float16")
    parser.add_argument("--mlp-density", type=float, help="of one token (not given: the geometry's preset)")
    parser.add_argument("--head-density", type=float)
    parser.add_argument("--mlp-lookahead", default="self")
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    g = geometry(args.geometry)
    profile, heads, source = target(args.geometry, args.mlp_density, args.head_density)
    directory, name = write_model(args.output, g), geometry_name(args.geometry)
    recipe = Recipe(
        name=name,
        rank=args.rank,
        dtype=args.predictor_dtype,
        mlp_lookahead=args.mlp_lookahead,
        spread=args.spread,
        seed=args.seed,
    )
    write_artifact(directory / "dejavu", g, profile, heads, recipe)
    print(f"{directory}: {name}, synthetic; MLP {profile}, heads {heads} ({source})")


if __name__ == "__main__":
    main()
