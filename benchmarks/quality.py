"""What sparsity costs in quality: the paper's figure of accuracy against sparsity, with errors, controls and
more tasks.

    python benchmarks/quality.py --model examples/opt-books-7m --train books_train.txt.xz --calibration
        books_valid.txt.xz \\ --texts books=books_test.txt.xz wikitext2=wikitext2_test.txt.xz --lambada
        lambada_test.jsonl.xz --blimp blimp.jsonl.xz \\ --piqa piqa_valid.jsonl.xz --training-tokens "16 M"
        --output benchmarks/results/paper

Parts, all unless --parts names some:

card        what the model is: dead neurons, training tokens, dense perplexity, dense accuracy beside chance
sweep       dense, oracle, predictor, random and static selections of MLP neurons, heads or both, over
densities even over layers context     what is kept of in-context learning: passages that come twice, and loss
by position in long windows generation  free generation through the engine's decode path, dense and sparse as
served engine      the tasks through the engine at the artifact's own operating point, against masks in
transformers report      quality.md and PNG of whatever CSV files are there (needs --output only)

With these defaults `sweep` scores about 60,000 tokens at each of 88 points: some 35 minutes on one free core
(2,500 masked tokens a second of this model). Set OMP_NUM_THREADS to the cores that are really free: threads
that wait for each other make it several times slower.

`sweep` and `context` compute masks in transformers, in float32. Densities become thresholds on --calibration,
missing predictors are fitted on --train; nothing is tuned on what is scored. `sweep` skips the points that
its CSV file already has.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import shlex
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_dejavu import artifact, metrics, selection
from vllm_dejavu.config import BLOCKS
from vllm_dejavu.kernels import reference
from vllm_dejavu.predictor import state_name
from vllm_dejavu.predictor_training import data, evaluate, forms
from vllm_dejavu.predictor_training.calibrate import quantile
from vllm_dejavu.predictor_training.collect import Collector, Moments, Request, layer_lookahead
from vllm_dejavu.predictor_training.gates import Gate, Key, make_head_gate, make_mlp_gate
from vllm_dejavu.predictor_training.hf_model import HfModel, LayerStates
from vllm_dejavu.predictor_training.labels import (
    active_neurons,
    head_contributions,
    neuron_energy,
)
from vllm_dejavu.predictor_training.train import LayerWeights, covariance, fit_heads, fit_mlp

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, Table, provenance, read_rows, write_rows  # noqa: E402
from quality_report import part_report  # noqa: E402
from quality_tasks import (  # noqa: E402
    BLOCK_SETS,
    MODES,
    OWN,
    PASSAGE,
    TEMPERATURE,
    Score,
    Task,
    Text,
    blimp_task,
    distinct,
    lambada_task,
    mean_se,
    piqa_task,
    read_jsonl,
    statistics,
    subsample,
    text_task,
)

DENSITIES = (0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
# The engine's names of the modes.
SERVED = {"predictor": "sparse", "oracle": "oracle", "random": "random", "static": "static"}
PARTS = ("card", "sweep", "context", "generation", "engine", "report")
# Padded tokens of a forward pass: activations of a layer still lie in a cache.
BATCH_TOKENS = 2048
# Pairs of token and unit per layer on which a threshold is set.
CALIBRATION_PAIRS = 1 << 21
# Edges of position buckets, in tokens in front of the scored one.
POSITIONS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)


# --- selections
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A right-padded batch, flattened to T tokens. valid [T], bool: no padding; positions [T]; shape: (texts,
    length);
    texts: their tokens."""

    valid: torch.Tensor
    positions: torch.Tensor
    shape: tuple[int, int]
    texts: list[tuple[int, ...]]


# (batch, states, value) -> mask [T, units]; value: pre-activations [T, ffn], or attention output [T, heads,
# head_size].
Rule = Callable[[Batch, LayerStates, torch.Tensor], torch.Tensor]


class Masks:
    """Rules applied to the blocks of a model, and counts of what they select on valid tokens (`rows` of
    them).
    """

    def __init__(self, units: dict[str, int], layers: int, rules: dict[Key, Rule]):
        self.units, self.layers, self.rules = units, layers, rules
        self.batch: Batch | None = None
        self.counts: dict[Key, torch.Tensor] = {}

    def on_mlp(self, layer: int, states: LayerStates, z: torch.Tensor) -> torch.Tensor | None:
        return self._mask((layer, "mlp"), states, z)

    def on_attention(self, layer: int, states: LayerStates, attn: torch.Tensor) -> torch.Tensor | None:
        return self._mask((layer, "attention"), states, attn)

    def _mask(self, key: Key, states: LayerStates, value: torch.Tensor) -> torch.Tensor | None:
        if key not in self.rules:
            return None
        valid = self.batch.valid
        mask = self.rules[key](self.batch, states, value)
        seen = [valid, mask.sum(1) * valid]
        if key[1] == "mlp":
            active = active_neurons(value)
            seen += [active.sum(1) * valid, (active & mask).sum(1) * valid]
        self.counts[key] = self.counts.get(key, 0) + torch.stack([s.sum() for s in seen])
        return mask

    def read_out(self) -> list[dict[str, dict[str, Any]]]:
        """Counts since the last read-out, by layer and block as `metrics.summarize` gives them."""
        layers = []
        for layer in range(self.layers):
            entry = {}
            for block in BLOCKS:
                if (found := self.counts.get((layer, block))) is None:
                    entry[block] = {"gated": False, "density": 1.0}
                    continue
                rows, selected, *neurons = found.tolist()
                units = self.units[block]
                entry[block] = {
                    "gated": True,
                    "rows": rows,
                    "units": units,
                    "density": selected / (rows * units),
                }
                if neurons:
                    active, hit = neurons
                    entry[block] |= {"active_density": active / (rows * units), "hit": hit}
            layers.append(entry)
        self.counts = {}
        return layers


def exact_random(generator: np.random.Generator, rows: int, units: int, count: int) -> np.ndarray:
    """[rows, units], bool: in each row `count` units, drawn without preference."""
    if count in (0, units):
        return np.full((rows, units), count > 0)
    bits = max(1, (units - 1).bit_length())
    # The unit's number in the low bits: no two are equal, so the cut leaves exactly `count`.
    keys = (
        generator.integers(0, 1 << (64 - bits), (rows, units), dtype=np.uint64) << np.uint64(bits)
    ) | np.arange(units, dtype=np.uint64)
    return keys <= np.partition(keys, count - 1, axis=1)[:, count - 1 : count]


def random_rule(layer: int, block: str, units: int, density: float, seed: int) -> Rule:
    """round(density * units) units, drawn afresh for every token; what a text gets does not depend on its
    neighbours in a batch.
    """
    count = round(density * units)

    def rule(batch: Batch, states: LayerStates, value: torch.Tensor) -> torch.Tensor:
        mask = np.zeros((*batch.shape, units), dtype=bool)
        for row, tokens in zip(mask, batch.texts, strict=True):
            own = zlib.crc32(np.asarray(tokens, dtype=np.int64).tobytes())
            generator = np.random.default_rng([seed, layer, BLOCKS.index(block), own])
            row[: len(tokens)] = exact_random(generator, len(tokens), units, count)
        return torch.from_numpy(mask).flatten(0, 1).to(value.device)

    return rule


def static_rule(chosen: torch.Tensor) -> Rule:
    """The same units for every token; chosen: [units], bool."""
    return lambda batch, states, value: chosen[None, :].expand(len(value), -1)


def gate_rule(gate: Gate) -> Rule:
    return lambda batch, states, value: reference.select(gate.scores(states, value), batch.valid.int())


def neuron_rule(norms: torch.Tensor, cut: float) -> Rule:
    """Oracle: neurons whose energy is above `cut` (at least 0: no neuron that ReLU stops). norms: of fc2's
    columns, [ffn].
    """
    return lambda batch, states, z: neuron_energy(z, norms) > max(cut, 0.0)


def head_rule(grams: torch.Tensor, cut: float) -> Rule:
    """Oracle: heads whose contribution is above `cut`."""
    return lambda batch, states, attn: head_contributions(attn, grams) > cut


@dataclass(frozen=True)
class Scaled:
    """A predictor at no operating point yet. gate: as stored, in `dtype`. scale [units]: makes its units'
    scores comparable with each other."""

    gate: Gate
    dtype: str
    scale: torch.Tensor

    def at(self, cut: float) -> Gate:
        """Selects the units whose scaled score is above `cut`: the bias is shifted, nothing else."""
        g = self.gate
        return Gate(g.block, g.spec, {**g.tensors, "bias": g.tensors["bias"] - cut / self.scale})


def comparable(
    moments: Moments,
    layer: int,
    block: str,
    lookahead: str,
    tensors: dict[str, torch.Tensor],
    weights: LayerWeights,
) -> torch.Tensor:
    """What a unit's stored score must be multiplied with, so that one threshold can serve all units of a
    block: [units], fp32.

    Integers leave every unit's score on a scale of its own (`predictor.quantize`). Its unit comes back from
    the text's moments: of neurons the residual standard deviation of the pre-activation, regressed on the
    score; of heads the logarithm of their norm.
    """
    s, n = moments.layer(layer), moments.num_tokens
    name = state_name(block, layer_lookahead(lookahead, layer))
    x_sum = s[f"{name}.sum"]
    cov_x = covariance(s[f"{name}.second"], x_sum, x_sum, n)
    if block == "attention":
        weight = tensors["weight"].double()
        cov_xy = covariance(s[f"{name}.heads"], x_sum, s["heads.sum"], n)
        shared = (weight * cov_xy.T).sum(1)
        residual = torch.ones_like(shared)
    else:
        weight, m_sum = tensors["up"].double() @ tensors["down"].double(), s["mlp_input.sum"]
        cov_m = covariance(s["mlp_input.second"], m_sum, m_sum, n)
        cov_xm = cov_x if name == "mlp_input" else covariance(s[f"{name}.mlp_input"], x_sum, m_sum, n)
        shared = ((weights.fc1 @ cov_xm.T) * weight).sum(1)
        residual = ((weights.fc1 @ cov_m) * weights.fc1).sum(1)
    variance = ((weight @ cov_x) * weight).sum(1).clamp_min(1e-30)
    slope = shared / variance
    if block == "mlp":
        residual = (residual - slope * shared).clamp_min(1e-3 * residual).clamp_min(1e-30)
    # A score that does not rise with what it predicts keeps the sign of its bias at any threshold of this
    # size.
    return (slope / residual.sqrt()).clamp_min(1e-9).float()


@dataclass(frozen=True)
class Point:
    """A selection: mode "dense" or one of MODES; blocks: of BLOCK_SETS; density: a number, or OWN."""

    mode: str
    blocks: str
    density: str

    @property
    def keys(self) -> dict[str, str]:
        return asdict(self)


DENSE = Point("dense", "both", "1")


class Selections:
    """Rules for points of one model: predictors, and thresholds set on the calibration text.

    Args:
        loaded: the artifact. train, calibration: [windows, seq_len] tokens.
    """

    def __init__(
        self,
        opt: HfModel,
        loaded: artifact.Artifact,
        train: torch.Tensor,
        calibration: torch.Tensor,
        seed: int,
    ):
        self.opt, self.loaded, self.seed = opt, loaded, seed
        self.units = {b: opt.geometry.units(b) for b in BLOCKS}
        self.layers = range(opt.geometry.num_layers)
        self.fc2_norms = [opt.fc2_norms(i) for i in self.layers]
        self.grams = [opt.head_grams(i) for i in self.layers]
        specs = {
            b: [loaded.manifest.layers[i][b] for i in self.layers if loaded.manifest.layers[i][b].sparse]
            for b in BLOCKS
        }
        # Of layers whose gate must be fitted: what most gates behind layer 0 have.
        later = {
            b: Counter(
                loaded.manifest.layers[i][b].lookahead
                for i in self.layers[1:]
                if loaded.manifest.layers[i][b].sparse
            )
            for b in BLOCKS
        }
        self.lookahead = {
            b: later[b].most_common(1)[0][0] if later[b] else d
            for b, d in (("mlp", "self"), ("attention", "previous"))
        }
        self.dtype = {b: specs[b][0].dtype if specs[b] else "int8" for b in BLOCKS}
        self.rank = max((s.rank for s in specs["mlp"]), default=opt.geometry.hidden_size // 4)
        looks = {
            b: tuple(dict.fromkeys([self.lookahead[b], *(s.lookahead for s in specs[b])])) for b in BLOCKS
        }
        self.moments = Collector(opt, Request(looks, self.layers)).run(
            train, max(1, BATCH_TOKENS // train.shape[1])
        )
        self.fitted: list[Key] = []
        self.predictors = {(i, b): self._predictor(i, b) for i in self.layers for b in BLOCKS}
        self._calibrate(calibration)

    def _predictor(self, layer: int, block: str) -> Scaled:
        """The artifact's predictor where there is one, else a closed form."""
        weights = LayerWeights.of(self.opt, layer)
        spec, tensors = self.loaded.gate(layer, block)
        if spec.sparse:
            dtype, gate = spec.dtype, Gate(block, spec, tensors)
        else:
            self.fitted.append((layer, block))
            dtype = self.dtype[block]
            look = layer_lookahead(self.lookahead[block], layer)
            if block == "mlp":
                fit = fit_mlp(
                    self.moments,
                    layer,
                    weights,
                    look,
                    min(self.rank, self.opt.geometry.hidden_size),
                    forms.get("closed_form"),
                )
                gate = make_mlp_gate(fit, 0.0, look, dtype)
            else:
                rate = torch.ones(self.units[block])
                gate = make_head_gate(fit_heads(self.moments, layer, look), 0.0, 0.0, rate, look, dtype)
        weight = gate.tensors["up" if block == "mlp" else "weight"]
        if weight.dtype.is_floating_point:  # stored as fitted: comparable already
            return Scaled(gate, dtype, torch.ones(self.units[block]))
        return Scaled(
            gate, dtype, comparable(self.moments, layer, block, gate.spec.lookahead, gate.tensors, weights)
        )

    def _calibrate(self, tokens: torch.Tensor) -> None:
        """One dense pass: importances and scaled scores of some tokens, rates and mean contributions of
        all.
        """
        self.calibration_tokens = tokens.numel()
        stride = max(1, -(-tokens.numel() * max(self.units.values()) // CALIBRATION_PAIRS))
        seen: dict[tuple[str, int, str], list[torch.Tensor]] = defaultdict(list)
        often: dict[Key, torch.Tensor] = {}
        place = 0

        def look(key: Key, states: LayerStates, importance: torch.Tensor, frequency: torch.Tensor) -> None:
            layer, block = key
            rows = torch.arange(-place % stride, len(importance), stride, device=importance.device)
            predictor = self.predictors[key]
            x = states.gate_input(block, predictor.gate.spec.lookahead)[rows]
            seen["importance", layer, block].append(importance[rows].cpu())
            seen["score", layer, block].append(
                (predictor.gate.predictor.to(x.device).scores(x) * predictor.scale.to(x.device)).cpu()
            )
            often[key] = often.get(key, 0) + frequency.double().sum(0)

        def on_attention(layer: int, states: LayerStates, attn: torch.Tensor) -> None:
            norms = head_contributions(attn, self.grams[layer])
            look((layer, "attention"), states, norms, norms)

        def on_mlp(layer: int, states: LayerStates, z: torch.Tensor) -> None:
            look((layer, "mlp"), states, neuron_energy(z, self.fc2_norms[layer]), active_neurons(z))

        with self.opt.observed(on_attention, on_mlp):
            for part in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
                self.opt.decoder(part)
                place += part.numel()
        self.often = {k: v.float() / tokens.numel() for k, v in often.items()}
        self.seen = {k: torch.cat(v) for k, v in seen.items()}
        self.cuts: dict[tuple[str, Key, float], float] = {}

    def cut(self, kind: str, key: Key, density: float) -> float:
        """The threshold above which a share `density` of the calibration text's pairs lies; kind:
        "importance" or "score".
        """
        if (kind, key, density) not in self.cuts:  # sorting is what takes time
            self.cuts[kind, key, density] = quantile(self.seen[kind, *key], 1 - density)
        return self.cuts[kind, key, density]

    def rule(self, key: Key, mode: str, density: float) -> Rule:
        layer, block = key
        if mode == "random":
            return random_rule(layer, block, self.units[block], density, self.seed)
        if mode == "static":
            return static_rule(selection.static_units(self.often[key], density))
        if mode == "predictor":
            return gate_rule(self.predictors[key].at(self.cut("score", key, density)))
        cut = self.cut("importance", key, density)
        return (
            neuron_rule(self.fc2_norms[layer], cut) if block == "mlp" else head_rule(self.grams[layer], cut)
        )

    def own_rule(self, key: Key, mode: str) -> Rule:
        """What the serving model does in this mode."""
        layer, block = key
        spec, tensors = self.loaded.gate(layer, block)
        if mode == "predictor":
            return gate_rule(self.predictors[key].gate)
        if mode == "static":
            return static_rule(
                selection.static_units(tensors["activation_rate"], spec.density["mean"]).to(self.opt.device)
            )
        if mode == "random":
            ids = torch.arange(self.units[block], device=self.opt.device)
            return lambda batch, states, value: selection.random_mask(
                batch.positions, layer, ids, spec.density["mean"], self.seed
            )
        return (
            neuron_rule(torch.ones_like(self.fc2_norms[layer]), 0.0)
            if block == "mlp"
            else head_rule(self.grams[layer], spec.threshold)
        )

    def masks(self, point: Point) -> Masks:
        rules: dict[Key, Rule] = {}
        if point.mode != "dense":
            for key in ((i, b) for i in self.layers for b in BLOCK_SETS[point.blocks]):
                if point.density != OWN:
                    rules[key] = self.rule(key, point.mode, float(point.density))
                elif self.loaded.manifest.layers[key[0]][key[1]].sparse:
                    rules[key] = self.own_rule(key, point.mode)
        return Masks(self.units, len(self.layers), rules)

    def densities(self, point: Point, layers: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
        """Columns of a row: means over layers, a dense block counting 1, and the share of weight bytes not
        read at batch 1.
        """

        class Stored:  # what `_bytes_density` asks an artifact for
            @staticmethod
            def gate(layer: int, block: str) -> tuple[Any, dict[str, torch.Tensor]]:
                found = self.predictors[layer, block]
                return SimpleNamespace(dtype=found.dtype), found.gate.tensors

        neurons = [
            x["mlp"]["hit"] / (x["mlp"]["rows"] * x["mlp"]["units"]) if x["mlp"]["gated"] else 1.0
            for x in layers
        ]
        return {
            "mlp_density": sum(x["mlp"]["density"] for x in layers) / len(layers),
            "fc2_density": sum(neurons) / len(neurons),
            "head_density": sum(x["attention"]["density"] for x in layers) / len(layers),
            "total_sparsity": (
                1
                - evaluate._bytes_density(
                    layers, self.opt.geometry, Stored if point.mode == "predictor" else None
                )
            ),
        }


# --- scorers
# ----------------------------------------------------------------------------------------------------


class MaskedScorer:
    """The model in transformers under a point's masks."""

    def __init__(self, opt: HfModel, masks: Masks, batch_tokens: int = BATCH_TOKENS):
        self.opt, self.masks, self.batch_tokens = opt, masks, batch_tokens

    @torch.inference_mode()
    def score(self, texts: Sequence[Text]) -> list[Score]:
        """Longest texts first, in batches of similar lengths. What pads them stands behind them, where a
        causal model does not look.
        """
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
        out: dict[int, Score] = {}
        with self.opt.observed(self.masks.on_attention, self.masks.on_mlp):
            while order:
                size = max(1, self.batch_tokens // len(texts[order[0]].tokens))
                chosen, order = order[:size], order[size:]
                out.update(zip(chosen, self._batch([texts[i] for i in chosen]), strict=True))
        return [out[i] for i in range(len(texts))]

    def _batch(self, texts: list[Text]) -> list[Score]:
        opt, shape = self.opt, (len(texts), len(texts[0].tokens))
        tokens = torch.full(shape, opt.bos, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text.tokens)] = torch.tensor(text.tokens)
        lengths = torch.tensor([len(t.tokens) for t in texts])
        place = torch.arange(shape[1])
        starts = torch.tensor([t.start for t in texts])
        scored = (place[None, 1:] >= starts[:, None]) & (place[None, 1:] < lengths[:, None])
        self.masks.batch = Batch(
            (place[None, :] < lengths[:, None]).flatten().to(opt.device),
            place.repeat(shape[0]).to(opt.device),
            shape,
            [t.tokens for t in texts],
        )
        hidden = opt.model.model(input_ids=tokens.to(opt.device), use_cache=False).last_hidden_state
        logits = opt.model.lm_head(hidden[:, :-1][scored.to(hidden.device)]).float()
        targets = tokens[:, 1:][scored].to(logits.device)
        chosen = logits.gather(1, targets[:, None])[:, 0]
        nll = (logits.logsumexp(1) - chosen).double().cpu()
        correct = (chosen >= logits.amax(1)).cpu()  # as the engine's rank 1
        counts = scored.sum(1).tolist()
        return [Score(n, c) for n, c in zip(nll.split(counts), correct.split(counts), strict=True)]


class EngineScorer:
    """A vLLM engine of the serving model class."""

    def __init__(self, llm: Any):
        self.llm = llm

    def score(self, texts: Sequence[Text]) -> list[Score]:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0, detokenize=False)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].tokens))
        out: dict[int, Score] = {}
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(texts[i].tokens)} for i in order], params, use_tqdm=False
        )
        for i, output in zip(order, outputs, strict=True):
            text = texts[i]
            entries = [
                e[t]
                for e, t in zip(output.prompt_logprobs[text.start :], text.tokens[text.start :], strict=True)
            ]
            out[i] = Score(
                -torch.tensor([e.logprob for e in entries], dtype=torch.float64),
                torch.tensor([e.rank == 1 for e in entries]),
            )
        return [out[i] for i in range(len(texts))]


# --- the study
# ----------------------------------------------------------------------------------------------------


class Study:
    """A model, its artifact, its tasks; what several parts need is made when the first of them asks."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output = args, Path(args.output)
        self.opt = HfModel(args.model, device=args.device)
        self.loaded = artifact.load(artifact.resolve(args.predictor, args.model))
        artifact.check_model(self.loaded.manifest, self.opt.spec)
        artifact.check_fingerprint(self.loaded.manifest, self.opt.spec.fingerprint, args.model)
        self.tokenizer = self.opt.tokenizer()
        # The engine wants room for one new token; the same windows are scored everywhere.
        self.seq_len = min(2048, self.opt.geometry.max_positions) - 1
        self.read: dict[str, list[list[int]]] = {}
        self.dense_values: dict[str, torch.Tensor] = {}
        self.dense_scores: dict[str, list[Score]] = {}

    def documents(self, path: str) -> list[list[int]]:
        if path not in self.read:
            self.read[path] = data.tokenize(data.read_documents(path), self.tokenizer)
        return self.read[path]

    def windows(self, path: str, tokens: int | None, seq_len: int | None = None) -> torch.Tensor:
        """Drawn from the whole text."""
        return data.pack(
            self.documents(path),
            seq_len or self.seq_len,
            self.opt.bos,
            max_tokens=tokens,
            seed=self.args.seed,
        ).tokens

    @functools.cached_property
    def tasks(self) -> list[Task]:
        args, rest = self.args, (self.tokenizer, self.opt.bos, self.seq_len)
        made = [
            text_task(name, self.windows(path, args.tokens))
            for name, path in (t.split("=", 1) for t in args.texts)
        ]
        if args.lambada:
            made.append(lambada_task(subsample(list(read_jsonl(args.lambada)), args.items, args.seed), *rest))
        if args.blimp:  # twice as many: they are short, and so many kinds
            made.append(
                blimp_task(
                    subsample(list(read_jsonl(args.blimp)), 2 * args.items, args.seed, lambda r: r["uid"]),
                    *rest,
                )
            )
        if args.piqa:
            made.append(piqa_task(subsample(list(read_jsonl(args.piqa)), args.items, args.seed), *rest))
        return made

    @functools.cached_property
    def selections(self) -> Selections:
        train, calibration = (
            self.windows(self.args.train, self.args.train_tokens),
            self.windows(self.args.calibration, self.args.calibration_tokens),
        )
        return Selections(self.opt, self.loaded, train, calibration, self.args.seed)

    @functools.cached_property
    def setting(self) -> str:
        """Names everything that decides a row besides its point."""
        args = self.args
        texts = hashlib.sha256(repr([(t.name, t.texts) for t in self.tasks]).encode()).hexdigest()
        fitted = [
            hashlib.sha256(self.windows(p, n).numpy().tobytes()).hexdigest()
            for p, n in ((args.train, args.train_tokens), (args.calibration, args.calibration_tokens))
        ]
        return hashlib.sha256(
            json.dumps([self.opt.spec.fingerprint, self.loaded.digest, texts, fitted, args.seed]).encode()
        ).hexdigest()[:12]

    def masked(self, point: Point) -> MaskedScorer:
        if point.mode == "dense":
            layers = self.opt.geometry.num_layers
            return MaskedScorer(self.opt, Masks({}, layers, {}))
        return MaskedScorer(self.opt, self.selections.masks(point))

    def dense(self, task: Task) -> tuple[list[Score], dict[str, torch.Tensor]]:
        """Dense scores of a task and its measures' values, computed once."""
        if task.name not in self.dense_scores:
            self.dense_scores[task.name] = scores = self.masked(DENSE).score(task.texts)
            self.dense_values |= {name: m.values(scores) for name, m in task.measures.items()}
        return self.dense_scores[task.name], self.dense_values

    def describe(self) -> dict[str, Any]:
        args, s = self.args, self.selections
        return {
            "model": shown(args.model),
            "fingerprint": self.opt.spec.fingerprint,
            "artifact": shown(str(artifact.resolve(args.predictor, args.model))),
            "artifact_digest": self.loaded.digest,
            "seq_len": self.seq_len,
            "seed": args.seed,
            "dtype": "float32",
            "tasks": {
                t.name: {"texts": len(t.texts), "tokens": t.num_tokens, "groups": len(set(t.strata))}
                for t in self.tasks
            },
            "train": Path(args.train).name,
            "train_tokens": s.moments.num_tokens,
            "calibration": Path(args.calibration).name,
            "calibration_tokens": s.calibration_tokens,
            "fitted_predictors": [f"{layer}.{block}" for layer, block in s.fitted],
            "lookahead_of_fitted": s.lookahead,
        }


def shown(argument: str) -> str:
    """An argument as a reader of the repository may know it: paths of this machine by their last name."""
    name, equals, value = argument.rpartition("=")
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return name + equals + value


def record(study: Study, part: str) -> None:
    """Note the command line and the settings of a part, beside its CSV file."""
    path = study.output / "quality_settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    command = " ".join(["python", "benchmarks/quality.py", *(shlex.quote(shown(a)) for a in sys.argv[1:])])
    found[part] = {"command": command, "setting": study.setting, **study.describe(), **provenance()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def fresh(study: Study, name: str) -> Table:
    return Table(study.output / f"{name}.csv")


# --- parts
# ----------------------------------------------------------------------------------------------------


def part_card(study: Study) -> None:
    """What the model is, before anything is said about sparsity."""
    table, moments = fresh(study, "quality_card"), study.selections.moments
    table.add(kind="training", name="training tokens", value=study.args.training_tokens)
    for layer in study.selections.layers:
        active = moments.layer(layer)["active"]
        table.add(
            kind="dead neurons",
            name=f"layer {layer}",
            value=int((active == 0).sum()),
            items=len(active),
            tokens=moments.num_tokens,
            active_density=float(active.mean()) / moments.num_tokens,
        )
    for task in study.tasks:
        _, values = study.dense(task)
        for name, measure in task.measures.items():
            value, se = mean_se(values[name], task.strata)
            row = {
                "kind": measure.metric,
                "name": name,
                "value": value,
                "se": se,
                "chance": measure.chance,
                "items": len(values[name]),
                "tokens": task.num_tokens,
            }
            if measure.metric == "nll":
                row |= {"kind": "perplexity", "value": math.exp(value), "se": math.exp(value) * se}
            table.add(**row)


def points(args: argparse.Namespace) -> list[Point]:
    """Dense first, then the artifact's own point, then densities, each in every mode."""
    own = [Point("predictor", blocks, OWN) for blocks in args.blocks if "predictor" in args.modes]
    return [
        DENSE,
        *own,
        *(
            Point(mode, blocks, f"{d:g}")
            for d in args.densities
            for blocks in args.blocks
            for mode in args.modes
        ),
    ]


def part_sweep(study: Study) -> None:
    """Every point on every task; points that the CSV file already has are left as they are."""
    path, uid_path = study.output / "quality_sweep.csv", study.output / "quality_blimp.csv"
    rows = read_rows(path.name, path.parent) if path.is_file() else []
    if others := {r["setting"] for r in rows} - {study.setting}:
        raise ValueError(
            f"{path} holds points of other settings ({', '.join(sorted(others))}, now {study.setting}): name"
            f" another --output, or remove it and {uid_path.name}."
        )
    table = Table(path, rows)
    done = {tuple(r[k] for k in ("mode", "blocks", "density", "task")) for r in rows}
    uids = [
        r
        for r in (read_rows(uid_path.name, path.parent) if uid_path.is_file() else [])
        if (r["mode"], r["blocks"], r["density"], "blimp") in done
    ]
    for point in points(study.args):
        scorer = None
        for task in study.tasks:
            if all((*point.keys.values(), name) in done for name in task.measures):
                continue
            start = time.perf_counter()
            dense, dense_values = study.dense(task)
            scorer = scorer or study.masked(point)
            scores = dense if point == DENSE else scorer.score(task.texts)
            densities = study.selections.densities(point, scorer.masks.read_out())
            seconds = time.perf_counter() - start
            for name, measure in task.measures.items():
                if (*point.keys.values(), name) in done:
                    continue
                values = measure.values(scores)
                if task.strata:
                    uids += blimp_rows(point, task, values, dense_values[name], study.setting)
                    write_rows(uid_path, uids)
                table.add(
                    **point.keys,
                    task=name,
                    metric=measure.metric,
                    **statistics(measure, values, dense_values[name], task.strata),
                    chance=measure.chance,
                    **densities,
                    tokens=task.num_tokens,
                    seconds=round(seconds, 2),
                    setting=study.setting,
                )
            print(
                f"sweep: {point.mode}, {point.blocks}, density {point.density}: {task.name}, {seconds:.1f} s",
                flush=True,
            )


def blimp_rows(
    point: Point, task: Task, values: torch.Tensor, dense: torch.Tensor, setting: str
) -> Iterator[dict[str, Any]]:
    """A row a uid; provenance is in the sweep's row of the same point and setting."""
    for uid in dict.fromkeys(task.strata):
        mine = torch.tensor([s == uid for s in task.strata])
        accuracy, se = mean_se(values[mine])
        difference, difference_se = mean_se((values - dense)[mine])
        yield {
            **point.keys,
            "uid": uid,
            "field": task.fields[uid],
            "items": int(mine.sum()),
            "value": accuracy,
            "value_se": se,
            "difference": difference,
            "difference_se": difference_se,
            "setting": setting,
        }


def part_context(study: Study) -> None:
    """In-context learning: what a second look at the same passage gains, and loss by position."""
    table, args = fresh(study, "quality_context"), study.args
    path = args.texts[0].split("=", 1)[1]
    length = min(PASSAGE, (study.seq_len - 1) // 2)
    passages = study.windows(path, args.passages * (length + 1), length + 1)
    twice = [Text((*row, *row[1:])) for row in passages.tolist()]
    long = [Text(tuple(row)) for row in study.windows(path, args.tokens).tolist()]
    own = [Point(mode, "both", OWN) for mode in ("predictor", "oracle", "random")]
    heads = [Point(mode, "attention", "0.5") for mode in ("predictor", "oracle", "random")]
    dense: dict[str, torch.Tensor] = {}
    for point in (DENSE, *own, *heads):
        scorer = study.masked(point)
        scores = scorer.score(twice)
        densities = study.selections.densities(point, scorer.masks.read_out())
        # The first token of each occurrence follows something else than in the other, so it says nothing.
        first, second = (
            torch.stack([s.nll[a : a + length - 1] for s in scores]).mean(1) for a in (1, length + 1)
        )
        right = torch.stack([s.correct[length + 1 :].double().mean() for s in scores])
        for name, values in (
            ("first occurrence", first),
            ("second occurrence", second),
            ("second - first", second - first),
            ("second occurrence, accuracy", right),
        ):
            _context_row(
                table, point, "repeat", name, values, dense, densities, len(twice) * (2 * length + 1)
            )
        if point in heads:
            continue
        nll = torch.stack([s.nll for s in scorer.score(long)])
        densities = study.selections.densities(point, scorer.masks.read_out())
        for low, high in zip(POSITIONS, POSITIONS[1:], strict=False):
            if low <= nll.shape[1]:
                name = f"{low}-{min(high - 1, nll.shape[1])}"
                _context_row(
                    table,
                    point,
                    "position",
                    name,
                    nll[:, low - 1 : high - 1].mean(1),
                    dense,
                    densities,
                    nll.numel(),
                )
        print(f"context: {point.mode}, {point.blocks}, density {point.density} done", flush=True)


def _context_row(
    table: Table,
    point: Point,
    kind: str,
    name: str,
    values: torch.Tensor,
    dense: dict[str, torch.Tensor],
    densities: dict[str, float],
    tokens: int,
) -> None:
    if point == DENSE:
        dense[name] = values
    value, value_se = mean_se(values)
    difference, difference_se = mean_se(values - dense[name])
    table.add(
        **point.keys,
        kind=kind,
        name=name,
        items=len(values),
        tokens=tokens,
        value=value,
        value_se=value_se,
        difference=difference,
        difference_se=difference_se,
        **densities,
    )


@contextmanager
def engine(study: Study, dtype: str, **settings: Any) -> Iterator[Any]:
    """As `vllm-dejavu evaluate` has it."""
    config = evaluate.EvaluateConfig(model=study.args.model, data=(), dtype=dtype, seed=study.args.seed)
    with evaluate._engine(config, predictor=study.args.predictor, seed=study.args.seed, **settings) as llm:
        yield llm


def part_generation(study: Study) -> None:
    """Continuations through the decode path, dense and sparse as served: a row a prompt."""
    table, args = fresh(study, "quality_generation"), study.args
    windows = study.windows(args.texts[0].split("=", 1)[1], None)
    settings = evaluate.EvaluateConfig(
        model=args.model, data=(), prompts=args.prompts, new_tokens=args.new_tokens, seed=args.seed
    )
    prompts = evaluate._prompts(windows, settings, study.seq_len)
    # In another dtype the dense model itself goes astray: how much of a divergence is rounding.
    runs = [("dense", args.engine_dtype), ("sparse", args.engine_dtype), ("dense", "float32")]
    first: dict[str, list[list[int]]] = {}
    baseline = ""
    scorer = study.masked(DENSE)
    for mode, dtype in runs:
        with engine(study, dtype, mode=mode) as llm:
            resolved = str(llm.model_config.dtype).removeprefix("torch.")
            if (mode, resolved) == ("dense", baseline):
                continue  # the same run again
            texts = {
                "greedy": evaluate._continue(llm, prompts, args.new_tokens, f"greedy, {mode} {resolved}"),
                "sampled": _sample(llm, prompts, args.new_tokens, args.seed),
            }
            served = metrics.summarize(llm.collective_rpc("dejavu_metrics"))
        if not first:
            first, baseline = texts, resolved
        for decoding, continuations in texts.items():
            scores = scorer.score(
                [Text((*p, *c), len(p)) for p, c in zip(prompts, continuations, strict=True)]
            )
            for i, (continuation, score) in enumerate(zip(continuations, scores, strict=True)):
                table.add(
                    decoding=decoding,
                    mode=mode,
                    dtype=resolved,
                    temperature=0.0 if decoding == "greedy" else TEMPERATURE,
                    prompt=i,
                    prompt_tokens=len(prompts[i]),
                    new_tokens=len(continuation),
                    batch=evaluate.BATCH,
                    agreement=evaluate._leading(first[decoding][i], continuation),
                    **{f"distinct_{n}": distinct(continuation, n) for n in (1, 2, 3)},
                    rep_4=1 - distinct(continuation, 4),
                    nll=float(score.nll.mean()),
                    mlp_density=served["mlp_density"],
                    head_density=served["head_density"],
                    sparse_step_share=served["sparse_step_share"],
                )


def _sample(llm: Any, prompts: list[list[int]], new_tokens: int, seed: int) -> list[list[int]]:
    """Seeded continuations at TEMPERATURE, in the same batches as greedy ones; a seed a prompt, so that two
    engines draw alike.
    """
    from vllm import SamplingParams

    out = []
    for start in range(0, len(prompts), evaluate.BATCH):
        part = prompts[start : start + evaluate.BATCH]
        params = [
            SamplingParams(
                max_tokens=new_tokens,
                temperature=TEMPERATURE,
                seed=seed + start + i,
                ignore_eos=True,
                detokenize=False,
            )
            for i in range(len(part))
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p in part], params, use_tqdm=False)
        out += [list(o.outputs[0].token_ids) for o in outputs]
    return out


def part_engine(study: Study) -> None:
    """The tasks through the shipped path at the artifact's own point, beside the same selection by masks."""
    table, dtype = fresh(study, "quality_engine"), study.args.score_dtype
    dense: dict[str, torch.Tensor] = {}
    for mode in ("dense", *SERVED):
        point = DENSE if mode == "dense" else Point(mode, "both", OWN)
        settings = {} if mode == "dense" else {"apply_to": "all", "measure": True, "blocks": list(BLOCKS)}
        masked = study.masked(point)
        with engine(study, dtype, mode=SERVED.get(mode, mode), **settings) as llm:
            for task in study.tasks:
                llm.collective_rpc("dejavu_reset_metrics")
                scores = EngineScorer(llm).score(task.texts)
                served = (
                    study.selections.densities(
                        point, metrics.summarize(llm.collective_rpc("dejavu_metrics"))["layers"]
                    )
                    if mode != "dense"
                    else None
                )
                beside = study.dense(task)[0] if mode == "dense" else masked.score(task.texts)
                simulated = study.selections.densities(point, masked.masks.read_out())
                served = served or simulated
                apart = (torch.cat([s.nll for s in scores]) - torch.cat([s.nll for s in beside])).abs()
                for name, measure in task.measures.items():
                    values, others = measure.values(scores), measure.values(beside)
                    dense.setdefault(name, values)
                    against, against_se = mean_se(values - others, task.strata)
                    table.add(
                        mode=mode,
                        task=name,
                        metric=measure.metric,
                        dtype=dtype,
                        **statistics(measure, values, dense[name], task.strata),
                        masked_value=float(others.mean()),
                        engine_minus_masked=against,
                        engine_minus_masked_se=against_se,
                        items_that_differ=(
                            int((values != others).sum()) if measure.metric == "accuracy" else None
                        ),
                        token_nll_apart_mean=float(apart.mean()),
                        token_nll_apart_max=float(apart.max()),
                        **served,
                        **{f"masked_{k}": v for k, v in simulated.items()},
                        tokens=task.num_tokens,
                    )
                print(f"engine: {mode}, {task.name} done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--predictor", help="artifact (MODEL/dejavu)")
    parser.add_argument("--train", help="text on which missing predictors are fitted")
    parser.add_argument("--calibration", help="text on which densities become thresholds")
    parser.add_argument(
        "--texts",
        nargs="+",
        metavar="NAME=FILE",
        help="scored by perplexity; the first also serves context and generation",
    )
    parser.add_argument("--lambada")
    parser.add_argument("--blimp")
    parser.add_argument("--piqa")
    parser.add_argument("--output", required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--blocks", nargs="+", choices=tuple(BLOCK_SETS), default=tuple(BLOCK_SETS))
    parser.add_argument("--densities", nargs="+", type=float, default=DENSITIES)
    parser.add_argument(
        "--items",
        type=int,
        default=160,
        help="of LAMBADA and PIQA; twice as many pairs of BLiMP, evenly over uids (%(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=10_000, help="of each text (%(default)s)")
    parser.add_argument("--train-tokens", type=int, default=65_536, help="(%(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=16_384, help="(%(default)s)")
    parser.add_argument(
        "--training-tokens",
        default="not stated",
        help="that the model was trained on, in words, for the card",
    )
    parser.add_argument("--passages", type=int, default=64, help="that come twice (%(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="(%(default)s)")
    parser.add_argument(
        "--engine-dtype", default="auto", help="of generation (%(default)s: the checkpoint's)"
    )
    parser.add_argument(
        "--score-dtype",
        default="float32",
        help="of the engine part (%(default)s, as the masks it is compared with)",
    )
    parser.add_argument("--device", default="cpu", help="of the masked model (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wanted = [p for p in PARTS if p in args.parts and p != "report"]
    if wanted:
        for name in ("model", "train", "calibration", "texts"):
            if not getattr(args, name):
                parser.error(f"--{name} is needed for {', '.join(wanted)}")
        if any("=" not in t for t in args.texts):
            parser.error("--texts are NAME=FILE")
        if any(not 0 < d < 1 for d in args.densities):
            parser.error("--densities are in (0, 1)")
        study = Study(args)
        for name in wanted:
            {
                "card": part_card,
                "sweep": part_sweep,
                "context": part_context,
                "generation": part_generation,
                "engine": part_engine,
            }[name](study)
            record(study, name)
    if "report" in args.parts:
        part_report(Path(args.output))


if __name__ == "__main__":
    main()
