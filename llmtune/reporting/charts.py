"""From a matplotlib figure to inline SVG that takes its colours from the page's style sheet."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmtune.reporting.numbers import MINUS

WIDTH, HEIGHT = 340, 205
"""Size of the drawing in points; the page scales it to its column."""

INK, QUIET, RULE, GOOD, BAD, OPEN, BASE, PAPER = (f"#{n:02x}fe{n:02x}" for n in range(8))
"""Stand-ins that matplotlib takes for colours; the page's own take their places."""

VARIABLES = dict(
    zip(
        (INK, QUIET, RULE, GOOD, BAD, OPEN, BASE, PAPER),
        ("ink", "quiet", "rule", "good", "bad", "open", "base", "paper"),
        strict=True,
    )
)
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
        plot: draws on the axes, with this module's colours.
        height: in points.
    """
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        plot(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_inline(written.getvalue(), name, label))  # noqa: S704 (texts were escaped)


def format_tick(value: float, _: object = None) -> str:
    """Format an axis value with a true minus sign and no needless digits."""
    text = f"{abs(value):.6g}"
    return MINUS + text if value < 0 and float(text) else text


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
