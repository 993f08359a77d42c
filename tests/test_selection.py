"""Selections, predictors, and the sums made of counters."""

import pytest
import torch
from fuzz import fuzz
from hypothesis import given
from hypothesis import strategies as st

from vllm_dejavu import metrics
from vllm_dejavu.kernels import reference
from vllm_dejavu.predictor import Predictor, gate_input
from vllm_dejavu.selection import (
    contributions,
    head_contributions,
    head_grams,
    random_mask,
    static_units,
)

IDS = torch.arange(1024)


@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.97, 1.0])
def test_random_selections_have_their_density(density):
    mask = random_mask(torch.arange(400), 3, IDS, density, seed=1)
    spread = 6 * (density * (1 - density) / mask.numel()) ** 0.5
    assert abs(float(mask.float().mean()) - density) <= spread
    # no unit and no position is favoured
    assert float((mask.float().mean(0) - density).abs().max()) <= 6 * (density * (1 - density) / 400) ** 0.5
    assert float((mask.float().mean(1) - density).abs().max()) <= 6 * (density * (1 - density) / 1024) ** 0.5


def test_random_selections_depend_on_position_alone():
    """Not on the batch, and tensor-parallel ranks select what one rank selects."""
    whole = random_mask(torch.arange(50), 2, IDS, 0.3, seed=5)
    assert torch.equal(random_mask(torch.tensor([49, 7, 7]), 2, IDS, 0.3, seed=5), whole[[49, 7, 7]])
    halves = [
        random_mask(torch.arange(50), 2, IDS[s], 0.3, seed=5) for s in (slice(0, 512), slice(512, 1024))
    ]
    assert torch.equal(torch.cat(halves, 1), whole)


def test_random_selections_of_other_seeds_layers_and_positions_are_unrelated():
    """Two of them agree as often as two coins do, 0.3² + 0.7² of the time; also where the numbers are
    swapped.
    """
    base = random_mask(torch.arange(50), 2, IDS, 0.3, seed=5)
    others = {
        "seed": random_mask(torch.arange(50), 2, IDS, 0.3, seed=6),
        "layer": random_mask(torch.arange(50), 1, IDS, 0.3, seed=5),
        "seed and layer": random_mask(torch.arange(50), 5, IDS, 0.3, seed=2),
        "position": random_mask(torch.arange(1, 51), 2, IDS, 0.3, seed=5),
        "unit": random_mask(torch.arange(50), 2, IDS + 1, 0.3, seed=5),
    }
    for what, other in others.items():
        agreement = float((other == base).float().mean())
        assert abs(agreement - 0.58) <= 6 * (0.58 * 0.42 / base.numel()) ** 0.5, what


@pytest.mark.parametrize(("density", "count"), [(0.0, 0), (0.1, 1), (0.5, 5), (1.0, 10)])
def test_static_selection_takes_the_most_active(density, count):
    rate = torch.tensor([0.1, 0.9, 0.3, 0.9, 0.0, 0.2, 0.8, 0.7, 0.6, 0.5])
    mask = static_units(rate, density)
    assert int(mask.sum()) == count
    assert not count or float(rate[mask].min()) >= float(rate[~mask].max() if count < 10 else 0)


def test_head_contributions_are_norms_after_out_proj():
    g = torch.Generator().manual_seed(0)
    attn, weight = torch.randn(7, 3, 8, generator=g), torch.randn(20, 24, generator=g)
    explicit = torch.stack([(attn[:, h] @ weight[:, 8 * h : 8 * h + 8].T).norm(dim=1) for h in range(3)], 1)
    assert torch.allclose(head_contributions(attn, head_grams(weight, 3)), explicit, rtol=1e-4)
    assert torch.allclose(contributions(attn, weight), explicit, rtol=1e-4)


@fuzz(100)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**31))
def test_the_rule_is_score_above_zero_on_valid_rows(rows, units, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-1, 2, (rows, units), generator=g).float()
    valid = torch.randint(0, 2, (rows,), generator=g).bool()
    mask = reference.select(scores, valid)
    assert mask.tolist() == [
        [s > 0 and v for s in row] for row, v in zip(scores.tolist(), valid.tolist(), strict=True)
    ]
    expected = [u for u in range(units) if any(row[u] for row in mask.tolist())]
    assert reference.listed(reference.compact_union(mask)).tolist() == expected


class TestGateInput:
    block, attn, previous = torch.ones(1), torch.zeros(1), torch.full((1,), 2.0)

    @pytest.mark.parametrize(("lookahead", "value"), [("self", 1.0), ("attn_input", 0.0), ("previous", 2.0)])
    def test_names(self, lookahead, value):
        assert (
            float(gate_input(lookahead, block_input=self.block, attn_input=self.attn, previous=self.previous))
            == value
        )

    def test_nothing_lies_before_the_first_layer(self):
        with pytest.raises(ValueError, match="needs a layer in front"):
            gate_input("previous", block_input=self.block, attn_input=self.attn, previous=None)

    def test_unknown(self):
        with pytest.raises(ValueError, match="'next' is unknown"):
            gate_input("next", block_input=self.block, attn_input=self.attn, previous=None)


@pytest.mark.parametrize("low_rank", [True, False], ids=["low-rank", "linear"])
def test_a_ranks_predictor_scores_its_own_units(low_rank):
    def rand(*shape):
        return torch.randn(*shape, generator=g)

    g = torch.Generator().manual_seed(0)
    tensors = {"bias": rand(12), "activation_rate": rand(12).sigmoid()}
    tensors |= (
        {"down": rand(4, 16).half(), "up": rand(12, 4).half()}
        if low_rank
        else {"weight": rand(12, 16).half()}
    )
    x = rand(5, 16)
    whole = Predictor(tensors)
    parts = [Predictor(tensors, start, 4).scores(x) for start in (0, 4, 8)]
    assert torch.allclose(torch.cat(parts, 1), whole.scores(x), atol=1e-5)
    assert not whole.state_dict(), "no loader of model weights may reach the predictors"


def snapshot(gates, steps=(8, 2, 0, 0, 0, 0)):
    names = ("layer", "block", "units", *metrics.GATE_COUNTERS)
    gates = [(*g, *[0] * (len(names) - len(g))) for g in gates]
    return {
        "mode": "sparse",
        "weight_bits": 16,
        "lm_head_bits": 16,
        "num_layers": 2,
        "dense_switch": False,
        "predictor_bytes": 7,
        "steps": dict(zip(metrics.STEP_REASONS, steps, strict=True)),
        "gates": [{"calibrated": {"density": 0.25}} | dict(zip(names, g, strict=True)) for g in gates],
        "artifact": {},
    }


def test_densities_of_one_rank():
    s = metrics.summarize([snapshot([(0, "mlp", 10, 8, 16, 40, 32, 24, 8, 6, 20, 15)])])
    mlp = s["layers"][0]["mlp"]
    assert (
        mlp["density"] == 40 / 160 and mlp["read_density"] == 32 / 80 and mlp["survived_density"] == 24 / 80
    )
    assert mlp["cache_density"] == 6 / 8
    assert mlp["recall"] == 15 / 20 and s["sparse_step_share"] == 0.8
    assert mlp["calibrated"] == {"density": 0.25} and s["predictor_bytes"] == 7
    assert (
        s["layers"][1]["mlp"]["density"] == 1.0
        and s["mlp_density"] == (0.25 + 1) / 2
        and s["head_density"] == 1.0
    )


def test_tensor_parallel_ranks_add_their_units_not_their_steps():
    ranks = [
        snapshot([(0, "mlp", 5, 8, 16, *units, 3, 4, *sampled)])
        for units, sampled in (
            ((30, 20, 10, 8, 4, 0, 0), (6, 8, 4)),
            ((10, 12, 14, 4, 1, 0, 0), (2, 2, 2)),
        )
    ]
    summary = metrics.summarize(ranks)
    mlp = summary["layers"][0]["mlp"]
    assert mlp["cache_density"] == 5 / 12
    assert (
        mlp["above_crossover"] == 3
        and mlp["sampled_density"] == 8 / 40
        and mlp["sampled_recall"] == 6 / 10
        and summary["predictor_bytes"] == 14
    )
    assert (
        mlp["units"] == 10
        and mlp["steps"] == 8
        and mlp["density"] == 40 / 160
        and mlp["read_density"] == 32 / 80
    )


def test_nothing_counted_is_none_not_zero():
    s = metrics.summarize([snapshot([(0, "mlp", 10, 0, 0, 0, 0, 0, 0, 0)], steps=(0,) * 6)])
    assert (
        s["layers"][0]["mlp"]["density"] is None
        and s["mlp_density"] is None
        and s["sparse_step_share"] is None
    )
