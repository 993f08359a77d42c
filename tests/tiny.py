"""Tiny random checkpoints, of OPT and Nemotron, and artifacts for them: what the engine tests run on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, NemotronConfig, NemotronForCausalLM, OPTConfig, OPTForCausalLM

from vllm_dejavu import artifact
from vllm_dejavu.artifact import DTYPES, WeightsFingerprint
from vllm_dejavu.manifest import TENSORS_FILE, GateSpec, Manifest, ModelSpec
from vllm_dejavu.predictor_training.gates import stored

VOCAB = 256


def make_opt(
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    layers: int = 3,
    hidden: int = 64,
    heads: int = 2,
    pre_ln: bool = True,
    tied: bool = True,
    embed_dim: int | None = None,
    bias: bool = True,
    positions: int = 128,
    vocab: int = VOCAB,
) -> Path:
    """Write a random OPT checkpoint whose activations are well spread (weights by 1/sqrt(fan-in))."""
    config = OPTConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        max_position_embeddings=positions,
        do_layer_norm_before=pre_ln,
        word_embed_proj_dim=embed_dim or hidden,
        tie_word_embeddings=tied,
        enable_bias=bias,
        activation_function="relu",
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    # transformers draws from the global generator, which is the caller's: whether a model is made or was made
    # must not change its numbers.
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.normal_(std=p.shape[1] ** -0.5)
            elif "embed" in name:
                p.normal_(std=0.7)
            elif "layer_norm.weight" in name:
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=0.3)
        # As many neurons are off as in a trained model: most fc1 biases are negative.
        for layer in model.model.decoder.layers:
            if bias:
                layer.fc1.bias.sub_(0.7)
    model = model.to(DTYPES[dtype])
    model.save_pretrained(directory)
    return Path(directory)


def make_nemotron(
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 32,
    tied: bool = False,
) -> Path:
    """The same of Nemotron; heads need not fill the hidden size, half of each is rotated."""
    config = NemotronConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        intermediate_size=5 * hidden,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        partial_rotary_factor=0.5,
        tie_word_embeddings=tied,
        hidden_act="relu2",
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = NemotronForCausalLM(config)
        for name, p in model.named_parameters():
            if "embed" in name or "lm_head" in name:
                p.normal_(std=0.7)
            elif p.ndim == 2:
                p.normal_(std=p.shape[1] ** -0.5)
            elif name.endswith("norm.weight"):  # to which 1 is added
                p.uniform_(-0.5, 0.5)
            else:  # the norms' biases, which shift what the MLP sees
                p.normal_(std=0.3)
    model.to(DTYPES[dtype]).save_pretrained(directory)
    return Path(directory)


def fingerprint_of(model_dir: Path) -> str:
    fp = WeightsFingerprint()
    for name, tensor in load_file(Path(model_dir) / "model.safetensors").items():
        fp.add(name, tensor)
    return fp.hexdigest()


def make_artifact(
    directory: Path,
    model_dir: Path,
    *,
    seed: int = 0,
    rank: int = 8,
    mlp: str | None = "self",
    attention: str | None = "self",
    select_all: bool = False,
    density: float = 0.5,
    dense_layers: tuple[int, ...] = (),
    fingerprint: str | None = None,
    union_density: dict | None = None,
    dtype: str = "float16",
) -> Path:
    """Random predictors with biases that select about `density` of the units, or all of them."""
    config = AutoConfig.from_pretrained(model_dir)
    model = ModelSpec.from_hf_config(config, "tiny", fingerprint or fingerprint_of(model_dir))
    g = torch.Generator().manual_seed(seed)
    quantile = 1e6 if select_all else float(torch.distributions.Normal(0, 1).icdf(torch.tensor(density)))
    tensors, layers = {}, []
    for i in range(model.num_layers):
        entry = {}
        for block, lookahead in (("mlp", mlp), ("attention", attention)):
            if lookahead is None or i in dense_layers:
                entry[block] = GateSpec(state="dense")
                continue
            lookahead = "self" if i == 0 and lookahead == "previous" else lookahead
            units = model.ffn_dim if block == "mlp" else model.num_heads
            d = 1.0 if select_all else density
            entry[block] = GateSpec(
                state="sparse",
                form="low_rank" if block == "mlp" else "linear",
                lookahead=lookahead,
                rank=rank if block == "mlp" else 0,
                dtype=dtype,
                density={"mean": d, "upper": d},
                union_density=union_density or {},
                threshold=0.5 if block == "attention" else None,
            )
            shapes = (
                {"down": (rank, model.hidden_size), "up": (units, rank)}
                if block == "mlp"
                else {"weight": (units, model.hidden_size)}
            )
            made = {
                n: (torch.randn(*shape, generator=g) * shape[1] ** -0.5).half() for n, shape in shapes.items()
            }
            made |= {
                "bias": torch.full((units,), quantile),
                "activation_rate": torch.rand(units, generator=g),
            }
            tensors |= {f"layers.{i}.{block}.{n}": t for n, t in stored(made, dtype).items()}
        layers.append(entry)
    artifact.save(directory, Manifest(model=model, layers=tuple(layers)), tensors)
    return Path(directory)


def rewrite_tensors(directory: Path, edit) -> None:
    """Damage an artifact's tensors in place: edit(dict) -> None."""
    path = Path(directory) / TENSORS_FILE
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
