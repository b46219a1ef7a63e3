"""How well two clouds of points can be distinguished: proxy A-distance and kernel discrepancy."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from llmtune.evaluation.diagnosis.states import fit_standardizer

MAX_COMPONENTS = 64
FOLDS = 5
BOOTSTRAP_SAMPLES = 1000
NULL_SPLITS = 20
PERMUTATIONS = 500
STRENGTH = 0.1
"""C of the classifier: standardised principal components, few rows."""


@dataclass(frozen=True)
class Separation:
    """Proxy A-distance with its interval, and the 95 % quantile of it for halves of one set."""

    pad: float
    interval: tuple[float, float]
    null: float


@dataclass(frozen=True)
class Discrepancy:
    """Unbiased squared MMD (may be negative) and its permutation p-value."""

    mmd: float
    p_value: float


def proxy_a_distance(
    first: np.ndarray, second: np.ndarray, *, seed: int = 0, confidence: float = 0.95
) -> Separation:
    """Return PAD = 2 (1 - 2 error) of a linear classifier between two sets, cut at 0.

    The error is the balanced one of 5-fold L2 logistic regression on standardised states, cut at
    5 standard deviations, with at most 64 principal components (Ben-David et al. 2007, 2010): 0
    where nothing tells the sets apart, 2 if everything does. Percentile bootstrap over the
    rows' right-or-wrong; the interval covers 0 where the raw distance's does. The null value
    splits the larger set in two halves 20 times.

    Args:
        first, second: states [N, H] and [M, H], at least ten rows each.
    """
    random = np.random.default_rng(seed)
    wrong, sides = _cross_errors(first, second, seed)
    draws = [
        _distance(wrong[sides == 0][a], wrong[sides == 1][b])
        for a, b in zip(
            random.integers(0, len(first), (BOOTSTRAP_SAMPLES, len(first))),
            random.integers(0, len(second), (BOOTSTRAP_SAMPLES, len(second))),
            strict=True,
        )
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    larger = first if len(first) >= len(second) else second
    half = min(len(larger) // 2, max(len(first), len(second)))
    nulls = []
    for split in range(NULL_SPLITS):
        order = random.permutation(len(larger))
        parts = larger[order[:half]], larger[order[half : 2 * half]]
        null_wrong, null_sides = _cross_errors(*parts, seed + split)
        nulls.append(_distance(null_wrong[null_sides == 0], null_wrong[null_sides == 1]))
    return Separation(
        pad=max(0.0, _distance(wrong[sides == 0], wrong[sides == 1])),
        interval=(max(0.0, float(low)), max(0.0, float(high))),
        null=max(0.0, float(np.quantile(nulls, 0.95))),
    )


def kernel_discrepancy(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> Discrepancy:
    """Return MMD^2_u with an RBF kernel of median bandwidth and its p-value of 500 permutations.

    sum_{i!=j} k(x_i, x_j) / (m (m - 1)) + sum_{i!=j} k(y_i, y_j) / (n (n - 1))
    - 2 sum k(x_i, y_j) / (m n), k = exp(-d^2 / (2 h^2)), h the median distance of all pairs
    (Gretton et al. 2012). States are standardised together and cut first.
    """
    joined = np.concatenate([first, second]).astype(np.float64)
    joined = fit_standardizer(joined).apply(joined)
    squares = (joined**2).sum(1)
    distances = np.maximum(squares[:, None] + squares[None] - 2 * joined @ joined.T, 0.0)
    median = np.median(distances[np.triu_indices(len(joined), 1)])
    kernel = np.exp(-distances / (2 * median)) if median > 0 else np.ones_like(distances)
    np.fill_diagonal(kernel, 0.0)
    random = np.random.default_rng(seed)
    is_first = np.arange(len(joined)) < len(first)
    found = unbiased_mmd(kernel, is_first)
    beyond = sum(
        unbiased_mmd(kernel, random.permutation(is_first)) >= found for _ in range(PERMUTATIONS)
    )
    return Discrepancy(found, (1 + beyond) / (1 + PERMUTATIONS))


def unbiased_mmd(kernel: np.ndarray, is_first: np.ndarray) -> float:
    """Return MMD^2_u from a kernel matrix [N, N] with a diagonal of zeros; `is_first` is [N]."""
    x = is_first.astype(np.float64)
    y = 1.0 - x
    m, n = x.sum(), y.sum()
    towards_x = kernel @ x
    within = (x @ towards_x) / (m * (m - 1)) + (y @ (kernel @ y)) / (n * (n - 1))
    return float(within - 2 * (y @ towards_x) / (m * n))


def _cross_errors(
    first: np.ndarray, second: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return for every row whether a classifier that did not see it was wrong, and its side."""
    features = np.concatenate([first, second])
    sides = np.repeat([0, 1], [len(first), len(second)])
    features = fit_standardizer(features).apply(features)
    components = min(MAX_COMPONENTS, features.shape[1], len(features) // 2)
    features = PCA(components, svd_solver="full").fit_transform(features)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    classifier = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        predicted = cross_val_predict(classifier, features, sides, cv=folds)
    return predicted != sides, sides


def _distance(wrong_first: np.ndarray, wrong_second: np.ndarray) -> float:
    error = (wrong_first.mean() + wrong_second.mean()) / 2
    return float(2 * (1 - 2 * error))
