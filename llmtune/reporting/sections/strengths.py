"""The adapter at several strengths: gain against forgetting, one chosen, and its numbers elsewhere.

A strength is chosen on the items of the selection half and reported on the others, so that the
choice does not flatter the numbers it is reported with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypedDict

from markupsafe import Markup
from matplotlib.axes import Axes

from llmtune.evaluation.compare import Comparison, arm_kind, compare_arms
from llmtune.evaluation.halves import in_selection_half
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.stats import Resampling
from llmtune.reporting.charts import BAD, BASE, GOOD, INK, QUIET, draw, finish_axes
from llmtune.reporting.numbers import Unit, unit_of_metric
from llmtune.reporting.run_results import Results, restrict
from llmtune.reporting.sections.arms import split_name
from llmtune.reporting.suites import Change, SuiteReport, Thresholds

ROLES = ("target", "general")
MAX_CHARTS = 3
BOUND_ROOM = 3
"""A bound farther out than this many times the farthest strength is named, not drawn."""


@dataclass(frozen=True)
class StrengthPoint:
    """One strength on one suite: `gain` is (change turned so that positive is better), raw unit."""

    strength: float
    suite: str
    role: str
    metric: str
    n: int
    mean: float
    change: Change
    gain: float


@dataclass(frozen=True)
class StrengthChoice:
    """The smallest strength that passed on the selection half, and the changes on the other half.

    `held` are the changes against the base at this strength, `held_full` at strength 1, by suite.
    """

    strength: float
    num_selection: int
    num_held: int
    held: Mapping[str, Change] = field(default_factory=dict)
    held_full: Mapping[str, Change] = field(default_factory=dict)
    held_scores: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """Means of base, this strength and strength 1 on the half that reports."""
    keeps_target: bool = True
    """Whether every target suite keeps its score there, within the margin of full strength."""


class SweepJson(TypedDict):
    """The sweep as report.json holds it: the fields of its points and of its choice."""

    points: list[Mapping[str, object]]
    choice: Mapping[str, object] | None


@dataclass(frozen=True)
class StrengthSweep:
    """Every strength on every target and general suite, and the choice if one passed."""

    points: tuple[StrengthPoint, ...]
    choice: StrengthChoice | None = None

    def as_json(self) -> SweepJson:
        """Return the sweep as report.json holds it."""
        return {
            "points": [asdict(point) for point in self.points],
            "choice": asdict(self.choice) if self.choice else None,
        }

    def of_suite(self, name: str) -> tuple[StrengthPoint, ...]:
        """Return a suite's points by rising strength."""
        found = [point for point in self.points if point.suite == name]
        return tuple(sorted(found, key=lambda point: point.strength))


class StrengthsSection(TypedDict):
    """What the template shows: charts of a target against the general suite that says most."""

    strengths: list[float]
    rows: list[tuple[str, list[StrengthPoint | None]]]
    unit_of: Callable[[StrengthPoint], Unit]
    charts: list[Markup]
    far_bound: str | None
    choice: StrengthChoice | None
    sizes: list[int]
    by_name: dict[str, SuiteReport]


def measure_strengths(
    results: Results,
    bounds: Mapping[str, float],
    resampling: Resampling,
    thresholds: Thresholds = Thresholds(),
) -> StrengthSweep | None:
    """Compare every strength with the base on the items that all strengths have.

    Args:
        results: suite -> arm -> result.
        bounds: how much a general suite may lose, by suite, in its raw unit.
        thresholds: how much of the target's gain a smaller strength may cost.

    Returns:
        None if no strength besides 0 and 1 was measured.
    """
    swept = {name: _common(arms) for name, arms in results.items() if _is_swept(arms)}
    swept = {name: by_strength for name, by_strength in swept.items() if by_strength}
    points = [
        _point(strength, compare_arms(arms[0.0], arm, resampling=resampling))
        for arms in swept.values()
        for strength, arm in sorted(arms.items())
        if strength > 0
    ]
    if not points:
        return None
    return StrengthSweep(tuple(points), _choose(swept, bounds, resampling, thresholds))


def show_strengths(
    sweep: StrengthSweep | None, suites: Sequence[SuiteReport], thresholds: Thresholds
) -> StrengthsSection | None:
    """Return the charts (a target against the general suite that says most), and the table."""
    if sweep is None:
        return None
    strengths = sorted({point.strength for point in sweep.points})
    names = list(dict.fromkeys(point.suite for point in sweep.points))
    rows = [(name, [_at(sweep, name, strength) for strength in strengths]) for name in names]
    general = _plotted_general(sweep)
    return {
        "strengths": strengths,
        "rows": rows,
        "unit_of": lambda point: unit_of_metric(point.metric),
        "charts": _charts(thresholds, sweep, general) if general else [],
        "far_bound": _far_bound(thresholds, general) if general else None,
        "choice": sweep.choice,
        "sizes": sorted({point.n for point in sweep.points}),
        "by_name": {suite.name: suite for suite in suites},
    }


def _is_swept(arms: Mapping[str, ArmResult]) -> bool:
    has_sweep = any(arm_kind(name) == "strength" for name in arms)
    return has_sweep and "base" in arms and "tuned" in arms and arms["base"].role in ROLES


def _common(arms: Mapping[str, ArmResult]) -> dict[float, ArmResult]:
    """Return strength -> result on the items that every strength answered; 0 is the base."""
    found = {0.0: arms["base"], 1.0: arms["tuned"]}
    for name, result in arms.items():
        if arm_kind(name) == "strength":
            found[float(result.about.get("strength", split_name(name).rest))] = result
    common = set.intersection(*({item.id for item in each.items} for each in found.values()))
    return {strength: restrict(each, common) for strength, each in found.items()} if common else {}


def _point(strength: float, found: Comparison) -> StrengthPoint:
    return StrengthPoint(
        strength,
        found.suite,
        found.role,
        found.metric,
        found.n,
        found.tuned,
        Change.of(found),
        found.gain,
    )


def _choose(
    swept: Mapping[str, Mapping[float, ArmResult]],
    bounds: Mapping[str, float],
    resampling: Resampling,
    thresholds: Thresholds,
) -> StrengthChoice | None:
    """Return the smallest strength below 1 that passes on the selection half, None if none does."""

    def passes(arms: Mapping[float, ArmResult], strength: float, bound: float | None) -> bool:
        if arms[0.0].role == "target":
            return _keeps_target(arms, strength, resampling, thresholds)
        found = compare_arms(arms[0.0], arms[strength], resampling=resampling)
        return bound is None or -found.gain <= bound

    selection = {name: _half_of(arms, chosen=True) for name, arms in swept.items()}
    held = {name: _half_of(arms, chosen=False) for name, arms in swept.items()}
    has_target = any(arms[0.0].role == "target" for arms in swept.values())
    if not has_target or not all(selection.values()) or not all(held.values()):
        return None
    shared = set.intersection(*(set(arms) for arms in swept.values()))
    for strength in sorted(shared - {0.0}):
        if strength >= 1:
            return None
        if all(passes(arms, strength, bounds.get(name)) for name, arms in selection.items()):
            return StrengthChoice(
                strength,
                num_selection=sum(arms[0.0].n for arms in selection.values()),
                num_held=sum(arms[0.0].n for arms in held.values()),
                held=dict(_changes(held, strength, resampling)),
                held_full=dict(_changes(held, 1.0, resampling)),
                held_scores={
                    name: (arms[0.0].mean, arms[strength].mean, arms[1.0].mean)
                    for name, arms in held.items()
                },
                keeps_target=all(
                    _keeps_target(arms, strength, resampling, thresholds)
                    for arms in held.values()
                    if arms[0.0].role == "target"
                ),
            )
    return None


def _half_of(arms: Mapping[float, ArmResult], *, chosen: bool) -> dict[float, ArmResult]:
    ids = {
        item.id for item in arms[0.0].items if in_selection_half(item.cluster or item.id) == chosen
    }
    return {strength: restrict(each, ids) for strength, each in arms.items()} if ids else {}


def _keeps_target(
    arms: Mapping[float, ArmResult],
    strength: float,
    resampling: Resampling,
    thresholds: Thresholds,
) -> bool:
    """Return whether a target is neither clearly worse than at full strength nor by the margin."""
    base, full, here = arms[0.0], arms[1.0], arms[strength]
    gain = full.mean - base.mean if base.higher_is_better else base.mean - full.mean
    margin = thresholds.as_good_margin(unit_of_metric(base.metric), gain)
    found = compare_arms(full, here, resampling=resampling)
    return found.verdict != "worse" and found.gain >= -margin


def _changes(
    held: Mapping[str, Mapping[float, ArmResult]], strength: float, resampling: Resampling
) -> Iterator[tuple[str, Change]]:
    for name, arms in held.items():
        change = Change.of(compare_arms(arms[0.0], arms[strength], resampling=resampling))
        yield name, change


def _at(sweep: StrengthSweep, name: str, strength: float) -> StrengthPoint | None:
    found = [point for point in sweep.of_suite(name) if point.strength == strength]
    return found[0] if found else None


def _plotted_general(sweep: StrengthSweep) -> tuple[StrengthPoint, ...]:
    """Return the points of the general suite that says most: a loss before a score."""
    names = sorted(
        _names(sweep, "general"),
        key=lambda name: unit_of_metric(sweep.of_suite(name)[0].metric).name == "fraction",
    )
    return sweep.of_suite(names[0]) if names else ()


def _far_bound(thresholds: Thresholds, general: tuple[StrengthPoint, ...]) -> str | None:
    """Return the bound in words if it is too far out to be drawn."""
    unit = unit_of_metric(general[0].metric)
    bound = thresholds.general_bound(unit)
    return None if _is_bound_near(general, bound) else unit.bound(bound)


def _charts(
    thresholds: Thresholds, sweep: StrengthSweep, general: tuple[StrengthPoint, ...]
) -> list[Markup]:
    unit = unit_of_metric(general[0].metric)
    bound = thresholds.general_bound(unit)
    charts = []
    for index, name in enumerate(_names(sweep, "target")[:MAX_CHARTS]):
        target = sweep.of_suite(name)
        units = (unit_of_metric(target[0].metric), unit)
        charts.append(_draw_pareto(f"pareto{index}", target, general, units, bound))
    return charts


def _names(sweep: StrengthSweep, role: str) -> list[str]:
    return list(dict.fromkeys(point.suite for point in sweep.points if point.role == role))


def _draw_pareto(
    name: str,
    targets: Sequence[StrengthPoint],
    generals: Sequence[StrengthPoint],
    units: tuple[Unit, Unit],
    bound: float | None,
) -> Markup:
    """Draw a target's gain against a general suite's loss, a point for each strength.

    Args:
        name: unique on the page.
        targets, generals: the same strengths on both suites.
        units: how the target's and the general suite's scores are written.
        bound: how much the general suite may lose, raw unit; drawn if it is near.
    """
    by_strength = {point.strength: point for point in generals}
    pairs = [(by_strength[p.strength], p) for p in targets if p.strength in by_strength]
    target, general = units

    def plot(axes: Axes) -> None:
        lost = [0.0] + [-g.gain * general.scale for g, _ in pairs]
        gained = [0.0] + [t.gain * target.scale for _, t in pairs]
        axes.axhline(0, color=QUIET, lw=0.7)
        axes.axvline(0, color=QUIET, lw=0.7)
        axes.plot(lost, gained, color=BASE, lw=1)
        for g, t in pairs:
            x, y = -g.gain * general.scale, t.gain * target.scale
            half_x, half_y = (_half(point) for point in (g, t))
            axes.errorbar(
                [x],
                [y],
                xerr=half_x * general.scale,
                yerr=half_y * target.scale,
                color=GOOD,
                marker="o",
                lw=0.9,
            )
        for x, y, text in zip(
            lost, gained, ("base", *(f"{t.strength:g}" for _, t in pairs)), strict=True
        ):
            axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", color=INK)
        if bound is not None and _is_bound_near(generals, bound):
            axes.axvline(bound * general.scale, color=BAD, ls=":", lw=1.2)
        finish_axes(
            axes,
            f"{generals[0].suite}: lost,{general.difference_suffix}",
            f"{targets[0].suite}: gained,{target.difference_suffix}",
        )

    return draw(name, f"Gain against forgetting at {len(pairs)} strengths", plot, height=230)


def _is_bound_near(generals: Sequence[StrengthPoint], bound: float) -> bool:
    """Return whether a bound can be drawn without pressing the strengths together."""
    farthest = max(abs(point.gain) + _half(point) for point in generals)
    return bound <= BOUND_ROOM * farthest


def _half(point: StrengthPoint) -> float:
    return (point.change.high - point.change.low) / 2
