"""Two arms on the same items: the difference, how sure it is, and what could have been seen."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypedDict, cast

import numpy as np

from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.config import ALTERNATIVES
from llmtune.evaluation.intervals import paired_interval
from llmtune.evaluation.main_arms import OTHER, OWN_TEMPLATE, kind_among
from llmtune.evaluation.results import ArmResult, ItemScore, cluster_names, finite_or_none
from llmtune.evaluation.stats import (
    Resampling,
    count_clusters,
    holm,
    is_enough,
    mcnemar_exact,
    minimum_detectable_effect,
    skewness,
    standard_error,
)

ALLOWED_DIFFERENCES = {
    "original": frozenset({"precision"}),
    "merged": frozenset({"base", "precision"}),
    "few-shot": frozenset({"demonstrations", "selection"}),
    "prompt": frozenset({"prompt", "selection"}),
    "strength": frozenset({"selection"}),
}
"""Recipe keys in which an arm of this kind may differ from any other arm. `selection`: which of the
suite's items were measured; the comparison is on the items in common."""

FREE_KINDS = (*ALTERNATIVES, OTHER)
"""Arms that answer the same items by other means: only the items have to be the same."""

ITEM_KEYS = frozenset({"items", "num_items"})

SAME = 1e-12
"""Scores closer than this are equal but for rounding."""


class ComparisonJson(TypedDict):
    """A comparison as JSON, as far as it is read by name."""

    base: float
    tuned: float
    n: int
    difference: float
    low: float
    high: float
    interval: Sequence[float]
    gain: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """`difference` is tuned minus base, in the metric's unit; (low, high) is its interval.

    `p_value` belongs to the interval (`paired_interval`); `mcnemar_p` is exact and there for
    right/wrong scores.
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
    harm_tail: float = 0.0
    """How skewed towards harm the changes are; 0 for right/wrong scores."""

    @property
    def interval(self) -> tuple[float, float]:
        """Return the lower and upper end of the interval."""
        return self.low, self.high

    @property
    def gain(self) -> float:
        """The difference signed so that positive is better."""
        return self.difference if self.higher_is_better else -self.difference

    @property
    def is_enough(self) -> bool:
        """Whether there are items and clusters enough for a claim."""
        return is_enough(self.n, self.num_clusters)

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval is clear of 0, else `no difference shown`."""
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if self.gain > 0 else "worse"

    def as_dict(self) -> ComparisonJson:
        """Return the fields for JSON, with the interval as one pair, the gain and the verdict."""
        derived = {"interval": list(self.interval), "gain": self.gain, "verdict": self.verdict}
        return cast(ComparisonJson, asdict(self) | derived)


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
    """Compare two arms item by item, on the items that both have.

    The recipes must be the same but for what the kinds of the two arms may differ in
    (`allowed_differences`).

    Args:
        across: further recipe keys that may differ; all that do are listed in the result.

    Raises:
        LlmtuneError: the items or any other part of the recipes differ.
    """
    differing = require_same_recipe(base, tuned, across)
    before, after = pair_items(base, tuned)
    comparison = _compare_items(base, tuned, before, after, resampling)
    return replace(comparison, recipe_differences=differing)


def constant_result(result: ArmResult) -> ArmResult | None:
    """Return what always giving the most frequent right answer scores on a result's items.

    None if its items do not tell which answer that is, or scores are not right or wrong.
    """
    if result.majority is None or not {item.score for item in result.items} <= {0.0, 1.0}:
        return None
    for answers in (
        [item.answer for item in result.items],
        [item.details.get("right") for item in result.items],
    ):
        most, count = Counter(answers).most_common(1)[0]
        if most is not None and abs(count / len(answers) - result.majority) <= SAME:
            items = tuple(
                replace(item, score=float(answer == most))
                for item, answer in zip(result.items, answers, strict=True)
            )
            return replace(result, items=items, mean=result.majority)
    return None


def lenient_result(result: ArmResult) -> ArmResult | None:
    """Return a result scored by whether the right answer is anywhere in what was written.

    None if its items do not tell, or if its own scores are not those of whole answers: a suite that
    finds the answer in the text itself already counts it there.
    """
    details = [item.details for item in result.items]
    if not all("strict" in each and "lenient" in each for each in details):
        return None
    if any(abs(item.score - item.details["strict"]) > SAME for item in result.items):
        return None
    items = tuple(replace(item, score=item.details["lenient"]) for item in result.items)
    scores, weights = [item.score for item in items], [item.weight for item in items]
    return replace(result, items=items, mean=float(np.average(scores, weights=weights)))


def allowed_differences(base: ArmResult, tuned: ArmResult) -> frozenset[str]:
    """Return the recipe keys in which these two arms may differ and still be compared."""
    kinds = [arm_kind(base.arm), arm_kind(tuned.arm)]
    if any(kind in FREE_KINDS for kind in kinds):
        return frozenset(base.recipe.keys() | tuned.recipe.keys()) - ITEM_KEYS
    own = {"template"} if base.about.get(OWN_TEMPLATE) or tuned.about.get(OWN_TEMPLATE) else ()
    return frozenset(own).union(*(ALLOWED_DIFFERENCES.get(kind, ()) for kind in kinds))


def arm_kind(arm: str) -> str:
    """Return what an arm is one of: `few-shot-2` is a `few-shot`, `tuned` is itself."""
    return kind_among((*ALLOWED_DIFFERENCES, *FREE_KINDS), arm) or arm


def compare_slices(
    base: ArmResult, tuned: ArmResult, column: str, *, resampling: Resampling = Resampling()
) -> list[SliceComparison]:
    """Compare two arms on every value of a slice column, worst first.

    Raises:
        LlmtuneError: the recipes differ, or the suite does not declare the column.
    """
    require_same_recipe(base, tuned, ())
    all_before, all_after = pair_items(base, tuned)
    values = sorted({item.slices.get(column, "") for item in all_before})
    if values == [""]:
        declared = sorted(all_before[0].slices)
        raise LlmtuneError(f"suite {base.suite}: no slice column {column!r}, only {declared}")
    comparisons = []
    for value in values:
        chosen = [i for i, item in enumerate(all_before) if item.slices.get(column) == value]
        before, after = ([items[i] for i in chosen] for items in (all_before, all_after))
        comparisons.append(_compare_items(base, tuned, before, after, resampling))
    adjusted = adjust_slices(comparisons)
    found = [
        SliceComparison(column, *row) for row in zip(values, comparisons, adjusted, strict=True)
    ]
    return sorted(found, key=lambda slice_: slice_.comparison.gain)


def adjust_slices(slices: Sequence[Comparison]) -> list[float]:
    """Return p-values adjusted over the slices that are large enough for a claim; 1 for others."""
    places = [place for place, each in enumerate(slices) if each.is_enough]
    adjusted = [1.0] * len(slices)
    for place, p_value in zip(places, holm([slices[i].p_value for i in places]), strict=True):
        adjusted[place] = p_value
    return adjusted


def require_same_recipe(
    base: ArmResult, tuned: ArmResult, across: Sequence[str]
) -> tuple[str, ...]:
    """Return the recipe keys that differ, all of them allowed to.

    Raises:
        LlmtuneError: others differ; each is named with both values.
    """
    differing = tuple(
        sorted(
            key
            for key in base.recipe.keys() | tuned.recipe.keys()
            if base.recipe.get(key) != tuned.recipe.get(key)
        )
    )
    allowed = allowed_differences(base, tuned) | set(across)
    refused = [key for key in differing if key not in allowed]
    if refused or base.suite != tuned.suite:
        reasons = [f"{k}: {base.recipe.get(k)!r} / {tuned.recipe.get(k)!r}" for k in refused]
        raise _refusal(base, tuned, reasons)
    return differing


def pair_items(base: ArmResult, tuned: ArmResult) -> tuple[list[ItemScore], list[ItemScore]]:
    """Return the items that both arms have, in the base's order.

    Arms that were measured on all items must have the same ones.

    Raises:
        LlmtuneError: they have not, or none in common, or an item has a different right answer.
    """
    others = {item.id: item for item in tuned.items}
    before = [item for item in base.items if item.id in others]
    after = [others[item.id] for item in before]
    is_partial = any(len(result.items) < _num_whole(result) for result in (base, tuned))
    if not before or not (is_partial or len(before) == len(base.items) == len(tuned.items)):
        raise _refusal(base, tuned, [f"other items, {len(before)} in common"])
    for item, other in zip(before, after, strict=True):
        if item.answer is not None and other.answer is not None and item.answer != other.answer:
            raise _refusal(base, tuned, [f"a different answer to {item.id!r}"])
    return before, after


def _num_whole(result: ArmResult) -> int:
    return int(result.recipe.get("num_items", len(result.items)))


def _refusal(base: ArmResult, tuned: ArmResult, reasons: Sequence[str]) -> LlmtuneError:
    if base.suite != tuned.suite:
        reasons = [f"suite: {base.suite!r} / {tuned.suite!r}", *reasons]
    return LlmtuneError(
        f"{base.suite}.{base.arm} and {tuned.suite}.{tuned.arm} were not made by the same recipe "
        f"({'; '.join(reasons)}): evaluate both again the same way"
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
    clusters = cluster_names(base_items)
    both = np.array([before, after])
    interval = paired_interval(
        differences,
        weights=weighing,
        clusters=clusters,
        is_bounded=base.higher_is_better and bool(((both >= 0) & (both <= 1)).all()),
        resampling=resampling,
    )
    error = standard_error(differences, weights=weighing, clusters=clusters)
    better = np.where(np.abs(differences) > SAME, differences, 0.0)
    better = better if base.higher_is_better else -better
    gained, lost = int((better > 0).sum()), int((better < 0).sum())
    is_binary = bool(np.isin(both, (0, 1)).all())
    skew = 0.0 if is_binary else skewness(differences, weights=weighing, clusters=clusters)
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
        num_clusters=count_clusters(len(base_items), clusters),
        majority=base.majority,
        chance=base.chance,
        mde=minimum_detectable_effect(differences, weights=weighing, clusters=clusters),
        gained=gained,
        lost=lost,
        unparseable_base=sum(not item.parsed for item in base_items),
        unparseable_tuned=sum(not item.parsed for item in tuned_items),
        harm_tail=-skew if base.higher_is_better else skew,
    )
