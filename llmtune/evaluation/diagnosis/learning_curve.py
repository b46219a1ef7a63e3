"""What more rows give: the loss and the score of several trainings against their rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llmtune.evaluation.diagnosis.base import (
    Diagnosis,
    Diagnostic,
    Given,
    Interval,
    MoreRows,
    Planned,
    refuse,
)
from llmtune.evaluation.diagnosis.shown import (
    Block,
    Facts,
    Paragraph,
    Plot,
    Section,
)

LINE_POINTS = 61


@dataclass(frozen=True)
class CurvePoint:
    """One training of the curve: `loss` is the mean over the `n` items, `score` the suite's."""

    rows: int
    seed: int
    loss: float
    score: float
    n: int


@dataclass(frozen=True)
class Forecast:
    """What the law says at a number of rows, with its interval."""

    rows: int
    loss: float
    interval: Interval


@dataclass(frozen=True)
class PowerLaw:
    """L(n) = E + A n^-beta and what it says of two and four times the rows.

    `gain_at_2n` is L(n) - L(2n) with its interval; `n_need` are the rows at which the law reaches
    `target_loss`, None if it never does or no target was asked for.
    """

    E: float
    A: float
    beta: float
    at_n: Forecast
    at_2n: Forecast
    at_4n: Forecast
    gain_at_2n: float
    gain_interval: Interval
    target_loss: float | None = None
    n_need: float | None = None


@dataclass(frozen=True, kw_only=True)
class LearningCurveResult(Diagnostic):
    """Loss against rows on one suite.

    `fit` is the law of the loss, `score_fit` that of the suite's error (1 - score, or the score
    itself where lower is better). `refused` says why a law is not to be believed; `fit` is then
    None if there were too few points, or the law that shows no gain.
    """

    FILE_NAME: ClassVar[str] = "learning_curve.json"
    suite: str
    metric: str
    loss_name: str
    points: tuple[CurvePoint, ...]
    fit: PowerLaw | None
    score_fit: PowerLaw | None
    refused: str | None


class LearningCurve(Diagnosis[LearningCurveResult]):
    """Loss against rows on one suite; an experiment makes it, no evaluation."""

    name = "learning_curve"
    what = "learning curve"
    command = "llmtune learning-curve RUN"
    result = LearningCurveResult

    def plan(self, given: Given) -> Planned[LearningCurveResult]:
        """Refuse: it needs trainings of its own."""
        return refuse(LearningCurveResult, f"is made by: {self.command}")

    def section(self, found: LearningCurveResult, facts: Facts) -> Section | None:
        """Show the curve with its forecasts."""
        number, count, law = facts.write.number, facts.write.count, found.fit
        blocks: list[Block] = [_plot(found)]
        if law:
            twice, four = law.at_2n, law.at_4n
            text = (
                f"With twice the rows ({count(twice.rows)}) the loss would be "
                f"{number(twice.loss)} [{number(twice.interval[0])}, {number(twice.interval[1])}], "
                f"with four times {number(four.loss)} [{number(four.interval[0])}, "
                f"{number(four.interval[1])}]; now it is {number(law.at_n.loss)}. Twice the rows "
                f"would lower it by {number(law.gain_at_2n)} [{number(law.gain_interval[0])}, "
                f"{number(law.gain_interval[1])}]."
            )
            note = f"Fitted law: L(n) = {number(law.E)} + {number(law.A)} · n^−{number(law.beta)}."
            if law.n_need:
                note += (
                    f" The target loss {number(law.target_loss)} would need about "
                    f"{count(law.n_need)} rows."
                )
            blocks += [Paragraph(text), Paragraph(note, is_note=True)]
        if found.refused:
            blocks.append(Paragraph(f"No forecast is made of it: {found.refused}."))
        return Section("Would more data help?", tuple(blocks))

    def more_rows(self, found: LearningCurveResult) -> MoreRows | None:
        """Return the law's forecast of the loss, if there is a law to believe."""
        law = found.fit
        if law is None or found.refused:
            return None
        return MoreRows(
            suite=found.suite,
            rows=law.at_2n.rows,
            loss_name=found.loss_name,
            loss_now=law.at_n.loss,
            loss_then=law.at_2n.loss,
            gain=law.gain_at_2n,
            interval=law.gain_interval,
        )

    def lines(self, found: LearningCurveResult) -> Iterator[str]:
        """Yield the points, what more rows would give, and what speaks against it."""
        yield f"{found.suite}: {found.metric}, and loss ({found.loss_name})"
        for point in found.points:
            yield f"  {point.rows:>8,} rows, seed {point.seed}: {point.score:.4f}, {point.loss:.4f}"
        if found.fit is not None:
            for forecast in (found.fit.at_2n, found.fit.at_4n):
                yield f"  {_format_forecast(forecast)}"
        if found.score_fit is not None and found.score_fit.n_need is not None:
            yield f"  the score asked for would need about {found.score_fit.n_need:,.0f} rows"
        if found.refused is not None:
            yield f"not to be believed: {found.refused}"


def _format_forecast(forecast: Forecast) -> str:
    low, high = forecast.interval
    loss = f"{forecast.loss:.4f} ({low:.4f} to {high:.4f})"
    return f"{forecast.rows:>8,} rows would give a loss of {loss}"


def _plot(found: LearningCurveResult) -> Plot:
    law, points = found.fit, found.points
    line: tuple[tuple[float, float], ...] = ()
    forecasts: tuple[tuple[float, float, float, float], ...] = ()
    if law is not None:
        first, last = min(p.rows for p in points), law.at_4n.rows
        rows = [first * (last / first) ** (i / (LINE_POINTS - 1)) for i in range(LINE_POINTS)]
        line = tuple((n, law.E + law.A * n**-law.beta) for n in rows)
        forecasts = tuple((f.rows, f.loss, *f.interval) for f in (law.at_2n, law.at_4n))
    return Plot(
        name="learning",
        label=f"Loss over training rows, {len(points)} trainings",
        caption=f"{found.loss_name.capitalize()} on {found.suite} over training rows; the squares "
        "are forecasts with their intervals.",
        axes=("training rows", found.loss_name),
        points=tuple((p.rows, p.loss) for p in points),
        line=line,
        forecasts=forecasts,
    )
