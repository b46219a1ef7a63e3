"""A planted law is found within its interval, and too little is refused."""

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from llmtune.evaluation.diagnosis.curve_fit import BETAS, Measured, fit_curve, solve_power_law

LAW = (0.3, 4.0, 0.5)
ROWS = (60, 120, 240, 480, 960)


def law(rows):
    return LAW[0] + LAW[1] * rows ** -LAW[2]


def measured(rows, seed, *, items=300, spread=0.6, shift=0.0):
    """Items of their own difficulty, shared by all trainings, with a little noise of each."""
    difficulty = np.random.default_rng(99 + seed).normal(size=items) * spread
    noise = np.random.default_rng(rows + 7 * seed).normal(size=items) * 0.05
    values = law(rows) + difficulty - difficulty.mean() + noise + shift
    return Measured(rows, values, np.ones(items))


def test_exact_losses_give_back_the_law():
    rows = np.array(ROWS, dtype=float)
    [found] = solve_power_law(rows, law(rows)[None])
    assert found == pytest.approx(LAW, rel=1e-6)


def test_a_planted_law_is_recovered_within_its_intervals():
    inside = 0
    for seed in range(5):
        points = [measured(rows, seed) for rows in ROWS]
        points.append(measured(60, seed, shift=0.01))
        fit = fit_curve(points, seed=seed, target=law(5000))
        assert fit.refused is None
        low, high = fit.law.at_2n.interval
        inside += low <= law(1920) <= high
        assert fit.law.at_4n.interval[1] - fit.law.at_4n.interval[0] > high - low
        assert fit.law.gain_interval[0] < law(960) - law(1920) < fit.law.gain_interval[1]
        assert fit.law.n_need is None or fit.law.n_need > 2000
    assert inside >= 4


def test_the_needed_rows_invert_the_law():
    points = [Measured(rows, np.full(10, law(rows)), np.ones(10)) for rows in ROWS]
    found = fit_curve(points, target=law(3000)).law
    assert found.n_need == pytest.approx(3000, rel=1e-3)
    assert fit_curve(points, target=0.2).law.n_need is None


def test_every_fit_is_the_bounded_least_squares_one():
    rows = np.array(ROWS, dtype=float)
    draws = np.random.default_rng(0).uniform(0.2, 2.0, (8, len(rows)))
    found = solve_power_law(rows, draws)
    for losses, (intercept, amplitude, beta) in zip(draws, found, strict=True):
        best = min(
            lsq_linear(
                np.stack([np.ones_like(rows), rows**-b], axis=1), losses,
                bounds=([0, 0], [losses.min(), np.inf]),
            ).cost
            for b in BETAS
        )  # fmt: skip
        ours = ((losses - intercept - amplitude * rows**-beta) ** 2).sum() / 2
        assert ours == pytest.approx(best, abs=1e-6)
        assert 0 <= intercept <= losses.min() + 1e-12 and amplitude >= 0


def test_three_sizes_are_too_few_however_many_seeds():
    points = [measured(rows, seed) for rows in ROWS[:3] for seed in range(2)]
    fit = fit_curve(points)
    assert fit.law is None and "3 numbers of rows" in fit.refused


def test_a_flat_curve_promises_nothing():
    refused = 0
    for seed in range(8):
        draw = np.random.default_rng(seed)
        points = [Measured(rows, draw.normal(1, 0.3, 200), np.ones(200)) for rows in ROWS]
        fit = fit_curve(points, seed=seed)
        refused += fit.law is not None and "includes no gain" in (fit.refused or "")
    assert refused >= 7


def test_a_curve_that_is_flat_at_its_end_promises_nothing():
    losses = {60: 0.9, 120: 0.5, 240: 0.5, 480: 0.5, 960: 0.5}
    noise = np.random.default_rng(0).normal(size=200) * 0.3
    points = [
        Measured(rows, loss + noise - noise.mean(), np.ones(200)) for rows, loss in losses.items()
    ]
    found = fit_curve(points)
    assert found.law.gain_at_2n < 0.05


def test_trainings_that_differ_widen_the_interval():
    points = [measured(rows, 0) for rows in ROWS]
    narrow = fit_curve([*points, measured(60, 0, shift=0.001)]).law.at_2n.interval
    wide = fit_curve([*points, measured(60, 0, shift=0.1)]).law.at_2n.interval
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])
