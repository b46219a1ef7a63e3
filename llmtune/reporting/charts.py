"""Drawing for the page: charts with axes, and an interval's mark for a table row, as inline SVG.

Charts are matplotlib's; their colors are the style sheet's. The marks are a few lines each, for a
page holds dozens of them.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llmtune.reporting.numbers import MINUS

INTERVAL_WIDTH = 180
INTERVAL_HEIGHT = 22
MAX_POINTS = 300
WIDTH, HEIGHT = 340, 205
"""Size of the drawing in points; the page scales it to its column."""

INK, QUIET, RULE, GOOD, BAD, OPEN, BASE, PAPER = (f"#{n:02x}fe{n:02x}" for n in range(8))
"""Stand-ins that matplotlib takes for colors; the page's own take their places."""

VARIABLES = dict(
    zip(
        (INK, QUIET, RULE, GOOD, BAD, OPEN, BASE, PAPER),
        ("ink", "quiet", "rule", "good", "bad", "open", "base", "paper"),
        strict=True,
    )
)
Points = Sequence[tuple[float, float]]

SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "llmtune",
    "font.size": 9,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
}


def draw(name: str, label: str, plot: Callable[[Axes], None], *, height: int = HEIGHT) -> Markup:
    """Draw one chart and return it as inline SVG.

    Args:
        name: unique on the page; ids inside the SVG begin with it.
        label: what the chart shows, for those who do not see it.
        plot: draws on the axes, with this module's colors.
        height: in points.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        plot(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_inline(written.getvalue(), name, label))  # its texts were escaped


def format_tick(value: float, _: object = None) -> str:
    """Format an axis value with a true minus sign and no needless digits."""
    text = f"{abs(value):.6g}"
    return MINUS + text if value < 0 and float(text) else text


def finish_axes(axes: Axes, x_label: str, y_label: str, *, whole: bool = False) -> None:
    """Label both axes, with few ticks on them; `whole` asks for whole numbers on the x axis."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
        axes.xaxis.set_major_formatter(FuncFormatter(format_tick))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(format_tick))


def thin_points(points: Points, most: int = MAX_POINTS) -> Points:
    """Return at most `most` points: means over runs of neighbors, the same number in each."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


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
    return _round_up(largest * 1.05) if largest > 0 else 1.0


def _round_up(value: float) -> float:
    """Return the next number of the form 1, 2, 2.5, 4, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    for factor in (1, 2, 2.5, 4, 5, 10):
        if value <= factor * power * (1 + 1e-9):
            return factor * power
    return 10 * power


def _inline(svg: str, name: str, label: str) -> str:
    """Return matplotlib's SVG without what only a file needs, themed and with ids of its own."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r' id="([^"]+)"', rf' id="{name}-\1"', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r' (d|x|y)="([^"]*)"', _shorten, body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, f"var(--{variable})")
    body = re.sub(r">\s+<", "><", body)
    size = re.search(r'viewBox="[^"]*"', svg)
    assert size is not None, "matplotlib writes a viewBox"
    return (
        f'<svg class="chart" {size.group()} role="img" aria-label="{escape(label)}">{body.strip()}'
    )


def _shorten(match: re.Match[str]) -> str:
    numbers = re.sub(r"(\.\d)\d+", r"\1", match.group(2)).replace("\n", " ").strip()
    return f' {match.group(1)}="{numbers}"'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
