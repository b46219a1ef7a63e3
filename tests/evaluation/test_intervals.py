"""The intervals of a comparison against formulas and references, and where little changed."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, chi2, norm, t

from llmtune.evaluation.intervals import (
    joint_interval,
    mcnemar_mid_p,
    paired_interval,
    score_interval,
)
from llmtune.evaluation.stats import Resampling

FAST = Resampling(samples=1000)


def changes(gained: int, lost: int, n: int, size: float = 1.0) -> np.ndarray:
    return size * np.array([1.0] * gained + [-1.0] * lost + [0.0] * (n - gained - lost))


def test_score_interval_without_a_change_is_the_closed_form():
    z2 = chi2.ppf(0.95, 1)
    assert score_interval(0, 0, 40, 0.95) == pytest.approx((-z2 / (40 + z2), z2 / (40 + z2)))


@pytest.mark.parametrize(("lost", "gained", "n"), [(2, 12, 50), (0, 3, 30), (11, 3, 60)])
def test_both_ends_of_the_score_interval_are_z_away_under_the_likeliest_share(lost, gained, n):
    for d in score_interval(lost, gained, n, 0.95):

        def surprise(q, d=d):
            shares = np.clip([q + d, q, 1 - 2 * q - d], 1e-12, 1)
            return -np.array([gained, lost, n - gained - lost]) @ np.log(shares)

        q = minimize_scalar(surprise, bounds=(max(0, -d), (1 - d) / 2), options={"xatol": 1e-10}).x
        spread = np.sqrt((2 * q + d - d * d) / n)
        assert abs((gained - lost) / n - d) / spread == pytest.approx(norm.ppf(0.975), rel=1e-3)


def test_score_interval_excludes_zero_where_the_plain_mcnemar_statistic_does():
    for lost, gained in ((4, 14), (5, 14), (0, 4), (0, 3)):
        is_clear = score_interval(lost, gained, 80, 0.95)[0] > 0
        assert is_clear == ((gained - lost) / np.sqrt(gained + lost) > norm.ppf(0.975))


def test_mid_p_counts_what_was_seen_by_half():
    seen = binom.pmf(2, 10, 0.5)
    assert mcnemar_mid_p(2, 8) == pytest.approx(2 * (binom.cdf(2, 10, 0.5) - seen / 2))
    assert mcnemar_mid_p(0, 0) == 1.0


def test_changes_of_a_third_are_the_changes_of_one_in_thirds():
    """Percentiles of thirds ended at 4e-17 and called 8 against 2 clear of 0."""
    thirds = paired_interval(changes(8, 2, 10, 1 / 3), is_bounded=True, resampling=FAST)
    whole = paired_interval(changes(8, 2, 10), is_bounded=True, resampling=FAST)
    assert thirds.low == pytest.approx(whole.low / 3) and thirds.low <= 0
    assert thirds.p_value == whole.p_value == pytest.approx(0.109375)


def test_no_change_is_no_proof_of_no_difference():
    found = paired_interval(np.zeros(30), is_bounded=True, resampling=FAST)
    assert found.low < -0.1 and found.high > 0.1
    clusters = [str(place // 3) for place in range(30)]
    clustered = paired_interval(np.zeros(30), clusters=clusters, is_bounded=True, resampling=FAST)
    assert clustered.low < found.low
    few = paired_interval(changes(2, 0, 30), clusters=clusters, is_bounded=True, resampling=FAST)
    assert few.low <= 0 < few.high


def test_few_clusters_have_the_t_interval():
    values = np.array([0.1, 0.3, 0.2, 0.5, -0.1])
    half = t.ppf(0.975, 4) * values.std(ddof=1) / np.sqrt(5)
    found = paired_interval(values, resampling=FAST)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_one_cluster_shows_nothing():
    found = paired_interval(np.ones(60), clusters=["a"] * 60, is_bounded=True, resampling=FAST)
    assert (found.low, found.high, found.p_value) == (-1.0, 1.0, 1.0)


def test_sizes_of_clusters_count_as_weights():
    values = np.random.default_rng(0).normal(size=12)
    weights = np.arange(1.0, 13.0)
    by_weight = paired_interval(values, weights=weights, resampling=FAST)
    spelled = np.repeat(values, weights.astype(int))
    names = np.repeat(np.arange(12).astype(str), weights.astype(int)).tolist()
    by_cluster = paired_interval(spelled, clusters=names, resampling=FAST)
    # clusters are sorted by name, so other draws of the same kind
    assert (by_weight.low, by_weight.high) == pytest.approx(
        (by_cluster.low, by_cluster.high), abs=0.1
    )


def planted_trainings(random, *, trainings: int, noise: float) -> np.ndarray:
    """Return differences [R, 150] of mean 0.1 with noise of training, of items, and of both."""
    of_trainings = random.normal(scale=noise, size=(trainings, 1))
    of_items = random.normal(scale=0.15, size=(1, 150))
    return 0.1 + of_trainings + of_items + random.normal(scale=0.2, size=(trainings, 150))


@pytest.mark.parametrize("trainings", [3, 8])
def test_intervals_over_trainings_cover_the_truth_where_items_alone_do_not(trainings):
    random = np.random.default_rng(7)
    covered = np.zeros(2)
    for _ in range(200):
        rows = planted_trainings(random, trainings=trainings, noise=0.05)
        both = joint_interval(rows, resampling=FAST)
        covered += [each.low <= 0.1 <= each.high for each in (both, both.items)]
    assert 0.91 <= covered[0] / 200 <= 0.99
    assert covered[0] > covered[1] + 10


def test_a_joint_interval_is_the_formula_and_its_p_value_belongs_to_it():
    rows = planted_trainings(np.random.default_rng(3), trainings=4, noise=0.1)
    found = joint_interval(rows, resampling=FAST)
    means = rows.mean(1)
    rest = rows - means[:, None] - rows.mean(0) + rows.mean()
    explained = (rest**2).sum() / (3 * 149) / (4 * 150)
    wide = t.ppf(0.975, 3) ** 2 * (means.var(ddof=1) / 4 - explained)
    low = rows.mean() - np.sqrt(wide + (rows.mean() - found.items.low) ** 2)
    assert found.low == pytest.approx(low)
    at_its_end = joint_interval(rows - found.low, resampling=FAST)
    assert at_its_end.p_value == pytest.approx(0.05, abs=0.003)


def test_trainings_that_agree_item_by_item_give_the_interval_of_the_items():
    row = np.random.default_rng(8).normal(size=200)
    both = joint_interval(np.stack([row, row, row]), resampling=FAST)
    alone = paired_interval(row, resampling=FAST)
    assert (both.low, both.high) == pytest.approx((alone.low, alone.high), rel=1e-9)
    assert both.p_value == alone.p_value


def test_weights_and_clusters_count_over_trainings_too():
    rows = planted_trainings(np.random.default_rng(5), trainings=3, noise=0.1)[:, :12]
    weights = np.arange(1.0, 13.0)
    by_weight = joint_interval(rows, weights=weights, resampling=FAST)
    spelled = np.repeat(rows, weights.astype(int), axis=1)
    names = np.repeat(np.arange(12).astype(str), weights.astype(int)).tolist()
    by_cluster = joint_interval(spelled, clusters=names, resampling=FAST)
    assert (by_weight.low, by_weight.high) == pytest.approx(
        (by_cluster.low, by_cluster.high), abs=0.1
    )
