"""The power law of loss against rows, what it says of more rows, and when not to believe it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.learning_curve import (
    CurvePoint,
    Forecast,
    LearningCurveResult,
    PowerLaw,
)
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import hash_json

Trained = tuple[int, int, ArmResult]
"""Rows, seed and what the training scored."""
BETAS = np.linspace(0.05, 1.0, 39)
MIN_SIZES = 4
SAMPLES = 1000
NO_GAIN = 1e-3
"""A gain below this share of the loss is none."""


@dataclass(frozen=True)
class Measured:
    """One training of the curve: its rows and what it scored on every item, [items], lower better.

    `weights` are what the items count, [items].
    """

    rows: int
    values: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        """Return the weighted mean of the values."""
        return float(np.average(self.values, weights=self.weights))


@dataclass(frozen=True)
class CurveFit:
    """The law, or why it is not to be believed; both if it was fitted and shows no gain."""

    law: PowerLaw | None
    refused: str | None


def fit_curve(
    points: Sequence[Measured],
    *,
    target: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> CurveFit:
    """Fit L(n) = E + A n^-beta and bootstrap it over items and refits.

    beta on a grid in [0.05, 1]; (E, A) by least squares with A >= 0 and 0 <= E <= min L. Items are
    drawn with replacement, the same for all points, and where two trainings have the same number of
    rows their difference gives a standard deviation of training itself, drawn for every point. The
    form is that of Zhang et al. 2024 (arXiv:2402.17193).

    Args:
        points: one for each training, all on the same items.
        target: a loss; the law says how many rows reach it: n = (A / (L* - E))^(1 / beta).
    """
    sizes = sorted({point.rows for point in points})
    if len(sizes) < MIN_SIZES:
        return CurveFit(None, f"{len(sizes)} numbers of rows; a law needs {MIN_SIZES}")
    rows = np.array([point.rows for point in points], dtype=np.float64)
    means = _resampled_means(points, seed)
    found = solve_power_law(rows, np.array([[point.mean for point in points]]))
    drawn = solve_power_law(rows, means)
    n = sizes[-1]
    tail = (1 - confidence) / 2

    def forecast(times: int) -> Forecast:
        low, high = np.quantile(_predict(drawn, times * n), [tail, 1 - tail])
        return Forecast(times * n, float(_predict(found, times * n)[0]), (float(low), float(high)))

    gains = _predict(drawn, n) - _predict(drawn, 2 * n)
    low, high = np.quantile(gains, [tail, 1 - tail])
    intercept, amplitude, beta = found[0]
    at_n, at_2n = forecast(1), forecast(2)
    law = PowerLaw(
        E=float(intercept),
        A=float(amplitude),
        beta=float(beta),
        at_n=at_n,
        at_2n=at_2n,
        at_4n=forecast(4),
        gain_at_2n=at_n.loss - at_2n.loss,
        gain_interval=(float(low), float(high)),
        target_loss=target,
        n_need=None if target is None else _rows_needed(found[0], target),
    )
    steepest, flattest = np.quantile(_log_slopes(rows, means), [tail, 1 - tail])
    flattest = max(float(flattest), _slope_end(points, confidence))
    refused = None
    if flattest >= 0:
        refused = (
            f"the change of the loss with twice the rows, {steepest * math.log(2):+.4f} to "
            f"{flattest * math.log(2):+.4f} on average, includes no gain"
        )
    elif low <= NO_GAIN * at_n.loss:
        refused = (
            f"the interval of what twice the rows would gain, {low:.4f} to {high:.4f}, includes "
            "no gain"
        )
    return CurveFit(law, refused)


def solve_power_law(rows: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return (E, A, beta) of the least squares fit for every draw of losses, [D, 3].

    For each beta of the grid the best point of {0 <= E <= min L, A >= 0} is inside or on one of
    the edges E = 0 and E = min L; on the latter A is never negative.

    Args:
        rows: [P]; losses: [D, P].
    """
    x = rows[None, :] ** -BETAS[:, None]  # [K, P]
    smallest = losses.min(1)[:, None]
    centered = x - x.mean(1, keepdims=True)
    slope = losses @ centered.T / (centered**2).sum(1)  # [D, K]
    inside = losses.mean(1)[:, None] - slope * x.mean(1)
    norms = (x**2).sum(1)
    candidates = [
        (inside, slope, (inside >= 0) & (inside <= smallest) & (slope >= 0)),
        (np.zeros_like(slope), losses @ x.T / norms, np.ones_like(slope, dtype=bool)),
        (
            np.broadcast_to(smallest, slope.shape),
            (losses - smallest) @ x.T / norms,
            np.ones_like(slope, dtype=bool),
        ),
    ]
    best = np.full(len(losses), np.inf)
    found = np.zeros((len(losses), 3))
    for intercepts, amplitudes, allowed in candidates:
        for place, beta in enumerate(BETAS):
            e, a = intercepts[:, place], amplitudes[:, place]
            errors = ((losses - e[:, None] - a[:, None] * x[place]) ** 2).sum(1)
            better = allowed[:, place] & (errors < best)
            best[better] = errors[better]
            found[better] = np.stack([e, a, np.full_like(e, beta)], axis=1)[better]
    return found


def _resampled_means(points: Sequence[Measured], seed: int) -> np.ndarray:
    """Return the means of resampled items, [SAMPLES, P], with the spread of training itself."""
    random = np.random.default_rng(seed)
    values = np.stack([point.values * point.weights for point in points])
    weights = np.stack([point.weights for point in points])
    count = values.shape[1]
    means = np.empty((SAMPLES, len(points)))
    for draw in range(SAMPLES):
        items = random.integers(0, count, count)
        means[draw] = values[:, items].sum(1) / weights[:, items].sum(1)
    return np.maximum(means + random.normal(size=means.shape) * _training_spread(points), 0.0)


def _log_slopes(rows: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Return the slope of the loss against log rows for every draw, [D].

    The law itself never rises; this may, so its interval can include no gain.
    """
    centered = np.log(rows) - np.log(rows).mean()
    return np.asarray(losses @ centered / (centered**2).sum())


def _slope_end(points: Sequence[Measured], confidence: float) -> float:
    """Return the upper end of the t interval of the slope of the losses against log rows.

    The scatter of the trainings around the line is the noise of training, with two degrees of
    freedom less than trainings: few trainings that fall by luck promise nothing.
    """
    from scipy.stats import linregress, t

    found = linregress(np.log([point.rows for point in points]), [point.mean for point in points])
    quantile = float(t.ppf((1 + confidence) / 2, len(points) - 2))
    return float(found.slope + quantile * found.stderr)


def _training_spread(points: Sequence[Measured]) -> float:
    """Return the standard deviation between trainings on equally many rows; 0 if none repeat."""
    groups: dict[int, list[float]] = {}
    for point in points:
        groups.setdefault(point.rows, []).append(point.mean)
    squares = [np.var(group, ddof=1) for group in groups.values() if len(group) > 1]
    return math.sqrt(float(np.mean(squares))) if squares else 0.0


def _predict(laws: np.ndarray, rows: float) -> np.ndarray:
    return laws[:, 0] + laws[:, 1] * rows ** -laws[:, 2]


def _rows_needed(law: np.ndarray, target: float) -> float | None:
    intercept, amplitude, beta = law
    if target <= intercept or amplitude == 0:
        return None
    return float((amplitude / (target - intercept)) ** (1 / beta))


def summarize_curve(
    suite: Suite,
    trained: Sequence[Trained],
    *,
    target_score: float | None = None,
    confidence: float = 0.95,
) -> LearningCurveResult:
    """Fit the law of the loss and that of the error to trainings on different numbers of rows.

    The loss of an item is -log p(right choice among the choices) for a choice suite, which tells
    more than right or wrong; for the other suites it is the error. The error is 1 - score, or the
    score itself where lower is better.

    Raises:
        LlmtuneError: the results are not of the same items.
    """
    results = [result for _, _, result in trained]
    _require_same_items(suite, results)
    losses = [_measure(suite, rows, result, is_error=False) for rows, _, result in trained]
    errors = [_measure(suite, rows, result, is_error=True) for rows, _, result in trained]
    higher = results[0].higher_is_better
    target = target_score if target_score is None or not higher else 1.0 - target_score
    law = fit_curve(losses, confidence=confidence)
    error_law = fit_curve(errors, target=target, confidence=confidence)
    return LearningCurveResult(
        inputs={
            "base": str(results[-1].model.get("base")),
            "adapter": str(results[-1].model.get("adapter")),
            "items": suite.items_fingerprint,
            "trainings": hash_json([result.model.get("adapter") for result in results]),
        },
        seconds=sum(result.seconds for result in results),
        suite=suite.name,
        metric=results[0].metric,
        loss_name=suite.config.loss_name,
        points=tuple(
            CurvePoint(rows, seed, measured.mean, result.mean, result.n)
            for (rows, seed, result), measured in zip(trained, losses, strict=True)
        ),
        fit=law.law,
        score_fit=error_law.law,
        refused=law.refused,
    )


def _measure(suite: Suite, rows: int, result: ArmResult, *, is_error: bool) -> Measured:
    values = []
    for item, score in zip(suite.items, result.items, strict=True):
        loss = None if is_error else suite.config.item_loss(item, score)
        if loss is None:
            loss = 1.0 - score.score if result.higher_is_better else score.score
        values.append(loss)
    weights = np.array([score.weight for score in result.items])
    return Measured(rows, np.array(values), weights)


def _require_same_items(suite: Suite, results: Sequence[ArmResult]) -> None:
    for result in results:
        if result.recipe.get("items") != suite.items_fingerprint:
            raise LlmtuneError(
                f"{suite.name}: a result of the learning curve is of other items than the suite "
                "has now; evaluate the run again: llmtune eval RUN --force"
            )
