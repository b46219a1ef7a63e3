"""The small marks inside tables: an interval against zero, as inline SVG of a few lines each.

A page holds dozens of them, one a table row; the charts with axes are drawn by `plots`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

INTERVAL_WIDTH = 180
INTERVAL_HEIGHT = 22


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high`, drawn from `start` to `end` (pixels)."""

    low: float
    high: float
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
    axis = Axis(-limit, limit, 6, INTERVAL_WIDTH - 6)
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


def round_up(value: float) -> float:
    """Return the next number of the form 1, 2, 2.5, 4, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (1, 2, 2.5, 4, 5, 10):
        if value <= factor * power * (1 + 1e-9):
            return factor * power
    return 10 * power


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
