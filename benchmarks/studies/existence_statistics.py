"""Statistics of the existence study: means with their errors, AUC and ranks, thresholds out of histograms."""

from __future__ import annotations

import math

import numpy as np
import torch


def mean_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error over independent values (windows); NaN error of fewer than two."""
    values = values.double()
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def ratio_error(above: torch.Tensor, below: torch.Tensor) -> tuple[float, float]:
    """sum(above) / sum(below) over windows, and its standard error (linearised)."""
    above, below = above.double(), below.double()
    if not float(below.sum()):
        return math.nan, math.nan
    ratio = float(above.sum() / below.sum())
    left = (above - ratio * below).square().sum()
    n = len(above)
    return ratio, float((left / (n - 1) / n).sqrt() / below.mean()) if n > 1 else math.nan


def rise(sparse: torch.Tensor, dense: torch.Tensor) -> tuple[float, float]:
    """Relative rise of perplexity and its standard error, paired by window. Arguments: mean nats of each
    window.
    """
    mean, error = mean_error(sparse - dense)
    return math.expm1(mean), error * math.exp(mean)


def ascending(values: torch.Tensor) -> torch.Tensor:
    # numpy sorts several times faster on a CPU.
    return values.sort().values if values.is_cuda else torch.from_numpy(np.sort(values.numpy()))


def auc(scores: torch.Tensor, active: torch.Tensor) -> float:
    """How often an active pair scores above an inactive one, ties counting half; NaN where there are no such
    pairs.
    """
    positive, negative = scores[active], ascending(scores[~active])
    if not len(positive) or not len(negative):
        return math.nan
    positive = ascending(positive)  # neighbours look in the same place
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().sum() / 2 / len(positive) / len(negative))


def selected_share(scores: torch.Tensor, share: float) -> torch.Tensor:
    """How much of each unit is selected if exactly `share` of all are, the best first: 1, 0, or a fraction
    where scores tie at the edge.
    """
    wanted, count = share * scores.numel(), scores.numel()
    edge = ascending(scores.flatten())[min(count - 1, int((1 - share) * count))]
    above, tied = scores > edge, scores == edge
    fraction = (wanted - float(above.sum())) / float(tied.sum())
    return above.float() + tied * min(1.0, max(0.0, fraction))


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, the same mean rank where values tie."""
    _, place, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts + 1) / 2)[place].double()


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a.flatten()), ranks(b.flatten())]))[0, 1])


class LogHistogram:
    """Counts of non-negative values by their logarithm: gives the threshold of any density without keeping
    values.
    """

    LOW, HIGH, BINS = -9.0, 6.0, 8192  # decimal exponents: neighbouring thresholds differ by 0.4%

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)
        self.total = 0

    def add(self, values: torch.Tensor) -> None:
        exponents = values[values > 0].float().log10().clamp(self.LOW, self.HIGH)
        self.counts += torch.histc(exponents, self.BINS, self.LOW, self.HIGH).double().cpu()
        self.total += values.numel()

    def positive_share(self) -> float:
        return float(self.counts.sum()) / self.total

    def threshold(self, density: float) -> float:
        """The lowest edge above which at most `density` of all values lie; 0 if no more than that are
        positive.
        """
        if float(self.counts.sum()) <= density * self.total:
            return 0.0
        above = self.counts.flip(0).cumsum(0).flip(0)  # from each bin's lower edge on
        first = int((above > density * self.total).sum())
        return 10 ** (self.LOW + first * (self.HIGH - self.LOW) / self.BINS)
