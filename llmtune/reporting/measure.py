"""From the stored per-item scores of a run's arms to what the report says about each suite."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from llmtune.evaluation.compare import (
    SliceComparison,
    adjust_slices,
    compare_arms,
    compare_slices,
    constant_result,
    lenient_result,
)
from llmtune.evaluation.diagnosis.base import Leak
from llmtune.evaluation.main_arms import CHAIN, SAME_AS, compared_arms
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.stats import Resampling, needed_items
from llmtune.reporting.run_results import Results, restrict
from llmtune.reporting.sections.arms import measure_rivals, sort_arms
from llmtune.reporting.suites import (
    ArmScore,
    Change,
    CleanChange,
    SliceReport,
    SuiteReport,
    place_of,
)

MAX_SLICE_VALUES = 50
NO_LEAKS: Mapping[str, Leak] = MappingProxyType({})


def measure_suites(
    results: Results,
    resampling: Resampling,
    *,
    leaks: Mapping[str, Leak] = NO_LEAKS,
) -> tuple[SuiteReport, ...]:
    """Compare the arms of every suite; targets come first.

    Args:
        leaks: which items training has seen; such a suite is compared once more without them.

    Raises:
        LlmtuneError: two arms were not made by the same recipe.
    """
    suites = []
    for name, arms in results.items():
        suite = measure_suite(arms, resampling)
        if name in leaks and leaks[name].item_ids:
            suite = replace(suite, clean=_clean(arms, set(leaks[name].item_ids), resampling))
        suites.append(suite)
    return tuple(sorted(suites, key=lambda suite: place_of(suite.role, suite.name)))


def measure_suite(arms: Mapping[str, ArmResult], resampling: Resampling) -> SuiteReport:
    """Compare one suite's arms: what ships with what was, its parts, the others, each slice."""
    first = arms.get("base") or arms.get("tuned") or next(iter(arms.values()))
    suite = SuiteReport(
        name=first.suite,
        role=first.role,
        task=first.task,
        metric=first.metric,
        higher_is_better=first.higher_is_better,
        n=first.n,
        description=first.description,
        clusters=_count_clusters(first),
        arms={name: _arm_score(arms[name]) for name in sort_arms(list(arms))},
        majority=first.majority,
        chance=first.chance,
        rivals=measure_rivals(arms, resampling),
    )
    compared = compared_arms(arms)
    if compared is None:
        return suite
    before, after = (arms[name] for name in compared)
    found = compare_arms(before, after, resampling=resampling)
    values = _count_values(before)
    return replace(
        suite,
        compared=compared,
        chain=_measure_chain(arms, resampling),
        change=Change.of(found),
        over_majority=_over_majority(after, resampling),
        lenient=_measure_lenient(before, after, resampling),
        mde=found.mde,
        needed_items=needed_items(found.difference, found.mde, found.n),
        mcnemar_p=found.mcnemar_p,
        gained=found.gained,
        lost=found.lost,
        slices=_measure_slices(before, after, values, resampling),
        wide_columns={name: n for name, n in values.items() if n > MAX_SLICE_VALUES},
    )


def _measure_chain(arms: Mapping[str, ArmResult], resampling: Resampling) -> dict[str, Change]:
    """Compare each arm with the one before it; an unquantized base has no first part."""
    return {
        name: Change.of(compare_arms(arms[first], arms[second], resampling=resampling))
        for name, (first, second) in CHAIN.items()
        if first in arms and second in arms and SAME_AS not in arms[first].about
    }


def _over_majority(after: ArmResult, resampling: Resampling) -> Change | None:
    constant = constant_result(after)
    if constant is None:
        return None
    return Change.of(compare_arms(constant, after, resampling=resampling))


def _measure_lenient(before: ArmResult, after: ArmResult, resampling: Resampling) -> Change | None:
    old, new = lenient_result(before), lenient_result(after)
    if old is None or new is None:
        return None
    return Change.of(compare_arms(old, new, resampling=resampling))


def _measure_slices(
    before: ArmResult, after: ArmResult, values: Mapping[str, int], resampling: Resampling
) -> tuple[SliceReport, ...]:
    found: list[SliceComparison] = []
    for column, count in values.items():
        if 1 < count <= MAX_SLICE_VALUES:
            found += compare_slices(before, after, column, resampling=resampling)
    adjusted = adjust_slices([each.comparison for each in found])
    return tuple(map(_slice_report, found, adjusted))


def _count_values(result: ArmResult) -> dict[str, int]:
    """Return for each slice column how many values its items have."""
    columns = sorted({column for item in result.items for column in item.slices})
    return {name: len({item.slices.get(name, "") for item in result.items}) for name in columns}


def _slice_report(found: SliceComparison, holm_p: float) -> SliceReport:
    comparison = found.comparison
    change = Change.of(comparison)
    return SliceReport(
        column=found.column,
        value=found.value,
        n=comparison.n,
        before=comparison.base,
        after=comparison.tuned,
        change=change,
        holm_p=holm_p,
    )


def _clean(
    arms: Mapping[str, ArmResult], leaked: set[str], resampling: Resampling
) -> CleanChange | None:
    compared = compared_arms(arms)
    if compared is None:
        return None
    before, after = (arms[name] for name in compared)
    kept = {item.id for item in before.items} - leaked
    if not kept:
        return None
    found = compare_arms(restrict(before, kept), restrict(after, kept), resampling=resampling)
    change = Change.of(found)
    return CleanChange(found.n, found.base, found.tuned, change)


def _arm_score(result: ArmResult) -> ArmScore:
    return ArmScore(
        result.mean,
        result.standard_error,
        result.unparseable,
        result.seconds,
        result.n,
        result.about,
        result.also,
    )


def _count_clusters(result: ArmResult) -> int | None:
    names: Sequence[str | None] = [item.cluster for item in result.items]
    return None if any(name is None for name in names) else len(set(names))
