"""The page's charts: loss, KL to the base, gain against forgetting, learning curve, and more."""

import math
from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llmtune.evaluation.diagnosis.results import LearningCurveResult, PowerLaw
from llmtune.reporting.charts import BAD, BASE, GOOD, INK, OPEN, PAPER, QUIET, draw, format_tick
from llmtune.reporting.numbers import Unit
from llmtune.reporting.probabilities import ProbabilityShift
from llmtune.reporting.strengths import StrengthPoint

MAX_POINTS = 300
MAX_DOTS = 400
BOUND_ROOM = 3
"""A bound farther out than so many times the farthest strength is told, not drawn."""

Points = Sequence[tuple[float, float]]


def draw_loss_curve(train: Points, evaluation: Points) -> Markup:
    """Draw (step, loss) of training as a line and of evaluation as points on the same axes."""
    assert train or evaluation, "a curve needs a point"

    def plot(axes: Axes) -> None:
        if train:
            axes.plot(*zip(*thin_points(train), strict=True), color=BASE, gid="train")
        if evaluation:
            axes.plot(
                *zip(*evaluation, strict=True), color=GOOD, ls="--", marker="o", mfc=PAPER, mew=1.5
            )
        _finish(axes, "optimizer step", "nats per trained token", whole=True)

    label = f"Loss over {len(train)} training and {len(evaluation)} evaluation points"
    return draw("loss", label, plot)


def draw_kl_gauge(points: Points) -> Markup:
    """Draw (step, KL to the base) on replay text: the live gauge of forgetting."""
    assert points, "a curve needs a point"

    def plot(axes: Axes) -> None:
        axes.plot(*zip(*thin_points(points), strict=True), color=OPEN)
        axes.set_ylim(bottom=0)
        _finish(axes, "optimizer step", "KL to base, nats/token", whole=True)

    return draw("kl", f"KL to the base over {len(points)} steps", plot, height=140)


def draw_pareto(
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
        bound: how much the general suite may lose, raw unit; drawn where it lies near.
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
        if bound is not None and is_bound_near(generals, bound):
            axes.axvline(bound * general.scale, color=BAD, ls=":", lw=1.2)
        _finish(
            axes,
            f"{generals[0].suite}: lost,{general.difference_suffix}",
            f"{targets[0].suite}: gained,{target.difference_suffix}",
        )

    return draw(name, f"Gain against forgetting at {len(pairs)} strengths", plot, height=230)


def is_bound_near(generals: Sequence[StrengthPoint], bound: float) -> bool:
    """Return whether a bound can be drawn without pressing the strengths together."""
    farthest = max(abs(point.gain) + _half(point) for point in generals)
    return bound <= BOUND_ROOM * farthest


def draw_learning_curve(curve: LearningCurveResult) -> Markup:
    """Draw the loss over the rows, the fitted law, and its forecasts with their intervals."""

    def plot(axes: Axes) -> None:
        axes.plot(
            [p.rows for p in curve.points],
            [p.loss for p in curve.points],
            color=GOOD,
            ls="none",
            marker="o",
            label="trained",
        )
        if curve.fit is not None:
            _draw_law(axes, curve.fit, min(p.rows for p in curve.points))
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        _finish(axes, "training rows", curve.loss_name)
        ticks = sorted({p.rows for p in curve.points} | _forecast_rows(curve.fit))
        axes.set_xticks(ticks, [format_tick(rows) for rows in ticks])

    return draw("learning", f"Loss over training rows, {len(curve.points)} trainings", plot)


def draw_probabilities(name: str, shift: ProbabilityShift) -> Markup:
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
        _finish(axes, "base, %", "tuned, %")

    label = f"{shift.suite}: probability of the right answer of {len(shown)} items"
    return draw(name, label, plot, height=240)


def thin_points(points: Points, most: int = MAX_POINTS) -> Points:
    """Return at most `most` points: means over runs of neighbours, the same number in each."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _half(point: StrengthPoint) -> float:
    return (point.change.high - point.change.low) / 2


def _draw_law(axes: Axes, law: PowerLaw, first: int) -> None:
    last = law.at_4n.rows
    rows = [first * (last / first) ** (index / 60) for index in range(61)]
    axes.plot(rows, [law.E + law.A * n**-law.beta for n in rows], color=BASE, lw=1)
    for forecast in (law.at_2n, law.at_4n):
        low, high = forecast.interval
        axes.errorbar(
            [forecast.rows],
            [forecast.loss],
            yerr=[[max(0.0, forecast.loss - low)], [max(0.0, high - forecast.loss)]],
            color=OPEN,
            marker="s",
            mfc=PAPER,
            capsize=3,
            lw=1,
        )


def _forecast_rows(law: PowerLaw | None) -> set[int]:
    return set() if law is None else {law.at_2n.rows, law.at_4n.rows}


def _finish(axes: Axes, x_label: str, y_label: str, *, whole: bool = False) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
        axes.xaxis.set_major_formatter(FuncFormatter(format_tick))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(format_tick))
