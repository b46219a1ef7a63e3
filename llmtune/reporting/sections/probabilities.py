"""How sure base and tuned model were of each right answer, on suites with fixed choices."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from markupsafe import Markup
from matplotlib.axes import Axes

from llmtune.evaluation.results import ArmResult, ItemScore
from llmtune.reporting.charts import GOOD, QUIET, draw, finish_axes

MAX_CHARTS = 4
MAX_DOTS = 400


class ArmPair(TypedDict):
    """One number of both models."""

    base: float
    tuned: float


class ShiftJson(TypedDict):
    """A suite's means, as report.json holds them."""

    mean_probability: ArmPair
    mean_log_likelihood: ArmPair
    n: int


@dataclass(frozen=True)
class ProbabilityShift:
    """A suite's probabilities of the right choice among the choices, (base, tuned) by item.

    `mean_log_likelihood` holds the mean log-likelihood of the right choice, nats, of base and
    tuned.
    """

    suite: str
    pairs: tuple[tuple[float, float], ...]
    mean_log_likelihood: tuple[float, float]

    def as_json(self) -> ShiftJson:
        """Return the means; the pairs are in the results."""
        base, tuned = self.mean_probability
        return {
            "mean_probability": {"base": base, "tuned": tuned},
            "mean_log_likelihood": {
                "base": self.mean_log_likelihood[0],
                "tuned": self.mean_log_likelihood[1],
            },
            "n": len(self.pairs),
        }

    @property
    def mean_probability(self) -> tuple[float, float]:
        """Mean probability of the right choice of base and tuned."""
        count = len(self.pairs)
        return (
            sum(base for base, _ in self.pairs) / count,
            sum(tuned for _, tuned in self.pairs) / count,
        )


class ProbabilitiesSection(TypedDict):
    """What the template shows."""

    charts: list[tuple[ProbabilityShift, Markup]]


def measure_shifts(
    results: Mapping[str, Mapping[str, ArmResult]],
) -> tuple[ProbabilityShift, ...]:
    """Return the shift of every suite whose choices are the same for every item."""
    shifts = []
    for name, arms in results.items():
        base, tuned = arms.get("base"), arms.get("tuned")
        if base is None or tuned is None:
            continue
        choices = (base.recipe.get("scoring") or {}).get("choices")
        if isinstance(choices, list) and choices:
            shift = _shift(name, base, tuned, [str(choice) for choice in choices])
            if shift is not None:
                shifts.append(shift)
    return tuple(shifts)


def show_probabilities(
    shifts: Sequence[ProbabilityShift], suite_names: Sequence[str]
) -> ProbabilitiesSection | None:
    """Return a chart for each suite with fixed choices, in the order of the names."""
    shown = sorted(shifts, key=lambda shift: suite_names.index(shift.suite))[:MAX_CHARTS]
    if not shown:
        return None
    return {"charts": [(each, _draw(f"sure{i}", each)) for i, each in enumerate(shown)]}


def _shift(
    name: str, base: ArmResult, tuned: ArmResult, choices: Sequence[str]
) -> ProbabilityShift | None:
    others = {item.id: item for item in tuned.items}
    rows = [
        (before, after)
        for item in base.items
        if item.id in others
        and (before := _right(item, choices)) is not None
        and (after := _right(others[item.id], choices)) is not None
    ]
    if not rows:
        return None
    count = len(rows)
    return ProbabilityShift(
        name,
        tuple((before[0], after[0]) for before, after in rows),
        (sum(b[1] for b, _ in rows) / count, sum(a[1] for _, a in rows) / count),
    )


def _right(item: ItemScore, choices: Sequence[str]) -> tuple[float, float] | None:
    """Return the right choice's probability among the choices, and its log-likelihood in nats."""
    values = item.details.get("log_likelihoods")
    if not values or len(values) != len(choices) or item.answer is None:
        return None
    if item.answer not in choices:
        return None
    right = values[list(choices).index(item.answer)]
    highest = max(values)
    total = sum(math.exp(value - highest) for value in values)
    return math.exp(right - highest) / total, right


def _draw(name: str, shift: ProbabilityShift) -> Markup:
    """Draw each item's probability of its right answer, base against tuned."""
    step = math.ceil(len(shift.pairs) / MAX_DOTS)
    shown = shift.pairs[::step]

    def plot(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=QUIET, lw=0.7)
        axes.scatter(
            [100 * base for base, _ in shown],
            [100 * tuned for _, tuned in shown],
            s=9,
            color=GOOD,
            alpha=0.45,
            linewidths=0,
        )
        axes.set_xlim(-2, 102)
        axes.set_ylim(-2, 102)
        finish_axes(axes, "base, %", "tuned, %")

    label = f"{shift.suite}: probability of the right answer of {len(shown)} items"
    return draw(name, label, plot, height=240)
