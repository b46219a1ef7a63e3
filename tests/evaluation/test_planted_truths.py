"""Made-up results of which the truth is known get the true verdict as often as promised."""

import os
import sys
from pathlib import Path

import pytest
from scipy.stats import binom

SCRIPTS_DIR = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS_DIR))

from planted_truths import Seen, Truth, iter_truths, try_truth  # noqa: E402

TRUTHS = {truth.name: truth for truth in iter_truths()}
SHORT = 20
LONG = int(os.environ.get("LLMTUNE_REPETITIONS", "400"))
"""The continuous integration takes fewer, for time."""
QUICK = (
    "no effect, 20 items",
    "no effect, 3 clusters of 1 to 12 items",
    "no effect, 8 clusters of 1 to 12 items",
    "interval, 20 losses of exponential skew",
    "interval, 8 clusters of 1 to 12 items, 10 points",
    "general -7.5 points, 60 items among 5 suites",
    "strength 0.5 still +0.3 nats",
    "3 prompts, tuned 5 points better, 300 items",
    "interval, 3 seeds of noise 0.05, 200 items",
)
"""One of each kind that is cheap."""


def is_possible(seen: Seen) -> bool:
    """Return whether the share seen is what chance gives within the allowed shares, at 0.1 %."""
    low, high = seen.truth.allowed
    count = round(seen.share * seen.repetitions)
    return (
        binom.sf(count - 1, seen.repetitions, high) > 0.001
        and binom.cdf(count, seen.repetitions, low) > 0.001
    )


@pytest.mark.parametrize("name", QUICK)
def test_planted_truths_in_short(name):
    assert is_possible(try_truth(TRUTHS[name], SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS)
def test_planted_truths(truth: Truth):
    assert is_possible(try_truth(truth, LONG))


def test_a_rule_that_is_wrong_is_seen():
    wrong = Truth("coin", "heads", (0, 0.05), lambda random: random.random() < 0.5)
    assert not is_possible(try_truth(wrong, SHORT))
