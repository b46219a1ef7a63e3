"""The scores of several arms on several suites as JSON values, with the two that are compared."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from llmtune.evaluation.compare import ComparisonJson, compare_arms
from llmtune.evaluation.main_arms import MAIN_ARMS, compared_arms
from llmtune.evaluation.results import ArmResult, arm_result_path, read_arm_result
from llmtune.evaluation.stats import Resampling


class ArmScore(TypedDict):
    """What an arm scored on a suite."""

    mean: float
    standard_error: float | None
    lm_eval: NotRequired[Mapping[str, float]]
    """The harness's own numbers of a task: `metric,filter` -> value."""


class SuiteScores(TypedDict):
    """The scores of the arms on one suite, as JSON values."""

    task: str
    role: str
    metric: str
    n: int
    majority: float | None
    chance: float | None
    arms: dict[str, ArmScore]
    compared: tuple[str, str] | None
    """The two arms that `comparison` is about."""
    comparison: ComparisonJson | None


Scores = dict[str, SuiteScores]


def summarize_scores(
    results: Mapping[str, Mapping[str, ArmResult]], resampling: Resampling
) -> Scores:
    """Return for each suite `n`, `metric`, `majority`, `arms` (means), `compared`, `comparison`.

    `compared` names the two arms that `comparison` is about; both are null without such a pair.
    """
    return {name: _summarize(by_arm, resampling) for name, by_arm in results.items() if by_arm}


def read_scores(
    results_dir: Path,
    suites: Iterable[str],
    resampling: Resampling,
    *,
    arms: Sequence[str] = MAIN_ARMS,
) -> Scores:
    """Summarize what is on disk for the named suites and arms; other arms may be out of date."""
    results: dict[str, dict[str, ArmResult]] = {}
    for name in suites:
        paths = {arm: arm_result_path(results_dir, name, arm) for arm in arms}
        results[name] = {
            arm: read_arm_result(path) for arm, path in paths.items() if path.is_file()
        }
    return summarize_scores(results, resampling)


def _summarize(by_arm: Mapping[str, ArmResult], resampling: Resampling) -> SuiteScores:
    first = next(iter(by_arm.values()))
    compared, comparison = compared_arms(by_arm), None
    if compared is not None:
        before, after = (by_arm[arm] for arm in compared)
        found = compare_arms(before, after, resampling=resampling)
        comparison = found.as_dict()
    return {
        "task": first.task,
        "role": first.role,
        "metric": first.metric,
        "n": first.n,
        "majority": first.majority,
        "chance": first.chance,
        "arms": {
            arm: {"mean": result.mean, "standard_error": result.standard_error}
            for arm, result in by_arm.items()
        },
        "compared": compared,
        "comparison": comparison,
    }
