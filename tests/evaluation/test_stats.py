"""The statistics against hand-computed values, scipy, statsmodels and simulated data."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, skew
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from llmtune.evaluation.stats import (
    holm,
    mcnemar_exact,
    minimum_detectable_effect,
    needed_items,
    paired_bootstrap,
    skewness,
    standard_error,
)


@pytest.mark.parametrize(("lost", "gained"), [(0, 5), (3, 11), (7, 7), (40, 60), (1, 0)])
def test_mcnemar_equals_scipy_and_statsmodels(lost, gained):
    found = mcnemar_exact(lost, gained)
    assert found == pytest.approx(binomtest(lost, lost + gained, 0.5).pvalue, rel=1e-10)
    table = mcnemar([[50, lost], [gained, 50]], exact=True)
    assert found == pytest.approx(float(table.pvalue), rel=1e-10)


def test_mcnemar_by_hand():
    # 1 lost, 9 gained: 2 * (C(10,0) + C(10,1)) / 2^10 = 22 / 1024
    assert mcnemar_exact(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar_exact(0, 0) == 1.0


def test_holm_equals_statsmodels_in_the_given_order():
    p_values = [0.04, 0.001, 0.03, 0.2, 0.012]
    _, expected, _, _ = multipletests(p_values, method="holm")
    assert holm(p_values) == pytest.approx(expected.tolist())
    assert holm([]) == []


def test_skewness_equals_scipy_and_is_that_of_whole_clusters():
    values = np.random.default_rng(0).exponential(1, 60)
    assert skewness(values) == pytest.approx(float(skew(values)))
    doubled, names = np.repeat(values, 2), [str(place // 2) for place in range(120)]
    assert skewness(doubled, clusters=names) == pytest.approx(skewness(values))
    assert skewness(np.ones(5)) == 0.0


def test_standard_error_by_hand():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    # mean 3, squared deviations 4 + 1 + 0 + 9 = 14
    assert standard_error(values) == pytest.approx(math.sqrt(14 / 3) / 2)
    # clusters {1, 2} and {3, 6}: sums of deviations -3 and 3
    assert standard_error(values, clusters=list("aabb")) == pytest.approx(math.sqrt(18) / 4)
    assert math.isnan(standard_error(np.array([1.0])))


def test_clusters_of_one_give_the_plain_error_with_n_degrees_of_freedom():
    values = np.random.default_rng(0).normal(size=50)
    plain = standard_error(values) * math.sqrt(49 / 50)
    assert standard_error(values, clusters=[str(i) for i in range(50)]) == pytest.approx(plain)


def test_weighted_error_by_hand():
    values, weights = np.array([1.0, 4.0]), np.array([2.0, 1.0])
    # mean 2: residuals 2 * -1 and 1 * 2
    assert standard_error(values, weights=weights) == pytest.approx(math.sqrt(8) / 3)


def test_bootstrap_error_equals_the_formula():
    values = np.random.default_rng(1).normal(size=400)
    interval = paired_bootstrap(values, samples=4000)
    width = (interval.high - interval.low) / (2 * 1.96)
    assert width == pytest.approx(standard_error(values), rel=0.05)


def test_clustered_bootstrap_error_equals_the_clustered_formula():
    random = np.random.default_rng(2)
    values = np.repeat(random.normal(size=100), 4) + random.normal(scale=0.1, size=400)
    clusters = [str(i // 4) for i in range(400)]
    interval = paired_bootstrap(values, clusters=clusters, samples=4000)
    width = (interval.high - interval.low) / (2 * 1.96)
    clustered = standard_error(values, clusters=clusters)
    assert width == pytest.approx(clustered, rel=0.06)
    assert clustered > 1.7 * standard_error(values)


def test_weighted_bootstrap_is_of_the_weighted_mean():
    # four equally likely resamples: means 0, 1/4, 1/4 and 1
    values, weights = np.array([0.0, 1.0]), np.array([3.0, 1.0])
    middle = paired_bootstrap(values, weights=weights, samples=2000, confidence=0.4)
    assert (middle.low, middle.high) == (0.25, 0.25)
    whole = paired_bootstrap(values, weights=weights, samples=2000, confidence=0.9)
    assert (whole.low, whole.high) == (0.0, 1.0)


def test_bootstrap_repeats_by_its_seed():
    values = np.random.default_rng(3).normal(size=30)
    assert paired_bootstrap(values, samples=500) == paired_bootstrap(values, samples=500)
    assert paired_bootstrap(values, samples=500, seed=1) != paired_bootstrap(values, samples=500)


def test_no_difference_gives_an_empty_interval_and_p_one():
    interval = paired_bootstrap(np.zeros(40), samples=500)
    assert (interval.low, interval.high, interval.p_value) == (0.0, 0.0, 1.0)


def test_bootstrap_p_of_a_sure_effect_is_the_smallest_possible():
    assert paired_bootstrap(np.ones(40), samples=999).p_value == pytest.approx(2 / 1000)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    """Differences of right/wrong scores as in a real comparison: P(+1) = .2, P(-1) = .1."""
    random = np.random.default_rng(4)
    covered = 0
    for trial in range(400):
        draws = random.choice([1.0, -1.0, 0.0], size=200, p=[0.2, 0.1, 0.7])
        interval = paired_bootstrap(draws, samples=400, seed=trial)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.915 <= covered / 400 <= 0.98


def test_bootstrap_p_values_are_uniform_under_no_effect():
    random = np.random.default_rng(5)
    rejected = 0
    for trial in range(400):
        draws = random.choice([1.0, -1.0, 0.0], size=200, p=[0.15, 0.15, 0.7])
        rejected += paired_bootstrap(draws, samples=400, seed=trial).p_value < 0.05
    assert rejected / 400 <= 0.09


@pytest.mark.parametrize(
    ("n", "discordant", "expected"), [(200, 0.1, 6.3), (500, 0.2, 5.6), (1000, 0.3, 4.8)]
)
def test_detectable_effect_of_right_wrong_scores(n, discordant, expected):
    values = np.zeros(n)
    values[: int(n * discordant)] = np.tile([1.0, -1.0], int(n * discordant) // 2)
    assert 100 * minimum_detectable_effect(values) == pytest.approx(expected, abs=0.08)


def test_detectable_effect_is_never_nothing():
    assert minimum_detectable_effect(np.zeros(8)) == pytest.approx(2.8 / 8)


def test_detectable_effect_of_other_scores_does_not_grow_with_the_difference_itself():
    noise = np.random.default_rng(9).normal(scale=0.1, size=100)
    shifted = minimum_detectable_effect(noise + 0.5)
    assert shifted == pytest.approx(minimum_detectable_effect(noise - 0.3))
    assert shifted == pytest.approx(2.8 * standard_error(noise), rel=0.01)
    weights = np.arange(1.0, 101.0)
    weighted = minimum_detectable_effect(noise + 0.5, weights=weights)
    assert weighted == pytest.approx(2.8 * standard_error(noise, weights=weights), rel=0.01)


def test_an_effect_as_large_as_detectable_is_found_four_times_in_five():
    random = np.random.default_rng(6)
    n, rate = 400, 0.2
    effect = 2.8 * math.sqrt(rate / n)
    up = (rate + effect) / 2
    found = 0
    for trial in range(200):
        draws = random.choice([1.0, -1.0, 0.0], size=n, p=[up, rate - up, 1 - rate])
        found += paired_bootstrap(draws, samples=400, seed=trial).low > 0
    assert 0.72 <= found / 200 <= 0.9


def test_clusters_that_move_together_make_less_detectable():
    values = np.tile(np.repeat([1.0, -1.0, 0.0, 0.0], 5), 10)
    clusters = [str(i // 5) for i in range(200)]
    clustered = minimum_detectable_effect(values, clusters=clusters)
    assert clustered == pytest.approx(math.sqrt(5) * minimum_detectable_effect(values))


def test_half_the_effect_needs_four_times_the_items():
    assert needed_items(0.05, mde=0.1, num_items=100) == 400
    assert needed_items(0.0, mde=0.1, num_items=100) is None


def test_clustered_error_equals_statsmodels():
    random = np.random.default_rng(11)
    groups = random.integers(0, 40, 300)
    values = random.normal(size=40)[groups] + random.normal(size=300)
    model = OLS(values, np.ones(300))
    fitted = model.fit(cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False})
    found = standard_error(values, clusters=groups.astype(str).tolist())
    assert found == pytest.approx(float(fitted.bse[0]), rel=1e-10)
