"""The adapter at several strengths: gain against forgetting, one chosen, and its numbers elsewhere.

A strength is chosen on the items of the selection half and reported on the others, so that the
choice does not flatter the numbers it is reported with.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtune.evaluation.compare import Comparison, Resampling, arm_kind, compare_arms
from llmtune.evaluation.halves import in_selection_half
from llmtune.evaluation.results import ArmResult
from llmtune.reporting.arms import as_change, restrict, split_name
from llmtune.reporting.suites import Change

Results = Mapping[str, Mapping[str, ArmResult]]
ROLES = ("target", "general")


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


@dataclass(frozen=True)
class StrengthSweep:
    """Every strength on every target and general suite, and the choice if one passed."""

    points: tuple[StrengthPoint, ...]
    choice: StrengthChoice | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the sweep as report.json holds it."""
        return {
            "points": [asdict(point) for point in self.points],
            "choice": asdict(self.choice) if self.choice else None,
        }

    def of_suite(self, name: str) -> tuple[StrengthPoint, ...]:
        """Return a suite's points by rising strength."""
        found = [point for point in self.points if point.suite == name]
        return tuple(sorted(found, key=lambda point: point.strength))


def measure_strengths(
    results: Results, bounds: Mapping[str, float], resampling: Resampling
) -> StrengthSweep | None:
    """Compare every strength with the base on the items that all strengths have.

    Args:
        results: suite -> arm -> result.
        bounds: how much a general suite may lose, by suite, in its raw unit.

    Returns:
        None where no strength beside 0 and 1 was measured.
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
    return StrengthSweep(tuple(points), _choose(swept, bounds, resampling))


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
    change = as_change(found)
    assert change is not None
    return StrengthPoint(
        strength, found.suite, found.role, found.metric, found.n, found.tuned, change, found.gain
    )


def _choose(
    swept: Mapping[str, Mapping[float, ArmResult]],
    bounds: Mapping[str, float],
    resampling: Resampling,
) -> StrengthChoice | None:
    """Return the smallest strength below 1 that passes on the selection half, None if none does."""
    selection = {name: _half(arms, chosen=True) for name, arms in swept.items()}
    held = {name: _half(arms, chosen=False) for name, arms in swept.items()}
    has_target = any(arms[0.0].role == "target" for arms in swept.values())
    if not has_target or not all(selection.values()) or not all(held.values()):
        return None
    shared = set.intersection(*(set(arms) for arms in swept.values()))
    for strength in sorted(shared - {0.0}):
        if strength >= 1:
            return None
        if all(_passes(arms, strength, bounds.get(name)) for name, arms in selection.items()):
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
            )
    return None


def _half(arms: Mapping[float, ArmResult], *, chosen: bool) -> dict[float, ArmResult]:
    ids = {item.id for item in arms[0.0].items if in_selection_half(item.id) == chosen}
    return {strength: restrict(each, ids) for strength, each in arms.items()} if ids else {}


def _passes(arms: Mapping[float, ArmResult], strength: float, bound: float | None) -> bool:
    """Return whether a target keeps its score within 1 SE, or a general suite its bound."""
    base, full, here = arms[0.0], arms[1.0], arms[strength]
    sign = 1 if base.higher_is_better else -1
    if base.role == "target":
        return sign * (here.mean - full.mean) >= -(full.standard_error or 0.0)
    return bound is None or -sign * (here.mean - base.mean) <= bound


def _changes(
    held: Mapping[str, Mapping[float, ArmResult]], strength: float, resampling: Resampling
) -> Iterator[tuple[str, Change]]:
    for name, arms in held.items():
        change = as_change(compare_arms(arms[0.0], arms[strength], resampling=resampling))
        assert change is not None
        yield name, change
