"""What quality.py and its report share: names of points; tasks and statistics: what is scored, by whatever
computes log-likelihoods, and what is made of the scores."""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vllm_dejavu.config import BLOCKS
from vllm_dejavu.predictor_training import data

MODES = ("oracle", "predictor", "random", "static")
BLOCK_SETS = {"mlp": ("mlp",), "attention": ("attention",), "both": BLOCKS}
NAMES = {"mlp": "MLP only", "attention": "heads only", "both": "MLP and heads"}
# Density of a point that the artifact's own calibration defines, layer by layer, as it is served.
OWN = "artifact"
PASSAGE = 128  # tokens that come twice
TEMPERATURE = 0.8  # of sampled generation

# --- scores
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Token ids, BOS first; those from `start` on (at least 1) are scored, given all before them."""

    tokens: tuple[int, ...]
    start: int = 1


@dataclass(frozen=True)
class Score:
    """Of the scored tokens of a text: nll [n] in nats, fp64, and whether each was the most likely one:
    correct [n], bool.
    """

    nll: torch.Tensor
    correct: torch.Tensor


class Scorer(Protocol):
    """Teacher-forced scores; the tasks know nothing else of a model."""

    def score(self, texts: Sequence[Text]) -> list[Score]:
        """In the order of `texts`."""
        ...


@dataclass(frozen=True)
class Measure:
    """A number an item has, made of the scores of all of a task's texts.

    Attributes:
        metric: "nll" (nats; less is better) or "accuracy" (0 or 1). chance: accuracy of guessing; None where
            guessing has none.
    """

    metric: str
    values: Callable[[list[Score]], torch.Tensor]
    chance: float | None = None


@dataclass(frozen=True)
class Task:
    """Texts and what is measured on them.

    Attributes:
        measures: name -> Measure, each giving a value an item. strata: item -> group drawn evenly (BLiMP's
            uid), or empty.
        fields: group -> the field it belongs to.
    """

    name: str
    texts: list[Text]
    measures: dict[str, Measure]
    strata: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(len(t.tokens) for t in self.texts)


def text_task(name: str, windows: torch.Tensor) -> Task:
    """Perplexity of windows [count, seq_len] that begin with BOS; the window is the item."""
    texts = [Text(tuple(row)) for row in windows.tolist()]
    return Task(
        name, texts, {name: Measure("nll", lambda scores: torch.stack([s.nll.mean() for s in scores]))}
    )


def lambada_task(rows: Sequence[dict[str, Any]], tokenizer: Any, bos: int, longest: int) -> Task:
    """The last word, behind all of the text in front of it: right when greedy decoding would write every
    token of it.
    """
    split = [row["text"].strip().rsplit(" ", 1) for row in rows]
    contexts = data.tokenize([c for c, _ in split], tokenizer)
    words = data.tokenize([" " + w for _, w in split], tokenizer)
    texts = [_text(bos, c, w, longest) for c, w in zip(contexts, words, strict=True)]
    return Task(
        "lambada",
        texts,
        {
            "lambada": Measure(
                "accuracy",
                lambda scores: torch.tensor([float(s.correct.all()) for s in scores], dtype=torch.float64),
            ),
            "lambada_nll": Measure("nll", lambda scores: torch.stack([s.nll.sum() for s in scores])),
        },
    )


def blimp_task(rows: Sequence[dict[str, Any]], tokenizer: Any, bos: int, longest: int) -> Task:
    """Minimal pairs: right when the good sentence is more likely than the bad one."""
    sentences = data.tokenize([row[kind] for row in rows for kind in ("good", "bad")], tokenizer)
    texts = [_text(bos, [], s, longest) for s in sentences]

    def right(scores: list[Score]) -> torch.Tensor:
        total = torch.stack([s.nll.sum() for s in scores]).view(-1, 2)
        return (total[:, 0] < total[:, 1]).double()

    return Task(
        "blimp",
        texts,
        {"blimp": Measure("accuracy", right, 0.5)},
        [r["uid"] for r in rows],
        {r["uid"]: r["field"] for r in rows},
    )


def piqa_task(rows: Sequence[dict[str, Any]], tokenizer: Any, bos: int, longest: int) -> Task:
    """Two ends of "Question: GOAL\\nAnswer:": right when the labelled one is more likely, as a whole or by
    its characters.
    """
    goals = data.tokenize([f"Question: {row['goal']}\nAnswer:" for row in rows], tokenizer)
    ends = [" " + row[f"sol{i}"].strip() for row in rows for i in (1, 2)]
    texts = [_text(bos, goals[i // 2], end, longest) for i, end in enumerate(data.tokenize(ends, tokenizer))]
    labels = torch.tensor([int(row["label"]) for row in rows])
    characters = torch.tensor([len(end) for end in ends], dtype=torch.float64)

    def right(scores: list[Score], by: torch.Tensor) -> torch.Tensor:
        total = (torch.stack([s.nll.sum() for s in scores]) / by).view(-1, 2)
        return (total.argmin(1) == labels).double()

    return Task(
        "piqa",
        texts,
        {
            "piqa": Measure("accuracy", lambda scores: right(scores, torch.ones_like(characters)), 0.5),
            "piqa_norm": Measure("accuracy", lambda scores: right(scores, characters), 0.5),
        },
    )


def _text(bos: int, context: list[int], scored: list[int], longest: int) -> Text:
    """BOS, context and what is scored; of a text that is too long, the beginning of the context is left
    out.
    """
    if not scored:
        raise data.DataError("a text to be scored has no tokens")
    scored = scored[: longest - 1]
    room = longest - 1 - len(scored)
    context = context[max(0, len(context) - room) :]
    return Text((bos, *context, *scored), 1 + len(context))


def read_jsonl(path: str) -> Iterator[dict[str, Any]]:
    """Objects of a `.jsonl` file, also `.xz` or `.gz`.

    Raises:
        DataError: a line is not an object.
    """
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line) if line.strip() else None
            if row is not None and not isinstance(row, dict):
                raise data.DataError(
                    f"{path}, line {number}: expected a JSON object, found {type(row).__name__}."
                )
            if row is not None:
                yield row


def subsample(
    rows: Sequence[Any], count: int | None, seed: int, group: Callable[[Any], str] = lambda row: ""
) -> list[Any]:
    """`count` rows by a seeded draw, as evenly over groups as whole numbers allow (never fewer than one
    each), in their order.
    """
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[group(row)].append(i)
    if count is None or not groups:
        return list(rows)
    each = max(1, round(count / len(groups)))
    chosen = [i for g in sorted(groups) for i in np.random.default_rng(seed).permutation(groups[g])[:each]]
    return [rows[i] for i in sorted(chosen)]


# --- statistics
# ----------------------------------------------------------------------------------------------------


def mean_se(values: torch.Tensor, strata: Sequence[str] = ()) -> tuple[float, float]:
    """Mean over items and its standard error; NaN from a single item.

    Args:
        strata: item -> group. Groups are given, not drawn: their differences are no error. Where some group
            has one item only, its own spread is unknown and all items count as one group.
    """
    values, n = values.double(), len(values)
    if n < 2:
        return float(values.mean()), math.nan
    groups = defaultdict(list)
    for value, name in zip(values.tolist(), strata, strict=bool(strata)):
        groups[name].append(value)
    if not groups or min(map(len, groups.values())) < 2:
        return float(values.mean()), float(values.std()) / math.sqrt(n)
    variance = sum(len(g) * float(torch.tensor(g, dtype=torch.float64).var()) for g in groups.values()) / n**2
    return float(values.mean()), math.sqrt(variance)


def statistics(
    measure: Measure, values: torch.Tensor, dense: torch.Tensor, strata: Sequence[str] = ()
) -> dict[str, float]:
    """Columns of a row: the mean, its paired difference to dense, standard errors of both, and for nll also
    perplexities.

    Errors of exp(mean) by the delta method.
    """
    value, value_se = mean_se(values, strata)
    difference, difference_se = mean_se(values - dense, strata)
    out = {
        "items": len(values),
        "value": value,
        "value_se": value_se,
        "difference": difference,
        "difference_se": difference_se,
    }
    if measure.metric == "nll":
        out |= {"perplexity": math.exp(value), "perplexity_se": math.exp(value) * value_se}
        out |= {
            "ppl_increase": math.expm1(difference),
            "ppl_increase_se": math.exp(difference) * difference_se,
        }
    return out


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(tokens: Sequence[int], n: int) -> float:
    """Share of n-grams that are different ones; 1 - distinct(tokens, 4) is rep-4. NaN of fewer than n
    tokens.
    """
    found = ngrams(tokens, n)
    return len(set(found)) / len(found) if found else math.nan
