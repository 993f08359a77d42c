"""Predictors compared on one model: forms at equal bytes, losses and labels, lookaheads, amount of data,
heads against the oracle.

    python benchmarks/studies/predictor_study.py STUDY... --model DIR --data TRAIN --held-out TEXT
        --output DIR

Studies: forms, quality, lookahead, data, heads. A CSV each, PNG, and a Markdown table of the forms; `plots`
makes these alone. Held-out documents are scored, never trained on. Everything is computed with masks in
transformers; what is served is scored by `vllm-dejavu evaluate`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from vllm_dejavu.predictor import Predictor, quantize, state_name
from vllm_dejavu.predictor_training import data, forms
from vllm_dejavu.predictor_training.calibrate import CalibrationSettings, Calibrator, Seen, quantile
from vllm_dejavu.predictor_training.collect import Collector, Moments, Request, layer_lookahead
from vllm_dejavu.predictor_training.forms import FittedMlp
from vllm_dejavu.predictor_training.gates import Gate, Key, make_mlp_gate
from vllm_dejavu.predictor_training.hf_model import HfModel
from vllm_dejavu.predictor_training.labels import (
    Labels,
    head_contributions,
    neuron_energy,
    top_heads,
)
from vllm_dejavu.predictor_training.masked import Masked
from vllm_dejavu.predictor_training.samples import SampleStore
from vllm_dejavu.predictor_training.train import (
    FittedHeads,
    FittedLayer,
    LayerWeights,
    fit_heads,
    fit_heads_by_gradient,
    fit_mlp,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))
from common import Table  # noqa: E402
from predictor_report import plot, summary  # noqa: E402

BUDGETS = (0.015, 0.03, 0.06, 0.12)  # of the MLP's bytes in 16 bits
WEIGHT_BITS = {"float16": 16, "int8": 8, "int4": 4}
FORMS = (
    ("closed_form", "bce"),
    ("closed_form", "energy"),
    ("finetuned", "bce"),
    ("finetuned", "energy"),
    ("paper", "bce"),
)
# Neurons are compared at this multiple of their natural density.
DENSITY = 1.25


class Study:
    """A model and its text.

    Attributes:
        held_out: [windows, seq_len] tokens; `seen`: what the first of them do in each layer, densely.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.opt = args, HfModel(args.model)
        self.seq_len = min(2048, self.opt.geometry.max_positions)
        self.documents = {
            name: self._documents(sources)
            for name, sources in (("train", args.data), ("held_out", args.held_out))
        }
        self.held_out = data.pack(
            self.documents["held_out"], self.seq_len, self.opt.bos, max_tokens=args.held_out_tokens, seed=0
        ).tokens
        self.weights = [LayerWeights.of(self.opt, i) for i in range(len(self.opt.layers))]
        self.seen = self._observe(self.held_out[: max(1, args.scored_tokens // self.seq_len)])

    def _documents(self, sources: list[str]) -> list[list[int]]:
        return data.tokenize([t for s in sources for t in data.read_documents(s)], self.opt.tokenizer())

    def train(self, tokens: int, seed: int) -> torch.Tensor:
        return data.pack(
            self.documents["train"], self.seq_len, self.opt.bos, max_tokens=tokens, seed=seed
        ).tokens

    def table(self, name: str) -> Table:
        return Table(Path(self.args.output) / f"{name}.csv")

    def _observe(self, tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        kept: list[dict[str, list[torch.Tensor]]] = [defaultdict(list) for _ in self.opt.layers]

        def on_attention(layer: int, states: Any, attn: torch.Tensor) -> None:
            kept[layer]["attn"].append(attn.clone())

        def on_mlp(layer: int, states: Any, z: torch.Tensor) -> None:
            kept[layer]["z"].append(z.clone())
            for name in ("attn_input", "mlp_input", "previous"):
                if states.named(name) is not None:
                    kept[layer][name].append(states.named(name).clone())

        with self.opt.observed(on_attention, on_mlp):
            for part in tokens.split(4):
                self.opt.decoder(part)
        return [{k: torch.cat(v) for k, v in layer.items()} for layer in kept]

    def score(self, layer: int, tensors: dict[str, torch.Tensor], lookahead: str) -> dict[str, float]:
        """Held-out recall, precision and kept energy at DENSITY x the natural density, and AUC over all
        (token, neuron) pairs.
        """
        s = self.seen[layer]
        scores = Predictor(tensors).scores(s[state_name("mlp", layer_lookahead(lookahead, layer))])
        active = s["z"] > 0
        energy = neuron_energy(s["z"], self.weights[layer].fc2_norms.float()) ** 2
        selected = scores > quantile(scores, 1 - min(0.99, DENSITY * float(active.float().mean())))
        order = scores.flatten().argsort()
        hits = active.flatten()[order].double()
        positives = float(hits.sum())
        ranks = float((torch.arange(1, len(hits) + 1, dtype=torch.float64) * hits).sum())
        return {
            "recall": float((selected & active).sum() / active.sum()),
            "precision": float((selected & active).sum() / selected.sum()),
            "kept_energy": float((energy * selected).sum() / energy.sum()),
            "auc": (ranks - positives * (positives + 1) / 2) / (positives * (len(hits) - positives)),
        }

    def rise(self, gates: dict[Key, Gate]) -> float:
        """Relative rise of the held-out perplexity."""
        if not hasattr(self, "dense"):
            self.dense = Masked(self.opt, {}).nll(self.held_out, 4)
        return float(torch.tensor(Masked(self.opt, gates).nll(self.held_out, 4) - self.dense).expm1())

    def mlp_gates(self, fits: list[FittedMlp], lookahead: str, dtype: str = "int8") -> dict[Key, Gate]:
        """All layers at DENSITY x their natural density."""
        gates = {}
        for i, fit in enumerate(fits):
            look = layer_lookahead(lookahead, i)
            plain = make_mlp_gate(fit, 0.0, look, "float32").predictor
            scores = plain.scores(self.seen[i][state_name("mlp", look)])
            density = min(0.99, DENSITY * float((self.seen[i]["z"] > 0).float().mean()))
            gates[i, "mlp"] = make_mlp_gate(fit, -quantile(scores, 1 - density), look, dtype)
        return gates


def stored(fit: FittedMlp, bits: int) -> dict[str, torch.Tensor]:
    tensors = {
        "down": fit.down,
        "up": fit.up,
        "bias": fit.bias.float(),
        "activation_rate": fit.activation_rate.float(),
    }
    if bits == 16:
        return {k: v.half() if k in ("down", "up") else v for k, v in tensors.items()}
    integers = quantize(tensors, bits)
    # Quantization scales every neuron's score by itself, the threshold with it. Here one threshold serves all
    # neurons: scale back.
    step = (fit.bias / integers["bias"].double()).float()
    return {**tensors, "down": integers["down"].float(), "up": integers["up"] * step[:, None]}


def study_forms(study: Study) -> None:
    """Forms x byte budgets x weight types x seeds; the rank is what the bytes allow."""
    table, args, opt = study.table("forms"), study.args, study.opt
    hidden, ffn = opt.geometry.hidden_size, opt.geometry.ffn_dim
    points = defaultdict(list)
    for budget in BUDGETS:
        for dtype, bits in WEIGHT_BITS.items():
            rank = int(budget * 2 * hidden * ffn * 16 / ((hidden + ffn) * bits))
            if rank <= hidden:
                points[rank].append((budget, dtype, bits))
    for seed in range(args.seeds):
        tokens = study.train(args.tokens, seed)
        with tempfile.TemporaryDirectory() as directory:
            store = SampleStore(Path(directory), ffn, with_energy=True, with_heads=False)
            moments = Collector(
                opt,
                Request({"mlp": ("self",), "attention": ("previous",)}, range(len(opt.layers))),
                samples=store,
            ).run(tokens, 4)
            for i, weights in enumerate(study.weights):
                for name, loss in FORMS if args.forms is None else [f for f in FORMS if f[0] in args.forms]:
                    for rank, stores in sorted(points.items()):
                        fit = fit_mlp(
                            moments,
                            i,
                            weights,
                            "self",
                            rank,
                            forms.get(name),
                            samples=functools.partial(store.read, i),
                            seed=seed,
                            energy_loss=loss == "energy",
                        )
                        for budget, dtype, bits in stores:
                            table.add(
                                study="forms",
                                form=name,
                                loss=loss,
                                byte_budget=budget,
                                dtype=dtype,
                                rank=rank,
                                layer=i,
                                seed=seed,
                                tokens=tokens.numel(),
                                density_multiple=DENSITY,
                                **study.score(i, stored(fit, bits), "self"),
                            )
                print(f"forms: seed {seed}, layer {i} done", flush=True)


def study_quality(study: Study) -> None:
    """What the forms are worth in perplexity: all MLPs at DENSITY x their natural density, heads dense,
    int8.
    """
    table, args, opt = study.table("quality"), study.args, study.opt
    hidden, ffn = opt.geometry.hidden_size, opt.geometry.ffn_dim
    for seed in range(args.seeds):
        tokens = study.train(args.tokens, seed)
        with tempfile.TemporaryDirectory() as directory:
            store = SampleStore(Path(directory), ffn, with_energy=True, with_heads=False)
            moments = Collector(
                opt,
                Request({"mlp": ("self",), "attention": ("previous",)}, range(len(opt.layers))),
                samples=store,
            ).run(tokens, 4)
            for budget in (0.03, 0.08):
                rank = int(budget * 2 * hidden * ffn * 2 / (hidden + ffn))
                for name, loss in FORMS:
                    fits = [
                        fit_mlp(
                            moments,
                            i,
                            w,
                            "self",
                            rank,
                            forms.get(name),
                            samples=functools.partial(store.read, i),
                            seed=seed,
                            energy_loss=loss == "energy",
                        )
                        for i, w in enumerate(study.weights)
                    ]
                    rise = study.rise(study.mlp_gates(fits, "self"))
                    table.add(
                        study="quality",
                        form=name,
                        loss=loss,
                        byte_budget=budget,
                        dtype="int8",
                        rank=rank,
                        seed=seed,
                        tokens=tokens.numel(),
                        density_multiple=DENSITY,
                        ppl_increase=rise,
                    )
                    print(f"quality: {name}, {loss}, rank {rank}: {100 * rise:+.2f}%", flush=True)


def _fits(
    study: Study, moments: Moments, lookahead: str, rank: int, form: str = "closed_form"
) -> list[FittedMlp]:
    return [fit_mlp(moments, i, w, lookahead, rank, forms.get(form)) for i, w in enumerate(study.weights)]


def study_lookahead(study: Study) -> None:
    """MLP: recall and perplexity by lookahead and rank; heads: what calibration saves by lookahead."""
    table, args, opt = study.table("lookahead"), study.args, study.opt
    every = {"mlp": ("self", "attn_input", "previous"), "attention": ("self", "previous")}
    hidden = opt.geometry.hidden_size
    for seed in range(args.seeds):
        moments = Collector(opt, Request(every, range(len(opt.layers)))).run(
            study.train(args.tokens, seed), 4
        )
        for lookahead in every["mlp"]:
            for rank in (hidden // 8, hidden // 4, hidden // 2):
                fits = _fits(study, moments, lookahead, rank)
                scores = [study.score(i, stored(f, 8), lookahead) for i, f in enumerate(fits)]
                mean = {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}
                table.add(
                    study="lookahead",
                    block="mlp",
                    lookahead=lookahead,
                    rank=rank,
                    dtype="int8",
                    seed=seed,
                    tokens=args.tokens,
                    density_multiple=DENSITY,
                    **mean,
                    ppl_increase=study.rise(study.mlp_gates(fits, lookahead)),
                )
        fits = _fits(study, moments, "self", hidden // 4)
        for lookahead in every["attention"]:
            heads = [fit_heads(moments, i, lookahead) for i in range(len(opt.layers))]
            [(density, rise)] = _heads_only(study, fits, heads, lookahead, Calibrator, (0.01,))
            table.add(
                study="lookahead",
                block="attention",
                lookahead=lookahead,
                dtype="int8",
                seed=seed,
                tokens=args.tokens,
                head_density=density,
                ppl_increase=rise,
                r2=float(torch.stack([f.r2 for f in heads]).mean()),
            )


def study_data(study: Study) -> None:
    """How much text the closed form needs, and the forms that use none."""
    table, opt = study.table("data"), study.opt
    rank = opt.geometry.hidden_size // 4
    request = Request({"mlp": ("self",), "attention": ("previous",)}, range(len(opt.layers)))
    total = sum(map(len, study.documents["train"]))
    for seed in range(study.args.seeds):
        for tokens in (1024, 4096, 16384, 65536, 256_000, 1_024_000):
            if tokens > total or (tokens > 300_000 and seed):
                continue
            moments = Collector(opt, request).run(study.train(tokens, seed), 4)
            for form in ("closed_form", "svd") if tokens == 1024 else ("closed_form",):
                fits = _fits(study, moments, "self", rank, form)
                scores = [study.score(i, stored(f, 8), "self") for i, f in enumerate(fits)]
                mean = {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}
                table.add(
                    study="data",
                    form=form,
                    tokens=0 if form == "svd" else tokens,
                    rank=rank,
                    dtype="int8",
                    seed=seed,
                    density_multiple=DENSITY,
                    **mean,
                    ppl_increase=study.rise(study.mlp_gates(fits, "self")),
                )


class OracleGate(Gate):
    """Selects the heads whose true contribution is above the threshold."""

    def __init__(self, plain: Gate, grams: torch.Tensor):
        super().__init__(plain.block, plain.spec, plain.tensors)
        self.grams = grams

    def scores(self, states: Any, value: torch.Tensor) -> torch.Tensor:
        return head_contributions(value, self.grams) - self.spec.threshold


class OracleCalibrator(Calibrator):
    """The same search with heads that are known instead of predicted."""

    def candidates(self, key: Key, seen: Seen) -> Any:
        grams = self.model.head_grams(key[0])
        for gate, density, label in super().candidates(key, seen):
            yield OracleGate(gate, grams), density, label


def _heads_only(
    study: Study,
    fits: list[FittedMlp],
    heads: list[FittedHeads],
    lookahead: str,
    kind: type,
    budgets: tuple[float, ...],
) -> list[tuple[float, float]]:
    """(mean head density, perplexity rise) of calibrations of the heads alone, MLPs dense, a pair a
    budget.
    """
    calibrator = kind(
        study.opt,
        [FittedLayer(*pair) for pair in zip(fits, heads, strict=True)],
        study.held_out,
        CalibrationSettings(
            {"mlp": "self", "attention": lookahead},
            budgets[0],
            "int8",
            batch=4,
            blocks=("attention",),
        ),
    )
    out = []
    for budget in budgets:  # what was measured for one is not measured again for the next
        calibrator.settings = dataclasses.replace(calibrator.settings, budget=budget)
        gates, record = calibrator.run()
        run = Masked(study.opt, gates, measure=True)
        run.nll(study.held_out, 4)
        units = study.opt.geometry.num_heads
        densities = [
            (
                float(torch.cat(run.counts[i, "attention"]).float().mean()) / units
                if (i, "attention") in gates
                else 1.0
            )
            for i in range(len(study.opt.layers))
        ]
        out.append((sum(densities) / len(densities), record["ppl_increase"]))
    return out


def study_heads(study: Study) -> None:
    """Head density that a perplexity budget buys: predicted, by the paper's trained form, and known
    (oracle).
    """
    table, args, opt = study.table("heads"), study.args, study.opt
    for seed in range(args.seeds):
        tokens = study.train(args.tokens, seed)
        with tempfile.TemporaryDirectory() as directory:
            store = SampleStore(Path(directory), opt.geometry.ffn_dim, with_energy=False, with_heads=True)
            request = Request(
                {"mlp": ("self",), "attention": ("previous",)}, range(len(opt.layers)), sample_stride=2
            )
            moments = Collector(opt, request, samples=store).run(tokens, 4)
            closed = [fit_heads(moments, i, "previous") for i in range(len(opt.layers))]
            norms = Collector(
                opt, dataclasses.replace(request, labels=Labels(heads="output_norm"), sample_stride=1)
            ).run(tokens, 4)
            paper = []
            for i, start in enumerate(closed):
                rows = list(store.read(i))
                chosen = top_heads(torch.cat([r.head_norms for r in rows]).float(), args.head_share)
                paper.append(fit_heads_by_gradient(rows, start, chosen, seed))
            by_norm = [fit_heads(norms, i, "previous") for i in range(len(opt.layers))]
            fits = _fits(study, moments, "self", opt.geometry.hidden_size // 4)
        for name, heads, kind in (
            ("closed_form", closed, Calibrator),
            ("closed_form on output norms", by_norm, Calibrator),
            ("paper (BCE, top share)", paper, Calibrator),
            ("oracle", closed, OracleCalibrator),
        ):
            if seed and name not in ("closed_form", "oracle"):
                continue
            budgets = (0.005, 0.01, 0.03)
            for budget, (density, rise) in zip(
                budgets, _heads_only(study, fits, heads, "previous", kind, budgets), strict=True
            ):
                table.add(
                    study="heads",
                    selection=name,
                    budget=budget,
                    seed=seed,
                    tokens=tokens.numel(),
                    head_density=density,
                    ppl_increase=rise,
                )
                print(f"heads: {name}, budget {budget}: density {density:.3f}, rise {rise:+.4f}", flush=True)


STUDIES = {
    "forms": study_forms,
    "quality": study_quality,
    "lookahead": study_lookahead,
    "data": study_data,
    "heads": study_heads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "plots"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--tokens", type=int, default=65_536, help="training tokens")
    parser.add_argument("--held-out-tokens", type=int, default=16_384, help="for perplexity")
    parser.add_argument("--scored-tokens", type=int, default=4_096, help="of these, for recall and AUC")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", help="only these, of the study forms")
    parser.add_argument(
        "--head-share", type=float, default=0.5, help="heads that the paper's rule labels important"
    )
    args = parser.parse_args()
    wanted = [s for s in args.studies if s != "plots"]
    if wanted:
        study = Study(args)
        for name in wanted:
            STUDIES[name](study)
    plot(Path(args.output), FORMS, tuple(WEIGHT_BITS), DENSITY)
    print(summary(Path(args.output)))


if __name__ == "__main__":
    main()
