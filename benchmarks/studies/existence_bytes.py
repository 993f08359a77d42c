"""The existence study's part `bytes`: weight bytes a token at the oracle's densities, by two accounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import number, read_rows
from existence_study import Study, markdown, trained_predictor

from vllm_dejavu.predictor_training.hf_model import HfModel


@dataclass(frozen=True)
class Weights:
    """Element counts of a model. layer: of a decoder layer; fixed: of it, read whatever is selected (norms,
    biases of out_proj and fc2).
    """

    hidden: int
    ffn: int
    layers: int
    bias: bool
    norms: int  # of a layer
    # read for every token besides the layers: LM head, projections, last norm, a row of each embedding
    outside: int
    stored: int

    @classmethod
    def of(cls, opt: HfModel) -> Weights:
        c, decoder, stored = (
            opt.config,
            opt.model.model.decoder,
            sum(p.numel() for p in opt.model.parameters()),
        )
        norms = 4 * c.hidden_size if c.layer_norm_elementwise_affine else 0
        modules = (decoder.final_layer_norm, decoder.project_in, decoder.project_out)
        others = sum(p.numel() for m in modules if m is not None for p in m.parameters())
        outside = opt.model.lm_head.weight.numel() + others + c.word_embed_proj_dim + c.hidden_size
        return cls(c.hidden_size, c.ffn_dim, c.num_hidden_layers, bool(c.enable_bias), norms, outside, stored)

    def layers_read(self, rows: float, columns: float, heads: float) -> float:
        """Elements of all layers that we read for a token: K and V whole, Q and out_proj of selected heads,
        rows of fc1, columns of fc2.
        """
        h, f, b = self.hidden, self.ffn, int(self.bias)
        attention = (2 + heads) * (h * h + b * h) + heads * h * h + b * h
        return self.layers * (attention + rows * (h * f + b * f) + columns * h * f + b * h + self.norms)

    def paper(self, neurons: float, heads: float) -> float:
        """Share of the layers' matrices by the paper's account: all four projections of a head that is not
        selected are skipped.
        """
        attention, mlp = 4 * self.hidden**2, 2 * self.hidden * self.ffn
        return (heads * attention + neurons * mlp) / (attention + mlp)


def bytes_row(
    weights: Weights,
    point: str,
    neurons: float,
    heads: float,
    columns: float | None = None,
    predictor: float = 0.0,
) -> dict[str, Any]:
    """Shares of bytes read at batch 1. predictor: its weights, in elements of the model's dtype; `columns`:
    of fc2, if not as many as fc1's rows.
    """
    dense = weights.layers_read(1, 1, 1)
    read = weights.layers_read(neurons, neurons if columns is None else columns, heads) + predictor
    paper = weights.paper(neurons, heads)
    return {
        "point": point,
        "neurons": neurons,
        "heads": heads,
        "layers_read": read / dense,
        "layers_fewer": dense / read,
        "paper_read": paper,
        "paper_fewer": 1 / paper,
        "model_read": (read + weights.outside) / weights.stored,
        "model_fewer": (dense + weights.outside) / (read + weights.outside),
    }


def artifact_row(study: Study, weights: Weights) -> dict[str, Any] | None:
    """The calibrated artifact's densities, with its predictors' bytes; None without one."""
    loaded = trained_predictor(study, "bytes")
    if loaded is None:
        return None
    count = len(loaded.manifest.layers)
    neurons = columns = heads = predictor = 0.0
    for layer, gates in enumerate(loaded.manifest.layers):
        for block, gate in gates.items():
            spec, tensors = loaded.gate(layer, block)
            density = gate.density["mean"] if gate.sparse else 1.0
            predictor += sum(
                t.numel() * t.element_size() / 2 for n, t in tensors.items() if n in ("down", "up", "weight")
            )
            if block == "attention":
                heads += density / count
            else:
                neurons += density / count
                known = gate.sparse and gate.oracle_density is not None and gate.recall is not None
                columns += (gate.oracle_density * gate.recall if known else density) / count
    return bytes_row(weights, "artifact, calibrated, predictors included", neurons, heads, columns, predictor)


def part_bytes(study: Study) -> None:
    weights = Weights.of(study.opt)
    points: list[tuple[str, float, float]] = [("dense", 1.0, 1.0)]
    layers = [r for r in read_rows("existence_oracle.csv", study.output) if r["model"] == study.name]
    limits = [r for r in read_rows("existence_oracle_limits.csv", study.output) if r["model"] == study.name]
    if layers:
        for name, key in (
            ("active neurons", "natural_density"),
            ("neurons with 99% of the energy", "energy99_density"),
        ):
            points.append((name, sum(number(r, key) for r in layers) / len(layers), 1.0))
        points += [
            (f"oracle limit, {r['blocks']}", number(r, "neurons_density"), number(r, "heads_density"))
            for r in limits
        ]
    else:
        print(
            f"bytes: {study.output} holds no results of the part `oracle` for {study.name}, so its points are"
            " missing; run that part first",
            flush=True,
        )
    points += [("paper, oracle: 95% and 80% sparse", 0.05, 0.2), ("paper, 85% sparse throughout", 0.15, 0.15)]
    rows = [bytes_row(weights, *p) for p in points]
    trained = artifact_row(study, weights)
    rows += [] if trained is None else [trained]
    table = study.table("bytes")
    for row in rows:
        table.add(model=study.name, **row, batch=1)
    by_name = {r["point"]: r for r in rows}
    claim, best = by_name["paper, 85% sparse throughout"], by_name.get("oracle limit, both")
    image = plot_bytes(study, rows)
    study.write(
        "bytes",
        "Weight bytes",
        "Reads for one token at batch 1, all weights of one type, no KV cache. Ours: K and V are always"
        " projected. `paper`: matrices of the layers only, all four projections of an unselected head"
        " skipped, no predictors. `model`: with LM head, embeddings' rows and last norm; its share is of all"
        " stored weights.",
        markdown(
            rows,
            {
                "point": "point",
                "neurons": "neurons",
                "heads": "heads",
                "layers read": "layers_read",
                "x fewer": "layers_fewer",
                "paper's account": "paper_read",
                "x fewer, paper's": "paper_fewer",
                "model read": "model_read",
                "x fewer, model": "model_fewer",
            },
        ),
        f"Sparsity of 85% throughout is {claim['paper_fewer']:.1f}x fewer bytes by the paper's account (it"
        f" says 7x); with K and V always read it is {claim['layers_fewer']:.1f}x of this model's layers, and"
        f" {claim['model_fewer']:.1f}x with what lies outside them"
        f" ({100 * weights.outside / (weights.outside + weights.layers_read(1, 1, 1)):.0f}% of a dense step's"
        " weights here)."
        + (
            ""
            if best is None
            else (
                f" At the oracle limit of both blocks it is {best['layers_fewer']:.1f}x (paper's account"
                f" {best['paper_fewer']:.1f}x), of the whole model {best['model_fewer']:.1f}x."
            )
        ),
        image,
    )


def plot_bytes(study: Study, rows: list[dict[str, Any]]) -> str:
    made = study.figure(1, 1, width=7.5, height=0.45 * len(rows) + 1.2)
    if made is None:
        return ""
    figure, [[axis]] = made
    for offset, (key, label) in enumerate(
        (
            ("paper_read", "layers, the paper's account"),
            ("layers_read", "layers, K and V always read"),
            ("model_read", "whole model, of stored weights"),
        )
    ):
        axis.barh(
            [i + 0.27 * (offset - 1) for i in range(len(rows))],
            [r[key] for r in rows],
            height=0.25,
            label=label,
        )
    axis.set_yticks(range(len(rows)), [r["point"] for r in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="share of weight bytes read a token")
    axis.legend(fontsize=7)
    return study.save(figure, "bytes", "weight bytes at batch 1")
