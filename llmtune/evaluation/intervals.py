"""The interval and the p-value of a paired mean, made so that small and odd samples do not lie.

Changes of one size in items that stand alone (right/wrong scores): Tango's score interval, kept in
line with McNemar's mid-p test, and the exact test's p. Everything else: the wider of a t interval
and a bootstrap-t over the clusters, the latter corrected for skewness; if few of many clusters
changed, widened to what their signs alone can show.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.evaluation.stats import (
    FloatArray,
    Interval,
    Resampling,
    cluster_sums,
    iter_draws,
    mcnemar_exact,
)

FEWEST_RESAMPLED = 8
"""Below so many clusters a bootstrap-t is too coarse: the t interval alone."""

SPARSE = 10
"""Fewer changed clusters than this, at most half of all, are too few for a bootstrap."""

ROUNDING = 1e-9
"""Share of the largest change below which a number is rounding: thirds do not add up to 0."""

BISECTIONS = 60
SMALLEST_ERROR = 1e-3
"""The least standard error of a draw, as a share of the sample's: a draw may be of one value."""

SKEWNESS_LOST = 5.0
"""Over n, the share of their skewness that samples lose. Hazen (1924) has 8.5; this is the least at
which 20 to 50 values from an exponential err by the planned 2.5 % on the long side."""

UNKNOWN_SPREAD = 13
"""Times its size a single cluster's change is taken to vary: t with one degree of freedom."""


def paired_interval(
    differences: FloatArray,
    *,
    weights: FloatArray | None = None,
    clusters: Sequence[str] | None = None,
    is_bounded: bool = False,
    resampling: Resampling = Resampling(),
) -> Interval:
    """Return the interval of the (weighted) mean difference and its two-sided p-value.

    Args:
        differences: one paired difference per item, [n], n >= 1.
        weights: what each item counts, [n], positive; the mean is sum(w d) / sum(w).
        clusters: the cluster of each item, [n]; items of one cluster are not independent.
        is_bounded: the scores are from 0 to 1, so that no mean difference is beyond 1.
    """
    sums, sizes = cluster_sums(differences, weights, clusters)
    scale = float(np.abs(differences).max())
    if scale == 0 and not is_bounded:
        return Interval(0.0, 0.0, 1.0)
    stand_alone = weights is None and len(sums) == len(differences)
    signs = _Signs.of(sums * (len(sizes) / sizes.sum()), scale)
    if stand_alone and signs.is_one_size:
        found = signs.interval(resampling.confidence)
    elif len(sums) == 1:
        far = 1.0 if is_bounded else UNKNOWN_SPREAD * scale
        found = Interval(-far, far, 1.0)
    else:
        found = _studentized(sums, sizes, resampling)
        if signs.are_few or found.high - found.low <= ROUNDING * scale:
            found = _wider(found, signs.interval(resampling.confidence))
    return _tidy(found, scale=scale, is_bounded=is_bounded)


@dataclass(frozen=True)
class JointInterval(Interval):
    """An interval over items and trainings; `items` is the one over items alone."""

    items: Interval


def joint_interval(
    differences: FloatArray,
    *,
    weights: FloatArray | None = None,
    clusters: Sequence[str] | None = None,
    is_bounded: bool = False,
    resampling: Resampling = Resampling(),
) -> JointInterval:
    """Return the interval of a mean difference over items and trainings, both drawn at random.

    The model is crossed: d_ri = mean + T_r + I_i + E_ri, because every training answered the same
    items. The interval of the mean over trainings, item by item (`paired_interval`: I and E), is
    widened by the noise of training, each end by itself (MOVER; Zou and Donner 2008, Statistics in
    Medicine 27:1693):

        end = mean -+ sqrt(t^2 max(V_T - V_E, 0) + (mean - end of the items)^2)

    t has R - 1 degrees of freedom; V_T = var_r(mean_r) / R is what the means of R trainings vary,
    V_E the part of it that their items explain (two-way analysis of variance). The p-value solves
    this for the confidence at which an end is 0.

    Args:
        differences: one row a training, [R, n], R >= 2; the columns are the same items.
        weights, clusters, is_bounded: as for `paired_interval`.
    """
    from scipy.special import ndtri, stdtrit

    trainings = len(differences)
    assert trainings >= 2, "one training says nothing of its noise"
    items = paired_interval(
        differences.mean(0),
        weights=weights,
        clusters=clusters,
        is_bounded=is_bounded,
        resampling=resampling,
    )
    pairs = [cluster_sums(row, weights, clusters) for row in differences]
    sums, sizes = np.stack([found for found, _ in pairs]), pairs[0][1]  # [R, C], [C]
    means = sums.sum(1) / sizes.sum()
    mean = float(means.mean())
    own = _share_of_items(sums, sizes, means)
    variance = max(float(means.var(ddof=1)) / trainings - own, 0.0)
    if variance <= (ROUNDING * float(np.abs(differences).max())) ** 2:
        return JointInterval(items.low, items.high, items.p_value, items)
    tail = (1 - resampling.confidence) / 2
    wide = float(stdtrit(trainings - 1, 1 - tail)) ** 2 * variance
    low = mean - math.sqrt(wide + (mean - items.low) ** 2)
    high = mean + math.sqrt(wide + (items.high - mean) ** 2)
    near = items.low if mean > 0 else items.high
    error = abs(mean - near) / float(ndtri(1 - tail))
    p_value = max(items.p_value, _joint_p(mean, error, variance, trainings - 1))
    found = Interval(low, high, p_value)
    found = _tidy(found, scale=float(np.abs(differences).max()), is_bounded=is_bounded)
    return JointInterval(found.low, found.high, found.p_value, items)


def _share_of_items(sums: FloatArray, sizes: FloatArray, means: FloatArray) -> float:
    """Return the variance of the mean of trainings that comes from their items (V_E)."""
    trainings, num = sums.shape
    if num < 2:
        return 0.0
    moved = (sums - means[:, None] * sizes) / sizes.sum()
    rest = moved - moved.mean(0)
    total = float((rest**2).sum())
    return float(total * num / (num - 1) / (trainings * (trainings - 1)))


def _joint_p(mean: float, error: float, variance: float, freedom: int) -> float:
    """Return the p at which t(p)^2 variance + z(p)^2 error^2 is mean^2, by bisection."""
    from scipy.special import ndtri, stdtrit

    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        p_value = (low + high) / 2
        t, z = stdtrit(freedom, 1 - p_value / 2), ndtri(1 - p_value / 2)
        if t * t * variance + z * z * error * error > mean * mean:
            low = p_value
        else:
            high = p_value
    return float(high)


@dataclass(frozen=True)
class _Signs:
    """How many of `num` clusters were lost and gained; `sizes` are those of the changed ones."""

    lost: int
    gained: int
    num: int
    sizes: tuple[float, ...]

    @classmethod
    def of(cls, values: FloatArray, scale: float) -> "_Signs":
        changed = values[np.abs(values) > ROUNDING * scale] if scale else values[:0]
        lost, gained = int((changed < 0).sum()), int((changed > 0).sum())
        return cls(lost, gained, len(values), tuple(np.abs(changed).tolist()))

    @property
    def are_few(self) -> bool:
        return len(self.sizes) < SPARSE and 2 * len(self.sizes) <= self.num

    @property
    def is_one_size(self) -> bool:
        largest = max(self.sizes, default=1.0)
        return all(largest - size <= ROUNDING * largest for size in self.sizes)

    def interval(self, confidence: float) -> Interval:
        size = max(self.sizes, default=1.0)
        low, high = score_interval(self.lost, self.gained, self.num, confidence)
        if mcnemar_mid_p(self.lost, self.gained) > 1 - confidence:
            low, high = min(low, 0.0), max(high, 0.0)
        return Interval(size * low, size * high, mcnemar_exact(self.lost, self.gained))


@functools.lru_cache(maxsize=4096)
def mcnemar_mid_p(num_lost: int, num_gained: int) -> float:
    """Return the two-sided mid-p McNemar value of `num_lost` against `num_gained` items.

    The exact value less half the chance of what was seen, which makes the exact test too careful;
    mid-p keeps its level (Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13).
    """
    total, fewer = num_lost + num_gained, min(num_lost, num_gained)
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, j) for j in range(fewer + 1))
    return float(min(1.0, (2 * tail - math.comb(total, fewer)) / 2**total))


@functools.lru_cache(maxsize=4096)
def score_interval(
    num_lost: int, num_gained: int, num_items: int, confidence: float
) -> tuple[float, float]:
    """Return Tango's interval of (gained - lost) / n, which holds for few changes and for none.

    The differences d at which |gained - lost - n d| / sqrt(n (2 q + d (1 - d))) reaches z, q being
    the most likely share of lost items given d (Tango 1998, Statistics in Medicine 17).
    """
    from scipy.special import ndtri

    z = float(ndtri((1 + confidence) / 2))
    mean = (num_gained - num_lost) / num_items

    def end(limit: float) -> float:
        inside, outside = mean, limit
        for _ in range(BISECTIONS):
            middle = (inside + outside) / 2
            if abs(_score(num_lost, num_gained, num_items, middle)) <= z:
                inside = middle
            else:
                outside = middle
        return inside

    return end(-1.0), end(1.0)


def _score(num_lost: int, num_gained: int, n: int, d: float) -> float:
    """Return the standardized distance of the counts from d; the likeliest share lost is q."""
    b = -(num_lost + num_gained) + (2 * n + num_lost - num_gained) * d
    c = -num_lost * d * (1 - d)
    q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    return (num_gained - num_lost - n * d) / math.sqrt(variance) if variance > 0 else math.inf


def _studentized(sums: FloatArray, sizes: FloatArray, resampling: Resampling) -> Interval:
    """Return the wider of a t interval and, from `FEWEST_RESAMPLED` clusters on, a bootstrap-t.

    The t interval takes the jackknife's standard error, which unequal clusters do not shrink, and
    one degree of freedom less than clusters (Bell and McCaffrey 2002). The bootstrap-t follows
    skewed differences (Efron and Tibshirani 1993, chapter 12), as far as `_LongTail` corrects.
    """
    from scipy.special import stdtr, stdtrit

    count, total = len(sums), float(sizes.sum())
    confidence = resampling.confidence
    mean = float(sums.sum()) / total
    rest = sums - mean * sizes
    jackknife = rest / (1 - sizes / total)
    error = math.sqrt((count - 1) / count * float((jackknife**2).sum())) / total
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * error
    p_value = 2 * float(stdtr(count - 1, -abs(mean) / error)) if error else 0.0
    found = Interval(mean - half, mean + half, p_value)
    if count < FEWEST_RESAMPLED or not error:
        return found
    error = math.sqrt(count / (count - 1) * float((rest**2).sum())) / total
    parts = np.stack([rest, sizes, rest**2, rest * sizes, sizes**2], axis=1)
    draws = iter_draws(count, resampling.samples, resampling.seed)
    long = _LongTail.of(rest)
    t_values = np.concatenate([_t_values(drawn @ parts, error) for drawn in draws])
    t_values = long.stretch(t_values)
    tail = (1 - confidence) / 2
    below, above = (long.level(tail) if long.is_low == low else tail for low in (True, False))
    lowest, highest = np.quantile(t_values, [below, 1 - above])
    seen = mean / error
    at_most, at_least = int((t_values <= seen).sum()), int((t_values >= seen).sum())
    share = (1 + min(at_most, at_least)) / (len(t_values) + 1)
    is_long = long.is_low == (at_most < at_least)
    resampled = Interval(
        mean - float(highest) * error,
        mean - float(lowest) * error,
        min(1.0, 2 * (long.tail_at(share) if is_long else share)),
    )
    return _wider(found, resampled)


@dataclass(frozen=True)
class _LongTail:
    """The tail of a bootstrap-t that few skewed clusters leave too short, and its correction.

    Samples are less skewed than what they are drawn from (`SKEWNESS_LOST`): the missing part of
    the skewness g moves a t value by g (2 t^2 + 1) / (6 sqrt(n)) (Hall 1992, section 3.10).
    And the resampled tail is read at the level that a t interval has where a normal one is asked
    for, Phi(-sqrt(n / (n - 1)) t_{n-1}) (Hesterberg 2015, The American Statistician 69:371), as far
    as the skewness is clear: at two of its standard errors, sqrt(6 / n), it is wholly.
    """

    count: int
    skewness: float
    is_low: bool
    """Whether it is the tail of low t values: that of skewness above 0."""

    @classmethod
    def of(cls, rest: FloatArray) -> "_LongTail":
        skewness = float((rest**3).mean() / (rest**2).mean() ** 1.5)
        return cls(len(rest), abs(skewness), skewness > 0)

    def stretch(self, t_values: FloatArray) -> FloatArray:
        """Return the t values, those of the long tail moved out."""
        missing = SKEWNESS_LOST / self.count * self.skewness / (6 * math.sqrt(self.count))
        sign = 1 if self.is_low else -1
        turned = sign * t_values
        moved = np.where(turned < 0, turned - missing * (2 * turned**2 + 1), turned)
        return np.asarray(sign * moved)

    def level(self, tail: float) -> float:
        """Return at which level the long tail is read for a share of `tail`."""
        from scipy.special import ndtr, stdtrit

        clear = min(1.0, self.skewness * math.sqrt(self.count / 6) / 2)
        stretched = math.sqrt(self.count / (self.count - 1)) * stdtrit(self.count - 1, tail)
        return tail + clear * (float(ndtr(stretched)) - tail)

    def tail_at(self, level: float) -> float:
        """Return the share for which the long tail is read at this level, by bisection."""
        low, high = 0.0, 0.5
        if level >= self.level(high):
            return high
        for _ in range(BISECTIONS // 2):
            middle = (low + high) / 2
            low, high = (middle, high) if self.level(middle) < level else (low, middle)
        return high


def _t_values(drawn: FloatArray, error: float) -> FloatArray:
    """Return each draw's mean over its own standard error, from its sums of r, w, r2, rw, w2."""
    means = drawn[:, 0] / drawn[:, 1]
    squares = drawn[:, 2] - 2 * means * drawn[:, 3] + means**2 * drawn[:, 4]
    errors = np.sqrt(np.maximum(squares, 0.0)) / drawn[:, 1]
    return np.asarray(means / np.maximum(errors, SMALLEST_ERROR * error))


def _wider(one: Interval, other: Interval) -> Interval:
    return Interval(
        min(one.low, other.low), max(one.high, other.high), max(one.p_value, other.p_value)
    )


def _tidy(found: Interval, *, scale: float, is_bounded: bool) -> Interval:
    """Return the interval with rounding taken for 0, and none of it beyond what scores allow."""
    low, high = (0.0 if abs(end) <= ROUNDING * scale else end for end in (found.low, found.high))
    if is_bounded:
        low, high = max(low, -1.0), min(high, 1.0)
    return Interval(low, high, min(1.0, found.p_value))
