"""The existence study's statistics, searches and accounts against brute force, without a model."""

import math

import existence_bytes
import existence_heads
import existence_oracle
import existence_predictability
import existence_search
import existence_statistics
import pytest
import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_auc_counts_pairs_and_halves_ties():
    scores = torch.randint(0, 6, (60,), generator=generator()).float()
    active = torch.rand(60, generator=generator(1)) < 0.3
    pairs = scores[active][:, None] - scores[~active][None, :]
    assert existence_statistics.auc(scores, active) == pytest.approx(
        float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    )
    assert math.isnan(existence_statistics.auc(scores, torch.zeros(60, dtype=torch.bool)))


@pytest.mark.parametrize("share", [0.1, 0.37, 0.625, 1.0])
def test_exactly_the_share_is_selected_the_best_first(share):
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0]).expand(5, 4)  # ties over tokens, as a static ranking has them
    kept = existence_statistics.selected_share(scores, share)
    assert float(kept.sum()) == pytest.approx(share * 20, abs=1e-4)
    assert float(kept.min()) >= 0 and float(kept.max()) <= 1
    assert not ((kept[:, 0] < 1) & (kept[:, 2] > 0)).any() and not ((kept[:, 2] < 1) & (kept[:, 1] > 0)).any()


def test_spearman_is_the_correlation_of_ranks_with_ties_shared():
    a, b = torch.tensor([1.0, 5.0, 2.0, 2.0, 9.0]), torch.tensor([3.0, 1.0, 4.0, 5.0, 0.0])
    rank_a, rank_b = torch.tensor([0, 3, 1.5, 1.5, 4]).double(), torch.tensor([2, 1, 3, 4, 0]).double()
    assert existence_statistics.ranks(a).tolist() == rank_a.tolist()
    assert existence_statistics.spearman(a, b) == pytest.approx(
        float(torch.corrcoef(torch.stack([rank_a, rank_b]))[0, 1])
    )
    assert existence_statistics.spearman(a, a**3) == pytest.approx(1)


def test_errors_of_a_ratio_shrink_to_those_of_a_mean_when_the_denominator_is_constant():
    above = torch.rand(12, generator=generator())
    value, error = existence_statistics.ratio_error(above, torch.full((12,), 2.0))
    mean, mean_error = existence_statistics.mean_error(above / 2)
    assert (value, error) == (pytest.approx(mean), pytest.approx(mean_error))
    assert existence_statistics.ratio_error(above, above)[1] == pytest.approx(0, abs=1e-12)


def test_histogram_thresholds_keep_the_density():
    values = torch.randn(4000, generator=generator()).exp() * (torch.rand(4000, generator=generator(1)) < 0.3)
    histogram = existence_statistics.LogHistogram()
    for part in values.split(700):
        histogram.add(part)
    for density in (0.01, 0.05, 0.2):
        kept = float((values > histogram.threshold(density)).float().mean())
        assert density * 0.97 - 1e-3 <= kept <= density + 1e-6
    assert histogram.threshold(0.4) == 0.0  # no more than 0.3 are positive


def test_bisection_finds_the_lowest_density_within_the_budget():
    found = existence_oracle.lowest_density(lambda d: 0.002 / d, 0.01, 1.0, 0.01, tolerance=1.01)
    assert 0.2 <= found < 0.2 * 1.01
    assert existence_oracle.lowest_density(lambda d: 1.0, 0.01, 0.7, 0.01) == 0.7


def test_bytes_by_hand():
    weights = existence_bytes.Weights(
        hidden=8, ffn=32, layers=2, bias=False, norms=0, outside=100, stored=2 * 12 * 64 + 150
    )
    row = existence_bytes.bytes_row(weights, "point", 0.25, 0.5)
    # K and V whole, half of Q and of out_proj; a quarter of fc1 and fc2.
    read = 2 * (2 * 64 + 0.5 * 64 + 0.5 * 64 + 0.25 * 2 * 8 * 32)
    assert row["layers_read"] == pytest.approx(read / (2 * 12 * 64))
    assert row["paper_read"] == pytest.approx((0.5 * 4 * 64 + 0.25 * 2 * 256) / (12 * 64))
    assert row["model_read"] == pytest.approx((read + 100) / weights.stored)
    assert row["model_fewer"] == pytest.approx((2 * 12 * 64 + 100) / (read + 100))
    assert existence_bytes.bytes_row(weights, "paper", 0.15, 0.15)["paper_fewer"] == pytest.approx(1 / 0.15)
    with_predictor = existence_bytes.bytes_row(weights, "point", 0.25, 0.5, columns=0.1, predictor=60)
    assert with_predictor["layers_read"] == pytest.approx((read - 2 * 0.15 * 256 + 60) / (2 * 12 * 64))


def test_token_table_is_the_mean_by_token_backed_off():
    ids, units = torch.tensor([7, 3, 9, 3]), 5
    table = existence_predictability.TokenTable(ids, units)
    tokens = torch.tensor([3, 3, 1, 7, 3, 12])  # 9 is never met; 1 and 12 are not asked for
    values = torch.rand(6, units, generator=generator()) < 0.5
    table.add(tokens[:4], values[:4])
    table.add(tokens[4:], values[4:])
    overall = values.float().mean(0)
    torch.testing.assert_close(table.overall(), overall)
    for row, token in zip(table.rate(ids), ids.tolist(), strict=True):
        mine = values[tokens == token].float()
        torch.testing.assert_close(
            row,
            (mine.sum(0) + existence_predictability.BACKOFF * overall)
            / (len(mine) + existence_predictability.BACKOFF),
        )


def test_augmented_vectors_are_nearest_where_the_inner_product_is_largest():
    database, query = (
        torch.randn(50, 6, generator=generator()).numpy(),
        torch.randn(9, 6, generator=generator(1)).numpy(),
    )
    wide = torch.from_numpy(existence_search.to_l2(database))
    distances = torch.cdist(torch.nn.functional.pad(torch.from_numpy(query), (0, 1)), wide)
    assert torch.equal(
        distances.argsort(1)[:, :8], torch.from_numpy(query @ database.T).argsort(1, descending=True)[:, :8]
    )


def test_one_threshold_after_one_scale():
    """Scales that integer predictors carry do not matter to the order."""
    z = torch.randn(400, 30, generator=generator()) - 1
    noisy = z + 0.3 * torch.randn(400, 30, generator=generator(1))
    scales = torch.rand(30, generator=generator(2)) * 50 + 0.1
    plain, scaled = (
        existence_search.one_scale(s[:200], s[200:], z[200:]) for s in (noisy, noisy * scales + 3)
    )
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-3)
    assert existence_statistics.auc(plain, z[:200] > 0) > existence_statistics.auc(
        (noisy * scales)[:200], z[:200] > 0
    )


def test_density_at_recall_by_brute_force():
    scores, active = torch.rand(200, generator=generator()), torch.rand(200, generator=generator(1)) < 0.2
    for recall in (0.1, 0.5, 0.9, 1.0):
        best = min(
            float((scores >= t).float().mean())
            for t in scores
            if float((scores[active] >= t).float().mean()) >= recall - 1e-9
        )
        assert existence_search.density_at_recall(scores, active, recall) == pytest.approx(best)


def test_missing_ids_select_nothing():
    import numpy as np

    mask = existence_search.mask_of(np.array([[0, 2], [-1, 3]]), 4)
    assert mask.tolist() == [[True, False, True, False], [False, False, False, True]]


def test_map_statistics_of_known_maps():
    length = 20
    visible = torch.arange(1, length + 1)
    uniform = torch.tril(torch.ones(length, length)) / visible[:, None]
    first = torch.zeros(length, length)
    first[:, 0] = 1
    found = existence_heads.map_statistics(torch.stack([uniform, first])[None])
    torch.testing.assert_close(found["entropy"][0, 0, 1:], torch.ones(length - 1))
    torch.testing.assert_close(found["entropy"][0, 1, 1:], torch.zeros(length - 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found["bos"][0], torch.stack([1 / visible, torch.ones(length)]))
    # A tenth of 10 tokens is one, of 11 two (rounded up), of 20 two.
    assert [round(float(found["top"][0, 0, i]) * (i + 1)) for i in (8, 9, 10, 19)] == [1, 1, 2, 2]
    torch.testing.assert_close(found["top"][0, 1], torch.ones(length))
