"""How sparse a model is by itself, without predictors: what text activates, what a batch of tokens needs
together, how few neurons hold the energy, how few heads contribute. Counted in Transformers, for any model
whose MLPs leave neurons at exactly 0, served here or not.

What follows is *modelled*, from bytes alone: what a decode step would read if fc2 skipped those zeros (mode
`exact`), and if predictors named all of them in front of fc1; and on a GPU that is named, times by the model
of `roofline`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_dejavu.families import FAMILIES, Geometry, geometry_of
from vllm_dejavu.markdown import table
from vllm_dejavu.predictor_training import data
from vllm_dejavu.predictor_training.report import say
from vllm_dejavu.published import DEVICES
from vllm_dejavu.roofline import Workload, account
from vllm_dejavu.selection import head_contributions, head_grams
from vllm_dejavu.sizes import WEIGHT_BYTES, default_rank

BATCHES = (1, 2, 4, 8, 16, 32, 64)
ENERGIES = (0.9, 0.99, 0.999)
BITS = (16, 8, 4)
# Where an MLP's activations enter the last projection, and heads the projection behind them; the first that a
# layer has.
DOWN = ("mlp.down_proj", "fc2", "mlp.fc2", "mlp.c_proj", "mlp.dense_4h_to_h", "feed_forward.w2")
OUT = ("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attention.dense")
GATES = ("mlp.gate_proj", "feed_forward.w1")
# Tokens whose activations are kept, to draw batches of; and those of which neurons are sorted by energy.
KEPT_ROWS, SORTED_ROWS = 512, 64
DRAWS = 200  # batches of each size


@dataclass(frozen=True)
class ProbeConfig:
    """The command's options.

    Attributes:
        model: directory or hub id. data: text; none: the model writes its own. tokens: of it.
        gpu: one of published.DEVICES, to model times on it; None: bytes alone.
    """

    model: str
    data: tuple[str, ...] = ()
    field: str = "text"
    tokens: int = 8_192
    seq_len: int = 512
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    gpu: str | None = None

    def __post_init__(self) -> None:
        if self.gpu is not None and self.gpu.lower() not in DEVICES:
            raise ValueError(f"--gpu {self.gpu!r} is unknown: expected one of {', '.join(DEVICES)}.")
        for name, low in (("tokens", 64), ("seq_len", 16)):
            if getattr(self, name) < low:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is too few: at least {low}."
                )


class Modules(NamedTuple):
    """Of a decoder: its layers, and paths below each of them; out: None where heads are not told apart."""

    layers: Sequence[nn.Module]
    down: str
    out: str | None
    gated: bool


class Sizes(NamedTuple):
    """What bytes are counted by; matrices: of an MLP, 3 with a gate."""

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    matrices: int


@dataclass
class Layer:
    """What was counted of one layer.

    Attributes:
        tokens: seen. positive: [ffn] tokens in which a neuron was not 0. rows: masks of some tokens,
            [_, ffn]. energy: of ENERGIES, share of neurons that hold it, by token. heads: likewise of heads.
    """

    tokens: int = 0
    positive: torch.Tensor | int = 0
    rows: list[torch.Tensor] = field(default_factory=list)
    energy: list[torch.Tensor] = field(default_factory=list)
    heads: list[torch.Tensor] = field(default_factory=list)


def find_modules(model: nn.Module, architecture: str) -> Modules:
    """The decoder layers of a transformers model.

    Raises:
        ValueError: none whose MLP is told apart.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    for layers in sorted(lists, key=len, reverse=True):
        down = next((path for path in DOWN if all(_has(layer, path) for layer in layers)), None)
        if down is not None:
            out = next((path for path in OUT if all(_has(layer, path) for layer in layers)), None)
            return Modules(list(layers), down, out, any(_has(layers[0], path) for path in GATES))
    raise ValueError(
        f"{architecture}: no decoder layers with an MLP of one of the shapes {list(DOWN)} were found."
        " Mixtures of experts and other MLPs cannot be probed yet."
    )


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return isinstance(module, nn.Module)


def sizes_of(config: Any, modules: Modules) -> Sizes:
    weight = modules.layers[0].get_submodule(modules.down).weight
    hidden, ffn = (
        weight.shape
        if isinstance(modules.layers[0].get_submodule(modules.down), nn.Linear)
        else (
            weight.shape[1],
            weight.shape[0],
        )
    )
    heads = config.num_attention_heads
    return Sizes(
        num_layers=len(modules.layers),
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        matrices=3 if modules.gated else 2,
    )


def shares_that_hold(amounts: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """[rows, units] of what units add -> [rows, len(shares)]: share of units, largest first, that hold each
    share of a row's sum.
    """
    ordered = amounts.sort(dim=1, descending=True).values
    held = ordered.cumsum(1) / ordered.sum(1, keepdim=True).clamp_min(1e-30)
    wanted = torch.tensor(shares, device=amounts.device, dtype=held.dtype)
    return (held[:, :, None] < wanted).sum(1).add(1).clamp_max(amounts.shape[1]) / amounts.shape[1]


class _Watch:
    """Hooks on every layer; `layers` fills while the model runs."""

    def __init__(self, modules: Modules, sizes: Sizes, windows: int):
        self.modules, self.sizes = modules, sizes
        self.layers = [Layer() for _ in modules.layers]
        self.kept, self.sorted = (max(1, -(-count // windows)) for count in (KEPT_ROWS, SORTED_ROWS))
        self.grams: dict[int, torch.Tensor] = {}

    def __enter__(self) -> _Watch:
        self.hooks = []
        for i, layer in enumerate(self.modules.layers):
            down = layer.get_submodule(self.modules.down)
            self.hooks.append(down.register_forward_pre_hook(self._mlp(i, down)))
            if self.modules.out is not None and isinstance(layer.get_submodule(self.modules.out), nn.Linear):
                out = layer.get_submodule(self.modules.out)
                if out.in_features == self.sizes.heads * self.sizes.head_size:
                    self.hooks.append(out.register_forward_pre_hook(self._heads(i, out)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _mlp(self, index: int, down: nn.Module) -> Any:
        norms = down.weight.float().norm(dim=0 if isinstance(down, nn.Linear) else 1)

        def hook(module: nn.Module, args: tuple) -> None:
            h, seen = args[0].reshape(-1, args[0].shape[-1]), self.layers[index]
            alive = h != 0
            seen.tokens += len(h)
            seen.positive = seen.positive + alive.sum(0).cpu()
            rows = torch.linspace(1, len(h) - 1, self.kept).long()  # not BOS
            seen.rows.append(alive[rows].cpu())
            some = rows[:: max(1, len(rows) // self.sorted)]
            energy = (h[some].float() * norms).square()
            seen.energy.append(shares_that_hold(energy, ENERGIES).cpu())

        return hook

    def _heads(self, index: int, out: nn.Linear) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            if index not in self.grams:
                self.grams[index] = head_grams(out.weight.detach().float(), self.sizes.heads)
            attn = args[0].reshape(-1, self.sizes.heads, self.sizes.head_size)
            rows = torch.linspace(1, len(attn) - 1, self.sorted).long()
            norms = head_contributions(attn[rows], self.grams[index])
            self.layers[index].heads.append(shares_that_hold(norms.square(), ENERGIES).cpu())

        return hook


def _unions(rows: torch.Tensor, seed: int) -> dict[int, float]:
    """Share of neurons that any of B tokens needs, drawn from all of the text, by B."""
    generator = torch.Generator().manual_seed(seed)
    picks = {b: torch.randint(len(rows), (DRAWS, b), generator=generator) for b in BATCHES}
    return {b: float(torch.stack([rows[p].any(0).float().mean() for p in picks[b]]).mean()) for b in BATCHES}


def _texts(config: ProbeConfig, model: nn.Module, bos: int, seq_len: int) -> torch.Tensor:
    if config.data:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        texts = [t for source in config.data for t in data.read_documents(source, config.field)]
        documents = data.tokenize(texts, tokenizer)
    else:
        say("no --data: the model writes its own text, which is more regular than what people write")
        documents = data.sample_from_model(model, config.tokens, seq_len, bos, config.seed)
    return data.pack(documents, seq_len, bos, max_tokens=config.tokens, seed=config.seed).tokens


def run(config: ProbeConfig) -> dict[str, Any]:
    """Everything that `report` prints, as JSON values: `measured`, and what is `modelled` from it.

    Raises:
        ValueError: a model that cannot be probed, or whose activations are never exactly 0.
    """
    if not Path(config.model).is_dir() and (
        config.model.startswith((".", "/", "~")) or config.model.count("/") > 1
    ):
        raise ValueError(f"Model {config.model}: no such directory, and not a hub id (ORG/NAME).")
    dtype = getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype).to(config.device).eval()
    architecture = (model.config.architectures or [type(model).__name__])[0]
    modules = find_modules(model, architecture)
    served = architecture in {family.architecture for family in FAMILIES}
    if config.gpu is not None and not served:
        raise ValueError(
            "--gpu models a decode step of architectures that are served"
            f" ({', '.join(family.architecture for family in FAMILIES)}), this model is a {architecture}:"
            " leave it out, bytes are counted anyway."
        )
    sizes = sizes_of(model.config, modules)
    positions = getattr(model.config, "max_position_embeddings", None) or config.seq_len
    bos = model.config.bos_token_id
    bos = model.config.eos_token_id if bos is None else bos
    tokens = _texts(config, model, bos, min(config.seq_len, positions))
    with _Watch(modules, sizes, len(tokens)) as watch, torch.inference_mode():
        for window in tokens:
            model.base_model(input_ids=window[None].to(config.device), use_cache=False)
    layers = [_counted(layer, config.seed) for layer in watch.layers]
    measured = {
        "tokens": tokens.numel(),
        "text": list(config.data) or ["self"],
        "layers": layers,
        "density": _mean(layer["density"] for layer in layers),
        "union": {b: _mean(layer["union"][b] for layer in layers) for b in BATCHES},
    }
    if measured["density"] > 0.999:
        activation = getattr(model.config, "hidden_act", None) or getattr(
            model.config, "activation_function", "its activation"
        )
        raise ValueError(
            f"{architecture} with {activation!r}: {100 * measured['density']:.1f}% of all neurons are not 0"
            " for a token, so there is nothing to skip exactly. ReLU and its square leave zeros, SiLU and"
            " GELU none."
        )
    return {
        "model": config.model,
        "architecture": architecture,
        "served": served,
        "sizes": sizes._asdict(),
        "measured": measured,
        "modelled": modelled(sizes, measured["union"]),
        "modelled_on": None
        if config.gpu is None
        else modelled_on(geometry_of(model.config), config.gpu.lower(), measured["union"]),
    }


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _counted(layer: Layer, seed: int) -> dict[str, Any]:
    rate = layer.positive / layer.tokens
    held = torch.cat(layer.energy).mean(0).tolist()
    heads = torch.cat(layer.heads).mean(0).tolist() if layer.heads else None
    return {
        "density": float(rate.mean()),
        "never": float((rate == 0).float().mean()),
        "union": _unions(torch.cat(layer.rows), seed),
        "energy": dict(zip(map(str, ENERGIES), held, strict=True)),
        "heads": None if heads is None else dict(zip(map(str, ENERGIES), heads, strict=True)),
    }


def modelled(sizes: Sizes, union: dict[int, float]) -> list[dict[str, Any]]:
    """Bytes of weights that a decode step reads, by batch and bits, over stock's in as many bits: with mode
    exact, and with predictors that name exactly what is not 0 (8-bit, of the rank that `train` would give
    them). The LM head has the layers' bits on both sides; the cache is left out.
    """
    matrix = sizes.hidden * sizes.ffn
    attention = 2 * sizes.hidden * sizes.head_size * (sizes.heads + sizes.kv_heads)
    rank = default_rank(sizes.hidden, sizes.ffn, 1)
    predictors = sizes.num_layers * rank * (sizes.hidden + sizes.ffn)  # a byte each
    rows = []
    for batch in BATCHES:
        for bits in BITS:
            weight = bits / 16 * WEIGHT_BYTES

            def step(mlp: float, more: float = 0, weight: float = weight) -> float:
                elements = sizes.num_layers * (attention + mlp * matrix) + sizes.vocab * sizes.hidden
                return elements * weight + more

            stock = step(sizes.matrices)
            exact = step(sizes.matrices - 1 + union[batch])
            predicted = step(sizes.matrices * union[batch], predictors)
            rows.append(
                {
                    "batch": batch,
                    "bits": bits,
                    "stock_mb": stock / 1e6,
                    "exact_mb": exact / 1e6,
                    "exact_speedup": stock / exact,
                    "predictors_mb": predicted / 1e6,
                    "predictors_speedup": stock / predicted,
                }
            )
    return rows


def modelled_on(geometry: Geometry, gpu: str, union: dict[int, float]) -> dict[str, Any]:
    """Milliseconds of a decode step on a GPU, by batch and bits, at the context that `Workload` takes: stock
    in 16 bits and in as many; mode exact; predictors that name exactly what is not 0, of 16 bits a value, as
    `plan` has them. Attention is not gated.
    """
    device, rows = DEVICES[gpu], []
    for batch in BATCHES:
        work = Workload(batch=batch, mlp_density=union[batch], head_density=1.0)
        sixteen = account(geometry, device, work).dense_step_us
        for bits in BITS:
            found = account(geometry, device, replace(work, dense_weight_bits=bits, sparse_weight_bits=bits))
            down = found.parts["fc2"]
            spared = device.read_us(down.dense_bytes) - device.read_us(down.sparse_bytes)
            rows.append(
                {
                    "batch": batch,
                    "bits": bits,
                    "stock_16_ms": sixteen / 1e3,
                    "stock_ms": found.dense_step_us / 1e3,
                    "exact_ms": (found.dense_step_us - geometry.num_layers * spared) / 1e3,
                    "predictors_ms": found.sparse_step_us / 1e3,
                }
            )
    return {"device": device.name, "context": work.context, "rows": rows}


def report(result: dict[str, Any]) -> str:
    """The tables, in Markdown: what was measured, then, apart, what is modelled."""
    measured, sizes = result["measured"], result["sizes"]
    served = "served with --model-impl dejavu" if result["served"] else "not served by vllm-dejavu"
    lines = [
        f"# {result['model']}: {result['architecture']}, {served}",
        "",
        f"**Measured** on {measured['tokens']} tokens ({', '.join(measured['text'])}): share of neurons that"
        " are not 0, for a token and for any of a batch; share that never was; share of neurons that hold"
        " 90%, 99% and 99.9% of the squared activations times fc2's rows; share of heads that hold as much"
        " of what attention adds.",
        "",
    ]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}%"

    def held(values: dict[str, float] | None) -> str:
        return "-" if values is None else " / ".join(f"{100 * v:.1f}" for v in values.values()) + "%"

    header = ["layer", "token", *(f"of {b}" for b in BATCHES[1:]), "never", "energy", "heads"]
    rows = [
        [
            str(i),
            percent(layer["density"]),
            *(percent(layer["union"][b]) for b in BATCHES[1:]),
            percent(layer["never"]),
            held(layer["energy"]),
            held(layer["heads"]),
        ]
        for i, layer in enumerate(measured["layers"])
    ]
    mean = ["mean", percent(measured["density"]), *(percent(measured["union"][b]) for b in BATCHES[1:])]
    lines += table(header, [*rows, [*mean, "", "", ""]])
    lines += [
        "",
        f"**Modelled**, from bytes of weights alone ({sizes['num_layers']} layers of {sizes['hidden']} x"
        f" {sizes['ffn']}; no launches, no cache, no arithmetic): a step of stock's over one of ours in as"
        " many bits, with mode `exact`, and with predictors that would name just what is not 0. An upper"
        " bound.",
        "",
    ]
    shown = [row for row in result["modelled"] if row["batch"] in (1, 8, 64)]
    lines += table(
        ["batch", "bits", "stock MB", "exact MB", "exact", "predictors MB", "predictors"],
        [
            [
                str(row["batch"]),
                str(row["bits"]),
                f"{row['stock_mb']:.1f}",
                f"{row['exact_mb']:.1f}",
                f"{row['exact_speedup']:.2f}x",
                f"{row['predictors_mb']:.1f}",
                f"{row['predictors_speedup']:.2f}x",
            ]
            for row in shown
        ],
    )
    if (on := result["modelled_on"]) is not None:
        lines += [
            "",
            f"**Modelled** on {on['device']}, a step in ms at {on['context']} tokens of context, bytes and"
            " launches as `vllm-dejavu plan` has them (nothing of it was run; INT8 and INT4 are not served"
            " there yet):",
            "",
        ]
        names = ("stock_16_ms", "stock_ms", "exact_ms", "predictors_ms")
        lines += table(
            ["batch", "bits", "stock, 16 bits", "stock", "exact", "predictors"],
            [
                [str(row["batch"]), str(row["bits"]), *(f"{row[name]:.3f}" for name in names)]
                for row in on["rows"]
                if row["batch"] in (1, 8, 64)
            ],
        )
    return "\n".join(lines)


def save(result: dict[str, Any], directory: Path) -> list[Path]:
    """probe.json, probe.md and, with matplotlib, probe.png."""
    directory.mkdir(parents=True, exist_ok=True)
    made = [directory / "probe.json", directory / "probe.md"]
    made[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    made[1].write_text(report(result) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        say("the picture is left out: matplotlib is not installed (pip install 'vllm-dejavu[train]')")
        return made
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = result["measured"]["layers"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for batch in (1, 8, 64):
        axes[0].plot([layer["union"][batch] for layer in layers], "o-", label=f"{batch} tokens")
    axes[0].set(title="neurons that are not 0", xlabel="layer", ylabel="share", ylim=(0, 1.02))
    for axis, what, title in ((axes[1], "energy", "neurons"), (axes[2], "heads", "heads")):
        for share in map(str, ENERGIES):
            values = [layer[what][share] for layer in layers if layer[what] is not None]
            axis.plot(values, "o-", label=f"{100 * float(share):g}%")
        axis.set(title=f"{title} that hold so much", xlabel="layer")
    for axis in axes:
        axis.legend(fontsize=8)
    figure.suptitle(f"{result['model']}, measured on {result['measured']['tokens']} tokens", fontsize=9)
    figure.tight_layout()
    made.append(directory / "probe.png")
    figure.savefig(made[-1], dpi=120)
    plt.close(figure)
    return made
