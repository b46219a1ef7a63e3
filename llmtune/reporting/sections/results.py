"""The main arms on every suite, grouped by what the suite is for, and the parts of the change."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from llmtune.evaluation.main_arms import CHAIN, MainArm
from llmtune.evaluation.results import REUSED
from llmtune.reporting.beside import BesideTable, tabulate_beside
from llmtune.reporting.charts import (
    BAD,
    BASE,
    GOOD,
    INK,
    QUIET,
    draw,
    draw_interval,
    finish_axes,
    interval_limit,
)
from llmtune.reporting.numbers import FRACTION, Unit, format_count
from llmtune.reporting.suites import Change, SliceReport, SuiteReport, Thresholds, name_pairs

ROLE_TITLES = {
    "target": "What it was tuned for",
    "transfer": "What it never saw",
    "general": "What it could do before",
}

LONGEST_LABEL = 14
MOST_LEVEL_LABELS = 5
"""More labels than this are written at an angle."""
MOST_LARGE_CELLS = 60


@dataclass(frozen=True)
class Row:
    """One line of a results table: a suite, or a slice of one, with its interval drawn."""

    suite: SuiteReport
    change: Change | None
    plot: Markup | None
    slice: SliceReport | None = None


@dataclass(frozen=True)
class Group:
    """The suites of one role."""

    title: str
    role: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Picture:
    """A chart of a suite with what it shows."""

    suite: str
    drawn: Markup
    caption: str


class ResultsSection(TypedDict):
    """What the template shows; `limits` are the ends of each unit's axis.

    `pairs` says which arms are compared; `parts` are the change's, shown for the suites `chains`;
    `reused` names the suites that an earlier run measured on the same base, by arm.
    """

    groups: list[Group]
    limits: dict[Unit, float]
    pairs: str
    parts: dict[str, tuple[MainArm, MainArm]]
    chains: list[SuiteReport]
    reused: dict[str, list[str]]
    beside: list[BesideTable]
    pictures: list[Picture]


def show_results(suites: Sequence[SuiteReport], thresholds: Thresholds) -> ResultsSection | None:
    """Return the suites by role."""
    if not suites:
        return None
    limits = _find_limits(suites, thresholds)
    beside = [table for suite in suites if (table := tabulate_beside(suite)) is not None]
    groups = [
        Group(
            ROLE_TITLES.get(role, role),
            role,
            tuple(_row(suite, limits, thresholds) for suite in suites if suite.role == role),
        )
        for role in dict.fromkeys(suite.role for suite in suites)
    ]
    return {
        "groups": groups,
        "limits": limits,
        "pairs": name_pairs(suites),
        "parts": CHAIN,
        "chains": [suite for suite in suites if len(suite.chain) > 1],
        "reused": _find_reused(suites),
        "beside": beside,
        "pictures": list(_draw_choices(beside)),
    }


def _find_reused(suites: Sequence[SuiteReport]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for suite in suites:
        for arm, score in suite.arms.items():
            if REUSED in score.about:
                found.setdefault(arm, []).append(suite.name)
    return found


def _draw_choices(tables: Sequence[BesideTable]) -> Iterator[Picture]:
    """Yield the confusion matrix and the reliability diagram of the suites that have them."""
    for number, table in enumerate(tables):
        suite = table.suite
        if table.confusion and any(map(any, table.confusion)):
            labels = [str(each["label"]) for each in table.classes]
            drawn = _draw_confusion(f"confusion{number}", suite.name, labels, table.confusion)
            right = sum(row[place] for place, row in enumerate(table.confusion))
            caption = (
                f"what the {table.judged} model answered; {format_count(right)} of "
                f"{format_count(sum(map(sum, table.confusion)))} are on the diagonal."
            )
            yield Picture(suite.name, drawn, caption)
        arms = suite.compared or (table.judged,)
        bins = {arm: suite.arms[arm].also.get("reliability") for arm in arms}
        shown = {arm: points for arm, points in bins.items() if points}
        if shown:
            errors = [
                f"{arm} {FRACTION.score(suite.arms[arm].also['calibration_error'])}"
                for arm in shown
            ]
            caption = (
                "how often the answer is right, by how sure the model is of it; on the diagonal "
                f"the two are equal. Mean distance from it: {', '.join(errors)}."
            )
            drawn = _draw_reliability(f"reliability{number}", suite.name, shown)
            yield Picture(suite.name, drawn, caption)


def _draw_confusion(
    name: str, suite: str, labels: Sequence[str], counts: Sequence[Sequence[int]]
) -> Markup:
    """Draw the counts of right (rows) against given labels, each row shaded by its shares."""
    given = [*labels, "none"] if any(row[-1] for row in counts) else list(labels)
    cells = len(labels) * len(given)

    def plot(axes: Axes) -> None:
        for down, row in enumerate(counts):
            total = sum(row) or 1
            for right, count in enumerate(row[: len(given)]):
                color = GOOD if down == right else BAD
                axes.add_patch(
                    Rectangle((right, down), 1, 1, color=color, alpha=0.75 * count / total, lw=0)
                )
                if count:
                    axes.text(
                        right + 0.5,
                        down + 0.5,
                        format_count(count),
                        ha="center",
                        va="center",
                        color=INK,
                        fontsize=9 if cells <= MOST_LARGE_CELLS else 7,
                    )
        axes.set_xlim(0, len(given))
        axes.set_ylim(len(labels), 0)
        axes.grid(visible=False)
        axes.set_xticks([place + 0.5 for place in range(len(given))], list(map(_cut, given)))
        axes.set_yticks([place + 0.5 for place in range(len(labels))], list(map(_cut, labels)))
        axes.tick_params(length=0)
        if len(given) > MOST_LEVEL_LABELS:
            axes.tick_params(axis="x", rotation=45)
        axes.set_xlabel("given")
        axes.set_ylabel("right")

    height = min(420, 110 + 26 * len(labels))
    return draw(name, f"{suite}: confusion matrix of {len(labels)} labels", plot, height=height)


def _draw_reliability(
    name: str, suite: str, bins: Mapping[str, Sequence[Mapping[str, float]]]
) -> Markup:
    """Draw accuracy over confidence, a line for each arm, its points as large as their bins."""

    def plot(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], color=QUIET, lw=0.7)
        for (arm, points), color in zip(bins.items(), (BASE, GOOD), strict=False):
            xs = [100 * point["confidence"] for point in points]
            ys = [100 * point["accuracy"] for point in points]
            total = sum(point["n"] for point in points)
            sizes = [12 + 120 * point["n"] / total for point in points]
            axes.plot(xs, ys, color=color, label=arm)
            axes.scatter(xs, ys, s=sizes, color=color, linewidths=0)
        axes.set_xlim(-2, 102)
        axes.set_ylim(-2, 102)
        finish_axes(axes, "confidence, %", "right, %")
        axes.legend(frameon=False, loc="upper left")

    return draw(name, f"{suite}: reliability of {', '.join(bins)}", plot, height=240)


def _cut(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def _find_limits(suites: Sequence[SuiteReport], thresholds: Thresholds) -> dict[Unit, float]:
    """Return the end of each unit's axis: every interval fits, and so does a bound that applies."""
    ends: dict[Unit, list[float]] = {}
    for suite in suites:
        if suite.change is not None:
            mine = ends.setdefault(suite.unit, [])
            mine += suite.gain(suite.change)
            if suite.role == "general":
                mine.append(thresholds.general_bound(suite.unit))
    return {unit: interval_limit(mine) for unit, mine in ends.items()}


def _row(suite: SuiteReport, limits: dict[Unit, float], thresholds: Thresholds) -> Row:
    """Return a suite's row; a general suite shows its bound."""
    if suite.change is None:
        return Row(suite, None, None)
    bound = thresholds.general_bound(suite.unit) if suite.role == "general" else None
    plot = draw_interval(*suite.gain(suite.change), limit=limits[suite.unit], bound=bound)
    return Row(suite, suite.change, plot)
