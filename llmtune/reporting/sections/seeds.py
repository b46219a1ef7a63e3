"""Several trainings of one recipe: what each changed, and what holds over all of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from markupsafe import Markup

from llmtune.evaluation.stats import Resampling, holm
from llmtune.io.fingerprint import JsonObject
from llmtune.reporting.charts import draw_interval, interval_limit
from llmtune.reporting.numbers import Unit, unit_of_metric, without_nan


@dataclass(frozen=True)
class SeedSuite:
    """One suite: the change of the `compared` arms in every training, and over all of them.

    `changes` and `after` are by training, `difference` is the mean of the changes. (low, high) is
    the interval over trainings and items, `items_alone` that of the mean change over items only.
    `spread` is the standard deviation of the changes between trainings.
    """

    name: str
    role: str
    metric: str
    higher_is_better: bool
    n: int
    compared: tuple[str, str]
    before: float
    after: tuple[float, ...]
    changes: tuple[float, ...]
    difference: float
    low: float
    high: float
    p_value: float
    items_alone: tuple[float, float]
    spread: float
    is_enough: bool = True
    holm_p: float = 1.0

    @property
    def unit(self) -> Unit:
        """How this suite's scores are written."""
        return unit_of_metric(self.metric)

    @property
    def gain(self) -> tuple[float, float, float]:
        """The difference and its interval, turned so that positive is better."""
        if self.higher_is_better:
            return self.difference, self.low, self.high
        return -self.difference, -self.high, -self.low

    def outcome(self, significance: float) -> str:
        """Return `better`, `worse`, or that no difference is shown over trainings and items."""
        _, low, high = self.gain
        if self.holm_p > significance or low <= 0 <= high or (low > 0 and not self.is_enough):
            return "no difference shown"
        return "better" if low > 0 else "worse"


@dataclass(frozen=True)
class SeedStudy:
    """What several trainings of one recipe have in common, and in what they differ."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    verdicts: tuple[str, ...]
    suites: tuple[SeedSuite, ...]
    resampling: Resampling
    verdict: str = ""
    """The joint one."""

    @property
    def significance(self) -> float:
        """The level that Holm-adjusted p-values are held against."""
        return 1 - self.resampling.confidence

    def as_json(self) -> JsonObject:
        """Return the study for scripts."""
        runs = [
            {"run": name, "seed": seed, "verdict": verdict}
            for name, seed, verdict in zip(self.names, self.seeds, self.verdicts, strict=True)
        ]
        suites = {
            suite.name: asdict(suite) | {"outcome": suite.outcome(self.significance)}
            for suite in self.suites
        }
        values: dict[str, Any] = {
            "format": 1,
            "verdict": self.verdict,
            "runs": runs,
            "suites": suites,
            "statistics": asdict(self.resampling),
        }
        return without_nan(values)


@dataclass(frozen=True)
class ShownSuite:
    """One suite of the study with its interval drawn and its outcome in words."""

    suite: SeedSuite
    plot: Markup
    outcome: str


class SeedsSection(TypedDict):
    """What the template shows."""

    study: SeedStudy
    shown: list[ShownSuite]


def show_seeds(study: SeedStudy | None) -> SeedsSection | None:
    """Return every suite with its interval drawn; None for a single training."""
    if study is None:
        return None
    limits: dict[Unit, float] = {}
    for unit in {suite.unit for suite in study.suites}:
        ends = [end for suite in study.suites if suite.unit == unit for end in suite.gain]
        limits[unit] = interval_limit(ends)
    shown = [
        ShownSuite(
            suite,
            draw_interval(*suite.gain, limit=limits[suite.unit]),
            suite.outcome(study.significance),
        )
        for suite in study.suites
    ]
    return {"study": study, "shown": shown}


def adjust(suites: Sequence[SeedSuite]) -> list[SeedSuite]:
    """Return the suites with their p adjusted over the suites of the same role."""
    adjusted: list[SeedSuite] = []
    for role in dict.fromkeys(suite.role for suite in suites):
        mine = [suite for suite in suites if suite.role == role]
        p_values = holm([suite.p_value for suite in mine])
        adjusted += [replace(s, holm_p=p) for s, p in zip(mine, p_values, strict=True)]
    return adjusted
