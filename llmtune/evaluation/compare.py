"""Two arms on the same items: the difference, how sure it is, and what could have been seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from llmtune.errors import LlmtuneError
from llmtune.evaluation.results import ArmResult, ItemScore, finite_or_none
from llmtune.evaluation.stats import (
    holm,
    mcnemar_exact,
    minimum_detectable_effect,
    paired_bootstrap,
    standard_error,
)


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    confidence: float = 0.95
    samples: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """`difference` is tuned minus base, in the metric's unit; (low, high) is its interval.

    `p_value` is the paired bootstrap's; `mcnemar_p` is exact and there for right/wrong scores.
    `gained` and `lost` count the items that are better or worse than under the base. `mde` is the
    difference these items would show with 80 % power.
    """

    suite: str
    task: str
    role: str
    metric: str
    higher_is_better: bool
    base_arm: str
    tuned_arm: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    p_value: float
    mcnemar_p: float | None
    standard_error: float | None
    n: int
    num_clusters: int
    majority: float | None
    chance: float | None
    mde: float
    gained: int
    lost: int
    unparseable_base: int
    unparseable_tuned: int
    recipe_differences: tuple[str, ...] = ()

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def gain(self) -> float:
        """The difference signed so that positive is better."""
        return self.difference if self.higher_is_better else -self.difference

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval is clear of 0, else `no difference shown`."""
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if self.gain > 0 else "worse"

    def as_dict(self) -> dict:
        """Return the fields for JSON, with the interval as one pair, the gain and the verdict."""
        derived = {"interval": list(self.interval), "gain": self.gain, "verdict": self.verdict}
        return asdict(self) | derived


@dataclass(frozen=True)
class SliceComparison:
    """A comparison on the items of one value of a column; `holm_p` is adjusted over the values."""

    column: str
    value: str
    comparison: Comparison
    holm_p: float


def compare_arms(
    base: ArmResult,
    tuned: ArmResult,
    *,
    resampling: Resampling = Resampling(),
    across: tuple[str, ...] = (),
) -> Comparison:
    """Compare two arms item by item.

    Args:
        across: recipe keys that may differ (`precision`, `base`, ...); they are listed in the
            result.

    Raises:
        LlmtuneError: the items or any other part of the recipes differ.
    """
    differing = tuple(sorted(_differing_keys(base.recipe, tuned.recipe)))
    refused = [key for key in differing if key not in across]
    ids_differ = [item.id for item in base.items] != [item.id for item in tuned.items]
    if refused or ids_differ or base.suite != tuned.suite:
        raise LlmtuneError(_explain_refusal(base, tuned, refused))
    comparison = _compare_items(base, tuned, base.items, tuned.items, resampling)
    return replace(comparison, recipe_differences=differing)


def compare_slices(
    base: ArmResult, tuned: ArmResult, column: str, *, resampling: Resampling = Resampling()
) -> list[SliceComparison]:
    """Compare two arms on every value of a slice column, worst first.

    Raises:
        LlmtuneError: the recipes differ, or the suite does not declare the column.
    """
    compare_arms(base, tuned, resampling=replace(resampling, samples=1))
    values = sorted({item.slices.get(column, "") for item in base.items})
    if values == [""]:
        declared = sorted(base.items[0].slices)
        raise LlmtuneError(f"suite {base.suite}: no slice column {column!r}, only {declared}")
    comparisons = []
    for value in values:
        chosen = [i for i, item in enumerate(base.items) if item.slices.get(column) == value]
        before, after = ([result.items[i] for i in chosen] for result in (base, tuned))
        comparisons.append(_compare_items(base, tuned, before, after, resampling))
    adjusted = holm([comparison.p_value for comparison in comparisons])
    found = [
        SliceComparison(column, *row) for row in zip(values, comparisons, adjusted, strict=True)
    ]
    return sorted(found, key=lambda slice_: slice_.comparison.gain)


def _differing_keys(first: dict, second: dict) -> set[str]:
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def _explain_refusal(base: ArmResult, tuned: ArmResult, refused: Sequence[str]) -> str:
    reasons = [f"{k}: {base.recipe.get(k)!r} / {tuned.recipe.get(k)!r}" for k in refused]
    if base.suite != tuned.suite:
        reasons.insert(0, f"suite: {base.suite!r} / {tuned.suite!r}")
    return (
        f"{base.suite}.{base.arm} and {tuned.suite}.{tuned.arm} were not made by the same recipe "
        f"({'; '.join(reasons) or 'other items'}): evaluate both again the same way"
    )


def _compare_items(
    base: ArmResult,
    tuned: ArmResult,
    base_items: Sequence[ItemScore],
    tuned_items: Sequence[ItemScore],
    resampling: Resampling,
) -> Comparison:
    before = np.array([item.score for item in base_items])
    after = np.array([item.score for item in tuned_items])
    differences = after - before
    weights = np.array([item.weight for item in base_items])
    weighing = None if (weights == 1).all() else weights
    clusters = _cluster_names(base_items)
    interval = paired_bootstrap(
        differences,
        weights=weighing,
        clusters=clusters,
        samples=resampling.samples,
        confidence=resampling.confidence,
        seed=resampling.seed,
    )
    error = standard_error(differences, weights=weighing, clusters=clusters)
    better = differences if base.higher_is_better else -differences
    gained, lost = int((better > 0).sum()), int((better < 0).sum())
    is_binary = bool(np.isin([before, after], (0, 1)).all())
    return Comparison(
        suite=base.suite,
        task=base.task,
        role=base.role,
        metric=base.metric,
        higher_is_better=base.higher_is_better,
        base_arm=base.arm,
        tuned_arm=tuned.arm,
        base=float(np.average(before, weights=weights)),
        tuned=float(np.average(after, weights=weights)),
        difference=float(np.average(differences, weights=weights)),
        low=interval.low,
        high=interval.high,
        p_value=interval.p_value,
        mcnemar_p=mcnemar_exact(lost, gained) if is_binary else None,
        standard_error=finite_or_none(error),
        n=len(base_items),
        num_clusters=len(set(clusters)) if clusters else len(base_items),
        majority=base.majority,
        chance=base.chance,
        mde=minimum_detectable_effect(differences, weights=weighing, clusters=clusters),
        gained=gained,
        lost=lost,
        unparseable_base=sum(not item.parsed for item in base_items),
        unparseable_tuned=sum(not item.parsed for item in tuned_items),
    )


def _cluster_names(items: Sequence[ItemScore]) -> list[str] | None:
    names = [item.cluster for item in items if item.cluster is not None]
    return names if len(names) == len(items) else None
