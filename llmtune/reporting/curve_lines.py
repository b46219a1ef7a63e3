"""A learning curve as lines for the terminal."""

from collections.abc import Iterator

from llmtune.evaluation.diagnosis.results import Forecast, LearningCurveResult


def curve_lines(found: LearningCurveResult) -> list[str]:
    """Return the points, what twice and four times the rows would give, and what speaks against."""
    return list(_iter_lines(found))


def _iter_lines(found: LearningCurveResult) -> Iterator[str]:
    yield f"{found.suite}: {found.metric}, and loss ({found.loss_name})"
    for point in found.points:
        yield f"  {point.rows:>8,} rows, seed {point.seed}: {point.score:.4f}, {point.loss:.4f}"
    if found.fit is not None:
        for forecast in (found.fit.at_2n, found.fit.at_4n):
            yield f"  {_forecast(forecast)}"
    if found.score_fit is not None and found.score_fit.n_need is not None:
        yield f"  the score asked for would need about {found.score_fit.n_need:,.0f} rows"
    if found.refused is not None:
        yield f"not to be believed: {found.refused}"


def _forecast(forecast: Forecast) -> str:
    low, high = forecast.interval
    loss = f"{forecast.loss:.4f} ({low:.4f} to {high:.4f})"
    return f"{forecast.rows:>8,} rows would give a loss of {loss}"
