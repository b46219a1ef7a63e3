"""From the stored per-item scores of a run's arms to what the report says about each suite."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmtune.evaluation.compare import (
    Comparison,
    Resampling,
    SliceComparison,
    compare_arms,
    compare_slices,
)
from llmtune.evaluation.results import ArmResult, read_arm_result
from llmtune.evaluation.stats import needed_items
from llmtune.reporting.suites import ROLES, ArmScore, Change, SliceReport, SuiteReport

MERGED_MAY_DIFFER = ("base", "precision")
"""A merged model is its own base, and is never quantized."""
MAX_SLICE_VALUES = 50


def measure_suites(
    evaluations_dir: Path,
    resampling: Resampling,
    *,
    is_wanted: Callable[[ArmResult], bool],
) -> tuple[SuiteReport, ...]:
    """Compare the arms of every suite whose results lie in a directory; targets come first.

    Args:
        is_wanted: whether a result is of this run as it stands; others are left from earlier
            evaluations and not shown.

    Raises:
        LlmtuneError: a file is not a result, or two arms were not made by the same recipe.
    """
    results: dict[str, dict[str, ArmResult]] = {}
    for path in sorted(evaluations_dir.glob("*.json")):
        result = read_arm_result(path)
        if is_wanted(result):
            results.setdefault(result.suite, {})[result.arm] = result
    suites = [measure_suite(arms, resampling) for arms in results.values()]
    return tuple(sorted(suites, key=_order))


def measure_suite(arms: Mapping[str, ArmResult], resampling: Resampling) -> SuiteReport:
    """Compare one suite's arms: tuned with base, merged with tuned, and each slice."""
    first = next(iter(arms.values()))
    suite = SuiteReport(
        name=first.suite,
        role=first.role,
        task=first.task,
        metric=first.metric,
        higher_is_better=first.higher_is_better,
        n=first.n,
        description=first.description,
        clusters=_count_clusters(first),
        arms={name: _arm_score(result) for name, result in arms.items()},
        majority=first.majority,
        chance=first.chance,
    )
    base, tuned, merged = (arms.get(name) for name in ("base", "tuned", "merged"))
    if tuned and merged:
        across = compare_arms(tuned, merged, resampling=resampling, across=MERGED_MAY_DIFFER)
        suite = replace(suite, merged_change=_change(across))
    if not base or not tuned:
        return suite
    found = compare_arms(base, tuned, resampling=resampling)
    return replace(
        suite,
        change=_change(found),
        mde=found.mde,
        needed_items=needed_items(found.difference, found.mde, found.n),
        mcnemar_p=found.mcnemar_p,
        gained=found.gained,
        lost=found.lost,
        slices=_measure_slices(base, tuned, resampling),
    )


def _measure_slices(
    base: ArmResult, tuned: ArmResult, resampling: Resampling
) -> tuple[SliceReport, ...]:
    found: list[SliceComparison] = []
    for column in sorted({column for item in base.items for column in item.slices}):
        values = {item.slices.get(column, "") for item in base.items}
        if 1 < len(values) <= MAX_SLICE_VALUES:
            found += compare_slices(base, tuned, column, resampling=resampling)
    return tuple(_slice_report(each) for each in found)


def _slice_report(found: SliceComparison) -> SliceReport:
    comparison = found.comparison
    return SliceReport(
        column=found.column,
        value=found.value,
        n=comparison.n,
        base=comparison.base,
        tuned=comparison.tuned,
        change=_change(comparison),
        holm_p=found.holm_p,
    )


def _change(found: Comparison) -> Change:
    return Change(found.difference, found.low, found.high, found.p_value, found.standard_error)


def _arm_score(result: ArmResult) -> ArmScore:
    return ArmScore(result.mean, result.standard_error, result.unparseable, result.seconds)


def _count_clusters(result: ArmResult) -> int | None:
    names: Sequence[str | None] = [item.cluster for item in result.items]
    return None if any(name is None for name in names) else len(set(names))


def _order(suite: SuiteReport) -> tuple[int, str]:
    return (ROLES.index(suite.role) if suite.role in ROLES else len(ROLES), suite.name)
