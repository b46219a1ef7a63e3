"""Several trainings of one recipe as one: each suite's change with the noise of training in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri

from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import (
    constant_result,
    lenient_result,
    pair_items,
    require_same_recipe,
)
from llmtune.evaluation.intervals import JointInterval, joint_interval
from llmtune.evaluation.main_arms import (
    BEFORE,
    CHAIN,
    OTHER,
    WITHOUT_ADAPTER,
    MainArm,
    compared_arms,
    kind_among,
)
from llmtune.evaluation.results import ArmResult, cluster_names
from llmtune.evaluation.stats import (
    POWER_FACTOR,
    Resampling,
    count_clusters,
    is_enough,
    skewness,
)
from llmtune.reporting.measure import measure_suite
from llmtune.reporting.run_results import Results
from llmtune.reporting.sections.arms import gap_closed
from llmtune.reporting.suites import ArmScore, Change, Rival, SuiteReport, place_of

Arms = Mapping[str, ArmResult]


@dataclass(frozen=True)
class JointChange:
    """A change over trainings: the mean of `by_training`, with its interval over both."""

    by_training: tuple[float, ...]
    n: int
    interval: JointInterval
    is_enough: bool
    harm_tail: float = 0.0

    @property
    def change(self) -> Change:
        """The change as a report holds it."""
        found = self.interval
        mean = sum(self.by_training) / len(self.by_training)
        return Change(
            mean,
            found.low,
            found.high,
            found.p_value,
            is_enough=self.is_enough,
            harm_tail=self.harm_tail,
        )


@dataclass(frozen=True)
class JointSuite:
    """A suite over all trainings, with the change of its compared arms; None without such arms."""

    report: SuiteReport
    found: JointChange | None


def measure_joint_suites(
    by_training: Sequence[Results], resampling: Resampling
) -> tuple[JointSuite, ...]:
    """Compare the arms of every suite that all trainings have, over items and trainings.

    Raises:
        LlmtuneError: two arms were not made by the same recipe, or on the same items.
    """
    shared = [name for name in by_training[0] if all(name in found for found in by_training)]
    suites = [measure_joint([found[name] for found in by_training], resampling) for name in shared]
    return tuple(sorted(suites, key=lambda each: place_of(each.report.role, each.report.name)))


def measure_joint(trainings: Sequence[Arms], resampling: Resampling) -> JointSuite:
    """Compare one suite's arms over several trainings; arms that not all have are left out."""
    shared = [name for name in trainings[0] if all(name in arms for arms in trainings)]
    trainings = [{name: arms[name] for name in shared} for arms in trainings]
    compared = compared_arms(shared)
    one = measure_suite(trainings[0], resampling)
    if compared is None:
        return JointSuite(one, None)
    found = compare_trainings(trainings, compared, resampling)
    half = (found.interval.high - found.interval.low) / 2
    errors = float(ndtri((1 + resampling.confidence) / 2))  # standard errors in half an interval
    report = replace(
        one,
        trainings=len(trainings),
        arms={name: _mean_score([arms[name] for arms in trainings]) for name in one.arms},
        change=found.change,
        over_majority=_joint_over_majority(trainings, compared[1], resampling),
        lenient=_joint_lenient(trainings, compared, resampling),
        chain={
            part: compare_trainings(trainings, CHAIN[part], resampling).change
            if not set(CHAIN[part]) <= set(BEFORE)
            else one.chain[part]
            for part in one.chain
        },
        rivals={name: _joint_rival(one, name, trainings, resampling) for name in one.rivals},
        mde=POWER_FACTOR * half / errors,
        needed_items=None,
        mcnemar_p=None,
        gained=None,
        lost=None,
        slices=(),
        wide_columns={},
        clean=None,
    )
    return JointSuite(report, found)


def _joint_over_majority(
    trainings: Sequence[Arms], arm: MainArm, resampling: Resampling
) -> Change | None:
    constants = [constant_result(arms[arm]) for arms in trainings]
    pairs: list[Arms] = [
        {"original": constant, arm: arms[arm]}
        for constant, arms in zip(constants, trainings, strict=True)
        if constant is not None
    ]
    if len(pairs) < len(trainings):
        return None
    return compare_trainings(pairs, ("original", arm), resampling).change


def _joint_lenient(
    trainings: Sequence[Arms], pair: tuple[MainArm, MainArm], resampling: Resampling
) -> Change | None:
    found = [{name: lenient_result(arms[name]) for name in pair} for arms in trainings]
    pairs: list[Arms] = [
        {name: result for name, result in arms.items() if result is not None} for arms in found
    ]
    if any(len(arms) < len(pair) for arms in pairs):
        return None
    return compare_trainings(pairs, pair, resampling).change


def compare_trainings(
    trainings: Sequence[Arms], pair: tuple[str, str], resampling: Resampling
) -> JointChange:
    """Compare the second arm of the pair with the first over several trainings.

    Raises:
        LlmtuneError: the recipes or the items differ.
    """
    first = trainings[0][pair[1]]
    rows, scores, order = [], [], None
    weights, clusters = np.ones(1), None
    for arms in trainings:
        require_same_recipe(first, arms[pair[1]], ())
        require_same_recipe(arms[pair[0]], arms[pair[1]], ())
        before, after = pair_items(arms[pair[0]], arms[pair[1]])
        changes = {old.id: new.score - old.score for old, new in zip(before, after, strict=True)}
        scores += [item.score for item in (*before, *after)]
        if order is None:
            order = list(changes)
            weights, clusters = np.array([item.weight for item in before]), cluster_names(before)
        if set(order) != set(changes):
            raise LlmtuneError(f"{first.suite}: the runs were scored on different items")
        rows.append([changes[name] for name in order])
    differences, both = np.array(rows), np.array(scores)
    weighing = None if (weights == 1).all() else weights
    interval = joint_interval(
        differences,
        weights=weighing,
        clusters=clusters,
        is_bounded=first.higher_is_better and bool(((both >= 0) & (both <= 1)).all()),
        resampling=resampling,
    )
    is_binary = bool(np.isin(both, (0, 1)).all())
    moved = differences.mean(0)
    skew = 0.0 if is_binary else skewness(moved, weights=weighing, clusters=clusters)
    return JointChange(
        by_training=tuple(np.average(differences, axis=1, weights=weights).tolist()),
        n=len(weights),
        interval=interval,
        is_enough=is_enough(len(weights), count_clusters(len(weights), clusters)),
        harm_tail=-skew if first.higher_is_better else skew,
    )


def _joint_rival(
    one: SuiteReport, name: str, trainings: Sequence[Arms], resampling: Resampling
) -> Rival:
    """Return an arm's comparisons over all trainings; one without the adapter is in all the same.

    Args:
        one: the suite as the first training has it.
    """
    rival = one.rivals[name]
    over_base, tuned_over = rival.over_base, rival.tuned_over
    if over_base is not None and kind_among((*WITHOUT_ADAPTER, OTHER), name) is None:
        over_base = compare_trainings(trainings, ("base", name), resampling).change
    if tuned_over is not None:
        tuned_over = compare_trainings(trainings, (name, "tuned"), resampling).change
    closed = rival.gap_closed
    if closed is not None and over_base is not None and tuned_over is not None:
        closed = gap_closed(one.gain(over_base)[0], one.gain(tuned_over)[0])
    return replace(rival, over_base=over_base, tuned_over=tuned_over, gap_closed=closed)


def _mean_score(results: Sequence[ArmResult]) -> ArmScore:
    """Return an arm's mean score over the trainings."""
    first = results[0]
    also = {
        key: float(np.mean([result.also[key] for result in results]))
        for key, value in first.also.items()
        if isinstance(value, int | float) and all(key in result.also for result in results)
    }
    return ArmScore(
        mean=float(np.mean([result.mean for result in results])),
        unparseable=round(float(np.mean([result.unparseable for result in results]))),
        seconds=sum(result.seconds for result in results),
        n=first.n,
        about=first.about,
        also=also,
    )
