"""The page's figures as inline SVG: an interval against zero, and the loss over the steps.

Written by hand and coloured by the page's own style sheet, so that one figure serves light, dark
and paper, and building a report imports no plotting library.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llmtune.reporting.numbers import MINUS

INTERVAL_WIDTH = 180
INTERVAL_HEIGHT = 22
MAX_POINTS = 300
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 34
CURVE_WIDTH, CURVE_HEIGHT = 520, 250

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with its ticks, drawn from `start` to `end` (pixels)."""

    low: float
    high: float
    ticks: tuple[float, ...]
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def draw_interval(
    gain: float, low: float, high: float, *, limit: float, bound: float | None = None
) -> Markup:
    """Draw a gain and its interval on an axis from -limit (worse) to +limit (better).

    Args:
        gain, low, high: the difference turned so that positive is better, raw unit.
        limit: the end of the axis, shared by the rows that are compared.
        bound: how much may be lost; drawn as a mark on the worse side.
    """
    axis = Axis(-limit, limit, (), 6, INTERVAL_WIDTH - 6)
    middle = INTERVAL_HEIGHT / 2
    left, right = axis.at(max(low, -limit)), axis.at(min(high, limit))
    kind = "better" if low > 0 else "worse" if high < 0 else "unclear"
    parts = [_line("axis", axis.start, middle, axis.end, middle)]
    if bound is not None and bound < limit:
        parts.append(_line("bound", axis.at(-bound), 4, axis.at(-bound), INTERVAL_HEIGHT - 4))
    parts.append(_line("zero", axis.at(0), 1, axis.at(0), INTERVAL_HEIGHT - 1))
    parts.append(_line("span", left, middle, right, middle))
    parts += [_line("cap", end, middle - 4, end, middle + 4) for end in (left, right)]
    center = axis.at(max(-limit, min(limit, gain)))
    parts.append(f'<circle class="dot" cx="{center:.1f}" cy="{middle:.1f}" r="4"/>')
    return Markup(
        f'<svg class="interval {kind}" viewBox="0 0 {INTERVAL_WIDTH} {INTERVAL_HEIGHT}" '
        f'aria-hidden="true">{"".join(parts)}</svg>'
    )


def interval_limit(ends: Sequence[float]) -> float:
    """Return a round axis end that holds every value of `ends` with a little room."""
    largest = max((abs(end) for end in ends), default=0.0)
    return round_up(largest * 1.05) if largest > 0 else 1.0


def draw_loss_curve(train: Points, evaluation: Points) -> Markup:
    """Draw (step, loss) of training as a line and of evaluation as points on the same axes."""
    assert train or evaluation, "a curve needs a point"
    every = [*train, *evaluation]
    steps = _axis([step for step, _ in every], LEFT, CURVE_WIDTH - RIGHT, whole=True)
    losses = _axis([loss for _, loss in every], CURVE_HEIGHT - BOTTOM, TOP)
    parts = []
    for tick in losses.ticks:
        y = losses.at(tick)
        parts.append(_line("grid", steps.start, y, steps.end, y))
        parts.append(_text(steps.start - 8, y + 4, _tick(tick), "end"))
    for tick in steps.ticks:
        x = steps.at(tick)
        parts.append(_line("tick", x, losses.start, x, losses.start + 4))
        parts.append(_text(x, losses.start + 18, _tick(tick), "middle"))
    parts.append(_line("axis", steps.start, losses.start, steps.end, losses.start))
    parts.append(_path("train", thin_points(train), steps, losses))
    parts.append(_path("evaluation", evaluation, steps, losses))
    for step, loss in evaluation:
        x, y = steps.at(step), losses.at(loss)
        parts.append(f'<circle class="evaluation" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    label = f"Loss over {len(train)} training and {len(evaluation)} evaluation points"
    return Markup(
        f'<svg class="curve" viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
    )


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


def round_up(value: float) -> float:
    """Return the next number of the form 1, 2, 2.5, 4, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (1, 2, 2.5, 4, 5, 10):
        if value <= factor * power * (1 + 1e-9):
            return factor * power
    return 10 * power


def _axis(values: Sequence[float], start: float, end: float, *, whole: bool = False) -> Axis:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = round_up((high - low) / 5)
    if whole:
        step = max(1.0, step)
    first = math.floor(low / step) if not whole else math.ceil(low / step)
    last = math.ceil(high / step) if not whole else math.floor(high / step)
    ticks = tuple(index * step for index in range(first, last + 1))
    if whole:
        return Axis(low, high, ticks, start, end)
    return Axis(ticks[0], ticks[-1], ticks, start, end)


def _tick(value: float) -> str:
    text = f"{abs(value):.6g}"
    return MINUS + text if value < 0 and float(text) else text


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _path(kind: str, points: Points, steps: Axis, losses: Axis) -> str:
    if len(points) < 2:
        return ""
    places = " ".join(f"{steps.at(x):.1f},{losses.at(y):.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{places}"/>'
