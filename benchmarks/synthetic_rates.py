"""How often each synthetic neuron is selected: rates whose unions over a batch follow a published profile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy

from vllm_dejavu.published import GEOMETRIES, preset_densities

PROFILE_BATCHES = (1, 8, 64)


@dataclass(frozen=True)
class Rates:
    """Neuron rates: a share `hot` of the neurons is selected always, the others at rates from Beta(a, b)."""

    a: float
    b: float
    hot: float

    def union(self, batch: int) -> float:
        """Expected share selected by any of `batch` independent tokens."""
        a, b = self.a, self.b
        unselected = math.exp(
            math.lgamma(b + batch) - math.lgamma(b) + math.lgamma(a + b) - math.lgamma(a + b + batch)
        )
        return self.hot + (1 - self.hot) * (1 - unselected)

    def draw(self, units: int, generator: numpy.random.Generator) -> numpy.ndarray:
        rates = generator.beta(self.a, self.b, units)
        rates[generator.permutation(units)[: round(self.hot * units)]] = 1.0
        return rates.clip(1e-12, 1 - 1e-9)


def fit_rates(profile: Mapping[int, float]) -> Rates:
    """Rates whose unions follow {batch: share selected by any token}: least squares of the log ratios, by
    compass search.

    Without the hot neurons no Beta follows published profiles to better than 10 to 18%; with them, three
    points are met exactly and those between and beyond come out within 5% of Polar's table.
    """

    def rates(place: list[float]) -> Rates:
        return Rates(math.exp(place[0]), math.exp(place[1]), 1 / (1 + math.exp(-place[2])))

    def error(place: list[float]) -> float:
        if max(map(abs, place)) > 20:
            return math.inf
        return sum(math.log(rates(place).union(batch) / target) ** 2 for batch, target in profile.items())

    mean = profile[min(profile)]
    place, step = [math.log(0.4), math.log(0.4 * (1 - mean) / mean), math.log(mean / 2)], 1.0
    best = error(place)
    while step > 1e-5:
        moves = [[v + s * (i == j) for j, v in enumerate(place)] for i in range(3) for s in (step, -step)]
        value, move = min((error(move), move) for move in moves)
        if value < best:
            best, place = value, move
        else:
            step /= 2
    return rates(place)


def profile_of(name: str) -> tuple[dict[int, float], float, str]:
    """({batch: MLP union density}, heads per sequence, where they come from) of a geometry; see
    published.py.
    """
    known = name if name in GEOMETRIES else "6.7b"
    _, heads, source = preset_densities(known, 1)
    if known != name:
        source = f"assumed: {known} stands in"
    name = known
    return {batch: preset_densities(name, batch)[0] for batch in PROFILE_BATCHES}, heads, source


def scale_profile(profile: Mapping[int, float], density: float) -> dict[int, float]:
    """The profile with another density of one token.

    Every union u becomes 1 - (1 - u)^k with the k that makes it `density` at batch 1: as if each token were k
    tokens of the profile. So unions stay below 1 and keep their order; small ones scale nearly in proportion.
    """
    if density >= 1:
        return dict.fromkeys(profile, 1.0)
    k = math.log1p(-density) / math.log1p(-profile[1])
    return {batch: density if batch == 1 else 1 - (1 - union) ** k for batch, union in profile.items()}


def target(
    name: str, mlp_density: float | None, head_density: float | None
) -> tuple[dict[int, float], float, str]:
    """`profile_of`, with the densities of one token that were asked for; None: the geometry's own."""
    profile, heads, source = profile_of(name)
    if mlp_density is not None:
        profile, source = (
            scale_profile(profile, mlp_density),
            f"{source}; unions scaled to {mlp_density:g} at batch 1",
        )
    if head_density is not None:
        heads, source = head_density, f"{source}; heads {head_density:g} asked for"
    return profile, heads, source
