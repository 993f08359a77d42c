"""What the parts of the existence study share: a model, its text, a walk through its layers, the report."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import torch
from common import Table

from vllm_dejavu import artifact
from vllm_dejavu.manifest import check_fingerprint, check_model
from vllm_dejavu.markdown import table
from vllm_dejavu.predictor_training import data
from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates, Resumable


@dataclass
class Seen:
    """What a batch did in one layer; T tokens, flattened.

    Attributes:
        tokens: [T]. inputs: name (INPUTS of existence_predictability without `embedding`) -> [T, hidden];
            `previous` is missing in layer 0.
        attn: [T, heads, head_size], before out_proj. z: [T, ffn], pre-activations.
        before, middle, after: residual stream in front of the layer, between its blocks, behind it (post-LN:
            after the LayerNorms).
        attn_update, mlp_update: what the blocks add. maps: [B, heads, L, L] attention, if the model runs in
            eager mode.
    """

    tokens: torch.Tensor
    inputs: dict[str, torch.Tensor]
    attn: torch.Tensor
    z: torch.Tensor
    before: torch.Tensor
    middle: torch.Tensor
    after: torch.Tensor
    attn_update: torch.Tensor
    mlp_update: torch.Tensor
    maps: torch.Tensor | None


def see(opt: HfModel, run: Resumable) -> tuple[Seen, Resumable]:
    """One layer, dense: what it did, and the batch behind it."""
    layer, caught = opt.layers[run.layer], {}

    def keep(name: str) -> Callable:
        def hook(module: Any, args: tuple, output: Any) -> None:
            caught[name] = output

        return hook

    def on_attention(index: int, states: LayerStates, attn: torch.Tensor) -> None:
        caught["attn"] = attn

    def on_mlp(index: int, states: LayerStates, z: torch.Tensor) -> None:
        caught["z"] = z
        caught["inputs"] = {
            name: x
            for name in ("previous", "attn_input", "mlp_input")
            if (x := states.named(name)) is not None
        }

    hooks = [
        layer.self_attn.out_proj.register_forward_hook(keep("attn_update")),
        layer.fc2.register_forward_hook(keep("mlp_update")),
        layer.self_attn.register_forward_hook(keep("self_attn")),
    ]
    try:
        following = opt.advance(run, on_attention, on_mlp)
    finally:
        for hook in hooks:
            hook.remove()
    before, after, attn_update, mlp_update = (
        x.reshape(-1, x.shape[-1])
        for x in (run.hidden, following.hidden, caught["attn_update"], caught["mlp_update"])
    )
    inputs = {"attn_output": attn_update, **caught["inputs"]}
    middle = before + attn_update if opt.geometry.norm == "pre" else inputs["mlp_input"]
    maps = caught["self_attn"][1]
    seen = Seen(
        run.tokens.flatten().to(opt.device),
        inputs,
        caught["attn"],
        caught["z"],
        before,
        middle,
        after,
        attn_update,
        mlp_update,
        maps,
    )
    return seen, following


class Walk:
    """Text on its way through the layers, all of it through one layer before the next: only one layer's
    states are held.
    """

    def __init__(self, opt: HfModel, tokens: torch.Tensor, batch: int):
        self.opt, self.runs = opt, [opt.start(part) for part in tokens.split(batch)]

    def layer(self) -> Iterator[Seen]:
        """The next layer, batch by batch; to be exhausted before the one after it."""
        for i, run in enumerate(self.runs):
            seen, self.runs[i] = see(self.opt, run)
            yield seen


class Study:
    """A model, its text, and where results go.

    Attributes:
        train, held_out: [windows, seq_len]; scored: the first windows of held_out.
        sections: part -> Markdown.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, Path(args.output)
        self.opt = HfModel(args.model, device=args.device)
        self.name = Path(args.model).name
        geometry = self.opt.geometry
        self.seq_len = min(args.seq_len or 2048, geometry.max_positions)
        self.units = {"neurons": geometry.ffn_dim, "heads": geometry.num_heads}
        self.train = self._windows(args.data, args.tokens, args.seed)
        self.held_out = self._windows(args.held_out, args.held_out_tokens, args.seed)
        self.scored = self.held_out[: max(1, args.scored_tokens // self.seq_len)]
        self.sections: dict[str, str] = {}

    def _windows(self, sources: list[str], max_tokens: int, seed: int) -> torch.Tensor:
        texts = [t for s in sources for t in data.read_documents(s, max_documents=self.args.max_documents)]
        return data.pack(
            data.tokenize(texts, self.opt.tokenizer()),
            self.seq_len,
            self.opt.bos,
            max_tokens=max_tokens,
            seed=seed,
        ).tokens

    def table(self, name: str) -> Table:
        return Table(self.output / f"existence_{name}.csv")

    def fc2_norms(self, layer: int) -> torch.Tensor:
        return self.opt.fc2_norms(layer)

    def grams(self, layer: int) -> torch.Tensor:
        return self.opt.head_grams(layer)

    def some_layers(self) -> list[int]:
        """At most `--layers`, evenly spaced, the first and the last among them."""
        count = len(self.opt.layers)
        wanted = min(count, self.args.layers)
        return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]

    def by_window(self, values: torch.Tensor) -> torch.Tensor:
        """[T, ...] in order of the text -> [windows, ...], sums."""
        return values.double().unflatten(0, (-1, self.seq_len)).sum(1).cpu()

    def write(self, part: str, title: str, *paragraphs: str) -> None:
        self.sections[part] = "\n\n".join([f"## {title}", *filter(None, paragraphs)])

    def figure(self, rows: int, columns: int, width: float = 4.2, height: float = 3.2) -> Any:
        """(figure, axes) of matplotlib, or None without it."""
        plt = figures.pyplot()
        return None if plt is None else figures.panels(plt, rows, columns, width, height)

    def save(self, figure: Any, part: str, title: str) -> str:
        """The PNG, and the line of Markdown that shows it."""
        path = self.output / f"existence_{part}.png"
        figures.save(figure, path, f"{self.name}: {title}", fontsize=10, dpi=120)
        return f"![{title}]({path.name})"


def cell(value: Any, error: Any = None) -> str:
    """Of a Markdown table."""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        digits = 4 if abs(value) < 10 else 1
        text = f"{value:.{digits}f}"
        return text if error is None or math.isnan(error) else f"{text} ± {error:.{digits}f}"
    return "" if value is None else str(value)


def markdown(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """columns: heading -> key of the rows; an error is looked up under the key with `_se`."""
    lines = [[cell(row.get(k), row.get(f"{k}_se")) for k in columns.values()] for row in rows]
    return "\n".join(table(list(columns), lines))


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    values = [r[key] for r in rows if isinstance(r.get(key), float) and not math.isnan(r[key])]
    return sum(values) / len(values) if values else math.nan


def span(rows: list[dict[str, Any]], key: str, digits: int = 3) -> str:
    values = [r[key] for r in rows]
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def trained_predictor(study: Study, part: str) -> artifact.Artifact | None:
    """The artifact made for these weights; says so where there is none."""
    directory = Path(study.args.predictor or Path(study.args.model) / "dejavu")
    if not directory.is_dir() and not study.args.predictor:
        print(
            f"{part}: no artifact at {directory}, so nothing about the trained predictor; name one with"
            " --predictor",
            flush=True,
        )
        return None
    loaded = artifact.load(directory)
    check_model(loaded.manifest, study.opt.spec)
    check_fingerprint(loaded.manifest, study.opt.spec.fingerprint, study.name)
    return loaded
