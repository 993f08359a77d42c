"""Searches of the existence study's part `neighbours`: exact and approximate, and what a predictor's scores
take to be compared with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from existence_statistics import ascending

# HNSW: links a vector, candidates while building (faiss's default), searched candidates as multiples of k.
# IVF: probed shares of the lists.
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 40, (1, 2, 4)
IVF_PROBES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


def with_bias(fc1: torch.Tensor, bias: torch.Tensor) -> np.ndarray:
    """Neurons as database vectors: the inner product with [x, 1] is the pre-activation."""
    return torch.cat([fc1, bias[:, None]], 1).float().contiguous().numpy()


def with_one(x: torch.Tensor) -> np.ndarray:
    return torch.cat([x.float(), torch.ones(len(x), 1)], 1).contiguous().numpy()


def to_l2(database: np.ndarray) -> np.ndarray:
    """One more coordinate that gives all vectors the same norm: the nearest by distance to [query, 0] has the
    largest inner product.
    """
    squares = (database.astype(np.float64) ** 2).sum(1)
    return np.concatenate([database, np.sqrt(squares.max() - squares)[:, None]], 1).astype(np.float32)


@dataclass
class Search:
    """A way to look neurons up: `ids(queries [T, hidden + 1], k)` gives [T, k], -1 where there are fewer."""

    method: str
    setting: str
    ids: Callable[[np.ndarray, int], np.ndarray]
    build_s: float


def searches(faiss: Any, database: np.ndarray, k: int) -> list[Search]:
    """Exact and approximate inner-product searches over one database."""
    count, width = database.shape
    found = []

    def build(make: Callable[[], Any], vectors: np.ndarray) -> tuple[Any, float]:
        start = time.perf_counter()
        index = make()
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
        return index, time.perf_counter() - start

    flat, seconds = build(lambda: faiss.IndexFlatIP(width), database)
    found.append(Search("exact", "IndexFlatIP", lambda q, k: flat.search(q, k)[1], seconds))

    def hnsw(metric: int, wide: int) -> Any:
        index = faiss.IndexHNSWFlat(wide, HNSW_LINKS, metric)
        index.hnsw.efConstruction = HNSW_BUILD
        return index

    graph, seconds = build(lambda: hnsw(faiss.METRIC_INNER_PRODUCT, width), database)
    spheres, seconds_l2 = build(lambda: hnsw(faiss.METRIC_L2, width + 1), to_l2(database))
    for multiple in HNSW_SEARCH:
        candidates = max(16, multiple * k)
        parameters = faiss.SearchParametersHNSW(efSearch=candidates)
        found.append(
            Search(
                "HNSW, inner product",
                f"efSearch {candidates}",
                lambda q, k, p=parameters: graph.search(q, k, params=p)[1],
                seconds,
            )
        )
        found.append(
            Search(
                "HNSW, L2 by augmentation",
                f"efSearch {candidates}",
                lambda q, k, p=parameters: spheres.search(np.pad(q, ((0, 0), (0, 1))), k, params=p)[1],
                seconds_l2,
            )
        )
    lists = max(1, round(math.sqrt(count)))

    def ivf() -> Any:
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = (
            1  # it warns below 39; a list holds about as many vectors as there are lists
        )
        return index

    inverted, seconds = build(ivf, database)
    for share in IVF_PROBES:
        probes = max(1, round(share * lists))
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        found.append(
            Search(
                "IVF",
                f"nprobe {probes} of {lists}",
                lambda q, k, p=parameters: inverted.search(q, k, params=p)[1],
                seconds,
            )
        )
    return found


def mask_of(ids: np.ndarray, units: int) -> torch.Tensor:
    """[T, k] of ids, -1 for none -> [T, units], bool."""
    mask = torch.zeros(len(ids), units + 1, dtype=torch.bool)
    mask.scatter_(1, torch.from_numpy(np.where(ids < 0, units, ids)), True)
    return mask[:, :units]


def one_scale(scores: torch.Tensor, other_scores: torch.Tensor, other_z: torch.Tensor) -> torch.Tensor:
    """Scores comparable between neurons, in residual standard deviations: integer predictors carry a scale
    for every neuron.

    Args:
        scores: [T, ffn]. other_scores, other_z: of other text, for a regression of the pre-activation on the
            score, a neuron each.
    """
    s, true = other_scores.double(), other_z.double()
    s_mean, z_mean = s.mean(0), true.mean(0)
    variance = (s - s_mean).square().mean(0).clamp_min(1e-30)
    slope = ((s - s_mean) * (true - z_mean)).mean(0) / variance
    left = (true - z_mean - slope * (s - s_mean)).square().mean(0)
    floor = 1e-3 * (true - z_mean).square().mean(0).clamp_min(1e-30)
    return ((z_mean + slope * (scores.double() - s_mean)) / torch.maximum(left, floor).sqrt()).float()


def density_at_recall(scores: torch.Tensor, active: torch.Tensor, recall: float) -> float:
    """Share of units above the one threshold that catches this share of the active ones."""
    caught = ascending(scores[active])
    if not len(caught):
        return math.nan
    missed = min(len(caught) - 1, len(caught) - math.ceil(recall * len(caught) - 1e-9))
    return float((scores >= caught[missed]).float().mean())
