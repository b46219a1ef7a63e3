"""The statistics of a paired comparison: intervals, tests, and what could have been shown."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

POWER_FACTOR = 2.8
"""z(0.975) + z(0.8), rounded: 80 % power at a two-sided level of 5 %."""

FEWEST_ITEMS = 20
FEWEST_CLUSTERS = 8
"""Below either of these no gain is claimed: the intervals are not known to hold there."""

LONG_TAIL = 0.35
LONG_TAIL_FACTOR = 2.5
"""A gain whose changes are skewed towards harm by more than this has its p-value taken times this:
of a long tail few items show too little, and with this even changes like a lognormal (sigma 1, 20
items and more) give at most 2.5 % false gains (docs/diagnosis.md)."""

CHUNK_DRAWS = 4_000_000
"""Counts of items in draws that are held at once while resampling."""

KEPT_DRAWS = 8_000_000
"""Draws of so many counts (16 MB) or fewer are kept: 10 000 draws of 800 items."""

FloatArray = np.ndarray


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    confidence: float = 0.95
    samples: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Interval:
    """An interval of the mean difference and the two-sided p-value that goes with it."""

    low: float
    high: float
    p_value: float


def paired_bootstrap(
    differences: FloatArray,
    *,
    weights: FloatArray | None = None,
    clusters: Sequence[str] | None = None,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Resample items (or whole clusters) with replacement and read the interval off the means.

    p = 2 min(1 + #{mean* <= 0}, 1 + #{mean* >= 0}) / (samples + 1), at most 1.

    Args:
        differences: one paired difference per item, [n], n >= 1.
        weights: what each item counts, [n], positive; the mean is sum(w d) / sum(w).
        clusters: the cluster of each item, [n]; clusters are drawn whole.
    """
    sums, sizes = cluster_sums(differences, weights, clusters)
    means = [(drawn @ sums) / (drawn @ sizes) for drawn in iter_draws(len(sums), samples, seed)]
    return _read_interval(np.concatenate(means), confidence)


def iter_draws(count: int, samples: int, seed: int) -> Iterator[FloatArray]:
    """Yield how often each of `count` items is in a draw with replacement, [draws, count].

    `samples` draws in all. A report compares dozens of arms on the same items: draws of a usual
    size are kept for the next comparison.
    """
    if count * samples <= KEPT_DRAWS:
        yield _keep_draws(count, samples, seed)
        return
    random = np.random.default_rng(seed)
    at_once = max(1, CHUNK_DRAWS // count)
    for start in range(0, samples, at_once):
        yield _count_draws(random, count, min(at_once, samples - start))


@functools.lru_cache(maxsize=4)
def _keep_draws(count: int, samples: int, seed: int) -> FloatArray:
    return _count_draws(np.random.default_rng(seed), count, samples)


def _count_draws(random: np.random.Generator, count: int, samples: int) -> FloatArray:
    drawn = random.integers(0, count, (samples, count)) + count * np.arange(samples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=samples * count)
    return counts.astype(np.uint16).reshape(samples, count)


def _read_interval(means: FloatArray, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Interval(float(low), float(high), min(1.0, 2 * (1 + beyond) / (len(means) + 1)))


@functools.lru_cache(maxsize=4096)
def mcnemar_exact(num_lost: int, num_gained: int) -> float:
    """Return the exact two-sided McNemar p-value of `num_lost` against `num_gained` items.

    p = min(1, 2 sum_{j <= min} C(total, j) / 2^total), in integers; 1 if nothing changed.
    """
    total = num_lost + num_gained
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, j) for j in range(min(num_lost, num_gained) + 1))
    return float(min(1.0, 2 * tail / 2**total))


def standard_error(
    values: FloatArray,
    *,
    weights: FloatArray | None = None,
    clusters: Sequence[str] | None = None,
) -> float:
    """Return the standard error of the (weighted) mean.

    Without clusters and weights sd / sqrt(n) with n - 1 degrees of freedom; else, by cluster c,
    sqrt(sum_c (sum_{i in c} w_i (d_i - mean))^2) / sum(w) (Miller 2024, arXiv:2411.00640).
    One item alone has no standard error: NaN.
    """
    if len(values) < 2:
        return math.nan
    if clusters is None and weights is None:
        return float(np.std(values, ddof=1) / math.sqrt(len(values)))
    centered = values - np.average(values, weights=weights)
    sums, sizes = cluster_sums(centered, weights, clusters)
    return float(np.sqrt((sums**2).sum()) / sizes.sum())


def minimum_detectable_effect(
    differences: FloatArray,
    *,
    weights: FloatArray | None = None,
    clusters: Sequence[str] | None = None,
) -> float:
    """Return the mean difference that this many items would show with 80 % power at the 5 % level.

    For right/wrong scores (differences of -1, 0 and 1) 2.8 sqrt(w / n), with w the share of items
    on which the two differ; with clusters or weights w / n becomes its clustered counterpart,
    sum_c (sum_{i in c} w_i d_i)^2 / sum(w)^2. For any other score 2.8 times the standard error of
    the mean difference, which the size of the difference itself does not enter. Never less than if
    one item had changed by as much as the items that did change (by 1 where none did).
    """
    is_right_wrong = bool(np.isin(differences, (-1, 0, 1)).all())
    mean = 0.0 if is_right_wrong else np.average(differences, weights=weights)
    moved = differences - mean
    sums, sizes = cluster_sums(moved, weights, clusters)
    total = sizes.sum()
    changed = moved[differences != 0]
    typical = float(np.sqrt((changed**2).mean())) if len(changed) else 1.0
    floor = (typical * total / len(differences)) ** 2
    return POWER_FACTOR * math.sqrt(max(float((sums**2).sum()), floor)) / float(total)


def needed_items(effect: float, mde: float, num_items: int) -> int | None:
    """Return how many items of this kind would decide an effect this large; None for no effect.

    The detectable effect shrinks with sqrt(n), so n' = n (mde / effect)^2.
    """
    if effect == 0:
        return None
    return math.ceil(num_items * (mde / abs(effect)) ** 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method, in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def count_clusters(num_items: int, clusters: Sequence[str] | None) -> int:
    """Return how many clusters items are in; one without a cluster is its own."""
    return num_items if clusters is None else len(set(clusters))


def is_enough(num_items: int, num_clusters: int) -> bool:
    """Return whether there are items and clusters enough for a claim."""
    return num_items >= FEWEST_ITEMS and num_clusters >= FEWEST_CLUSTERS


def skewness(
    values: FloatArray,
    *,
    weights: FloatArray | None = None,
    clusters: Sequence[str] | None = None,
) -> float:
    """Return the skewness of the clusters' deviations from the (weighted) mean; 0 if all agree."""
    sums, sizes = cluster_sums(values, weights, clusters)
    rest = sums - sums.sum() / sizes.sum() * sizes
    variance = float((rest**2).mean())
    return float((rest**3).mean()) / variance**1.5 if variance > 0 else 0.0


def cluster_sums(
    values: FloatArray, weights: FloatArray | None, clusters: Sequence[str] | None
) -> tuple[FloatArray, FloatArray]:
    """Return sum(w d) and sum(w) per cluster; an item without a cluster of its own is one."""
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    weighted = weights * np.asarray(values, dtype=np.float64)
    if clusters is None:
        return weighted, weights
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return np.bincount(index, weights=weighted), np.bincount(index, weights=weights)
