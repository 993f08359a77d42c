"""`vllm-dejavu tune`: where sparse and dense take equally long, measured on this device and kept beside the
artifact.

What is measured is what a gated layer runs, over random weights of the model's shapes: prediction and sparse
kernels at several densities against the dense path of the same layer. Crossovers are by block and batch size;
which layers run dense at a batch size follows from each layer's calibrated union density.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_dejavu import __version__, artifact
from vllm_dejavu.artifact import Artifact
from vllm_dejavu.config import BLOCKS
from vllm_dejavu.kernels import reference
from vllm_dejavu.kernels.interface import Call, Linear, LowRank, Mlp, Rows, Selection, choose, implementation
from vllm_dejavu.manifest import ArtifactError, ModelSpec
from vllm_dejavu.quantization import Integers
from vllm_dejavu.timing import Timer, cpu_model, crossover

DIRECTORY = "tuned"  # in the artifact's
FORMAT_VERSION = 1
TOKENS = (1, 2, 4, 8, 16, 32, 64)
DENSITIES = (0.1, 0.25, 0.5, 0.75, 1.0)
ROTATED_BYTES = 256 << 20  # of weights, beyond any cache
MIN_LAYERS, MAX_LAYERS = 2, 32


@dataclass(frozen=True)
class Key:
    """What a measurement holds for.

    Attributes:
        device: name of the GPU or CPU. kernels: of `describe`. threads: that compute on a CPU, 0 on a GPU.
        dtype: of the model. weight_bits: of the layers' weights in memory. ffn, heads: of one
            tensor-parallel rank. rank: largest of the MLP predictors, 0 without one.
    """

    device: str
    kernels: str
    threads: int
    dtype: str
    hidden: int
    ffn: int
    heads: int
    rank: int
    predictor_dtype: str
    weight_bits: int = 16

    @classmethod
    def of(
        cls, loaded: Artifact, device: torch.device, dtype: torch.dtype, tp: int = 1, weight_bits: int = 16
    ) -> Key:
        """Of an artifact on a device of this machine, as this process would run it."""
        model, gates = (
            loaded.manifest.model,
            [gate for layer in loaded.manifest.layers for gate in layer.values() if gate.sparse],
        )
        cuda = device.type == "cuda"
        return cls(
            torch.cuda.get_device_name(device) if cuda else cpu_model(),
            implementation(device.type).describe(),
            0 if cuda else torch.get_num_threads(),
            str(dtype).removeprefix("torch."),
            model.hidden_size,
            model.ffn_dim // tp,
            model.num_heads // tp,
            max((gate.rank for gate in gates), default=0),
            gates[0].dtype if gates else "",
            weight_bits,
        )

    def file(self, directory: Path) -> Path:
        """Named so that a person finds it; everything is compared when it is read."""
        words = [
            self.device,
            f"{self.threads}-threads" if self.threads else "",
            self.dtype,
            f"int{self.weight_bits}" if self.weight_bits < 16 else "",
            f"ffn{self.ffn}",
        ]
        name = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
        return directory / DIRECTORY / f"{name}.json"


class Tuned(NamedTuple):
    """What was measured.

    Attributes:
        crossovers: {block: {tokens: union density}} from which on dense is faster.
        cache_crossover: keys that must be spared for reading only the selected heads' cache to pay; None: not
            measured (a GPU, or an older file).
    """

    crossovers: dict[str, dict[int, float]]
    cache_crossover: int | None = None


def load(directory: str | os.PathLike, key: Key) -> Tuned | None:
    """What was measured for this key, or None: never measured, or for something else.

    Raises:
        ArtifactError: there is a file for this device, but it is damaged.
    """
    path = key.file(Path(directory))
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        same = {"weight_bits": 16} | found["key"] == dataclasses.asdict(key)
        if found["format_version"] != FORMAT_VERSION or not same:
            return None
        crossovers = {
            block: {int(tokens): float(density) for tokens, density in found["crossovers"][block].items()}
            for block in BLOCKS
        }
        if not all(
            table and all(t > 0 and 0 <= d <= 1 for t, d in table.items()) for table in crossovers.values()
        ):
            raise ValueError("a density is outside of [0, 1], or none is there")
        cache = found.get("cache_crossover")
        if cache is not None and (type(cache) is not int or cache < 0):
            raise ValueError("cache_crossover is no number of keys")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ArtifactError(
            f"{path} is not what `vllm-dejavu tune` writes ({e!r}). Delete it, or tune again."
        ) from None
    return Tuned(crossovers, cache)


def save(directory: str | os.PathLike, key: Key, measured: dict[str, Any], versions: dict[str, str]) -> Path:
    """Write what `measure` gave; replaces an earlier measurement for the same device."""
    path = key.file(Path(directory))
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(
        {"format_version": FORMAT_VERSION, "key": dataclasses.asdict(key), **measured, "versions": versions},
        indent=1,
    )
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


class _Layers:
    """Random weights of some layers of one rank, a predictor, and what runs on them."""

    def __init__(self, key: Key, head_dim: int, device: torch.device, tokens: int):
        self.key, self.head_dim, self.device = key, head_dim, device
        self.impl = implementation(device.type)
        self.dtype = getattr(torch, key.dtype)
        width = key.heads * head_dim
        bits = min(key.weight_bits, 8 * self.dtype.itemsize)
        layer_bytes = (2 * key.hidden * key.ffn + 4 * key.hidden * width) * bits // 8
        self.number = max(MIN_LAYERS, min(MAX_LAYERS, -(-ROTATED_BYTES // layer_bytes)))

        def weights(
            outputs: int, inputs: int, bias: float | None = None, transposed: bool = False
        ) -> list[Rows]:
            added = None if bias is None else torch.full((outputs,), bias, dtype=self.dtype, device=device)
            made = []
            for _ in range(self.number):
                drawn, scales = torch.randn(outputs, inputs, device=device) * inputs**-0.5, []
                if key.weight_bits < 16:
                    drawn, *scales = Integers(key.weight_bits, transposed).rounded(drawn)
                if transposed and key.weight_bits > 4:
                    drawn = drawn.t()
                dtype = self.dtype if key.weight_bits == 16 else drawn.dtype
                weight = torch.empty(drawn.shape, dtype=dtype, device=device)
                self.impl.prepare_weight(weight)
                scale, each = [*scales, None, None][:2]
                made.append(Rows(weight.copy_(drawn), added, scale, transposed, each))
            return made

        # fc1's bias: every neuron comes out positive, so that all of a list is read
        self.fc1, self.fc2 = weights(key.ffn, key.hidden, 5.0), weights(key.hidden, key.ffn, transposed=True)
        self.qkv = weights(3 * width, key.hidden, 0.0)
        self.out = weights(key.hidden, width, transposed=key.weight_bits < 16)
        rank = -(-max(key.rank, 1) // 16) * 16
        self.down, self.up = self._predictor(rank, key.hidden), self._predictor(key.ffn, rank)
        self.head_weight = self._predictor(key.heads, key.hidden)
        self.bias, self.head_bias = torch.zeros(key.ffn, device=device), torch.zeros(key.heads, device=device)
        self.workspace = None
        if device.type == "cuda":
            from vllm_dejavu.kernels.workspace import Workspace

            self.workspace = Workspace.for_model(
                device, self.dtype, num_tokens=tokens, ffn=key.ffn, head_size=head_dim
            )

    def _predictor(self, rows: int, columns: int) -> torch.Tensor:
        if self.key.predictor_dtype == "int8":
            return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=self.device)
        return torch.randn(rows, columns, device=self.device).to(
            getattr(torch, self.key.predictor_dtype or "float16")
        )

    def mlp(
        self, tokens: int, densities: Sequence[float]
    ) -> tuple[dict[str, Callable[[int], Any]], dict[str, float]]:
        """What runs by name, and the densities that lists of that name really have."""
        impl, x, lens = self.impl, self._inputs(tokens, self.key.hidden), self._lens(tokens)
        call = Call(lens, None, self.workspace)
        mlps = [Mlp(up, down) for up, down in zip(self.fc1, self.fc2, strict=True)]
        runs: dict[str, Callable[[int], Any]] = {"dense": lambda i: impl.sparse_mlp(x, mlps[i])}
        real = {}
        for density in densities:
            drawn = reference.compact_union(torch.rand(1, self.key.ffn) < density)
            chosen = Selection(drawn.ids.to(self.device), drawn.counts.to(self.device))

            def sparse(i: int, chosen: Selection = chosen) -> None:
                impl.select_neurons(x, LowRank(self.down, self.up, self.bias), call)
                impl.sparse_mlp(x, mlps[i], chosen, call)

            runs[f"{density}"], real[f"{density}"] = sparse, int(chosen.counts.sum()) / self.key.ffn
        return runs, real

    def attention(
        self, tokens: int, densities: Sequence[float]
    ) -> tuple[dict[str, Callable[[int], Any]], dict[str, float]]:
        """The projections alone: how much of the cache is read depends on the context, and less is read where
        less is selected.
        """
        impl, heads, x, lens = (
            self.impl,
            self.key.heads,
            self._inputs(tokens, self.key.hidden),
            self._lens(tokens),
        )
        call = Call(lens, None, self.workspace)
        qkvs, outs = self.qkv, self.out
        attn = self._inputs(tokens, heads * self.head_dim).view(tokens, heads, self.head_dim)
        output = torch.empty(tokens, self.key.hidden, dtype=self.dtype, device=self.device)

        def dense(i: int) -> None:
            impl.linear(x, qkvs[i])
            impl.linear(attn.flatten(1), outs[i], output)

        runs: dict[str, Callable[[int], Any]] = {"dense": dense}
        real = {}
        for number in sorted({max(1, round(density * heads)) for density in densities}):
            scores = (
                torch.where(torch.rand(heads, device=self.device).argsort().argsort() < number, 1.0, -1.0)
                .expand(tokens, heads)
                .contiguous()
            )

            def sparse(i: int, scores: torch.Tensor = scores) -> None:
                impl.score_heads(x, Linear(self.head_weight, self.head_bias), call)
                impl.sparse_qkv(x, qkvs[i], scores, self.head_dim, call)
                # Without a paged kernel of ours, heads that only other rows selected are computed and
                # dropped.
                selected = impl.mask_heads(attn, scores) if self.device.type == "cpu" else attn
                impl.sparse_out_proj(selected, outs[i], scores, output)

            runs[f"{number}"], real[f"{number}"] = sparse, number / heads
        return runs, real

    def _inputs(self, tokens: int, columns: int) -> torch.Tensor:
        return torch.randn(tokens, columns, device=self.device).to(self.dtype)

    def _lens(self, tokens: int) -> torch.Tensor:
        return torch.ones(tokens, dtype=torch.int32, device=self.device)


@torch.inference_mode()
def measure(
    key: Key,
    model: ModelSpec,
    device: torch.device,
    *,
    tokens: Sequence[int] = TOKENS,
    densities: Sequence[float] = DENSITIES,
    rounds: int = 15,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time every batch size of both blocks.

    Returns:
        crossovers: {block: {tokens: union density}}; of neighbouring batch sizes the lowest counts, since a
            layer that runs sparse for nothing loses more than one that runs dense for nothing. measured:
            {block: {tokens: {"dense_us", "sparse_us": {density: us}, "crossover"}}}, medians. On a CPU also
            what `tune_cache.measure` gives.
    """
    torch.manual_seed(0)
    layers = _Layers(key, model.head_size, device, max(tokens))
    timer = Timer(device, rounds)
    measured: dict[str, dict[int, dict[str, Any]]] = {block: {} for block in BLOCKS}
    for block in BLOCKS:
        for size in sorted(tokens):
            runs, real = getattr(layers, block)(size, densities)
            times = {name: statistics.median(values) for name, values in timer(runs, layers.number).items()}
            sparse = {real[name]: times[name] for name in real}
            at = crossover(times["dense"], list(sparse.items()))
            measured[block][size] = {
                "dense_us": times["dense"],
                "sparse_us": {f"{d:.4g}": us for d, us in sparse.items()},
                "crossover": at,
            }
            progress(
                f"{block:9} {size:3} tokens: dense {times['dense']:8.1f} us, as fast at density {at:.2f}"
            )
    cache = {}
    if device.type == "cpu":
        from vllm_dejavu import tune_cache  # which needs vLLM's operators

        kv_heads = max(1, model.num_kv_heads * key.heads // model.num_heads)
        shape = key.heads, kv_heads, model.head_size, getattr(torch, key.dtype)
        cache = tune_cache.measure(*shape, timer, progress) or {}
    return {
        "crossovers": {
            block: _cautious({size: row["crossover"] for size, row in rows.items()})
            for block, rows in measured.items()
        },
        "measured": measured,
        **cache,
    }


def _cautious(crossovers: dict[int, float]) -> dict[int, float]:
    sizes = sorted(crossovers)
    return {
        size: round(min(crossovers[s] for s in sizes[max(0, i - 1) : i + 2]), 3)
        for i, size in enumerate(sizes)
    }


def run(
    directory: str,
    *,
    device: str,
    dtype: str,
    tp: int,
    weight_bits: int,
    tokens: Sequence[int],
    rounds: int,
    progress: Callable[[str], None],
) -> Path:
    """Measure for an artifact and keep the result beside it.

    Raises:
        ValueError: a tensor-parallel size that does not divide the model; weights for which there are no
            kernels.
    """
    loaded, place = artifact.load(directory), torch.device(device)
    model = loaded.manifest.model
    if model.ffn_dim % tp or model.num_heads % tp:
        raise ValueError(f"--tp {tp} does not divide {model.num_heads} heads and {model.ffn_dim} neurons")
    choose(place.type, model.activation, weight_bits)  # which refuses weights that it has no kernels for
    key = Key.of(loaded, place, getattr(torch, dtype), tp, weight_bits)
    bits = f", weights in {weight_bits} bits" if weight_bits < 16 else ""
    threads = f", {key.threads} threads" if key.threads else ""
    progress(f"{key.device}, {key.kernels}, {key.dtype}{bits}{threads}")
    measured = measure(key, model, place, tokens=tokens, rounds=rounds, progress=progress)
    return save(directory, key, measured, {"vllm-dejavu": __version__, "torch": torch.__version__})
