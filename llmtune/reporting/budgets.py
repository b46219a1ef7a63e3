"""Regression budgets: `--fail-if general_loss>0.2` makes a measured number decide the exit code."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.evaluation.diagnosis.base import Diagnosis
from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.reporting.numbers import MINUS
from llmtune.reporting.report import Report
from llmtune.reporting.suites import SuiteReport

Number = Callable[[Report], float | None]

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
EXPRESSION = re.compile(r"\s*(?P<name>\S.*?)\s*(?P<op><=|>=|==|!=|<|>)\s*(?P<bound>\S+)\s*")
SUITE_NUMBERS = ("change", "gain", "tuned", "base", "original", "merged", "unparseable")
EXAMPLE = "general_loss>0.2"


@dataclass(frozen=True)
class Budget:
    """One condition under which a report fails: a name, an operator and a bound."""

    name: str
    op: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.op}{self.bound:g}"


def parse_budgets(expressions: Iterable[str]) -> tuple[Budget, ...]:
    """Read expressions of the form NAME OP NUMBER; nothing is ever evaluated.

    Raises:
        LlmtuneError: one of them is something else.
    """
    return tuple(map(_parse, expressions))


def require_known_names(budgets: Sequence[Budget], suites: Iterable[str]) -> None:
    """Refuse names that are neither a measure nor a suite, and list those that are.

    Raises:
        LlmtuneError: a name is unknown.
    """
    names = list(suites)
    known = {*MEASURES, *names, *(f"{name}.{part}" for name in names for part in SUITE_NUMBERS)}
    unknown = [budget.name for budget in budgets if budget.name not in known]
    if unknown:
        suite_names = f", and of each suite NAME or NAME.{{{','.join(SUITE_NUMBERS)}}}"
        raise LlmtuneError(
            f"--fail-if: unknown name {unknown[0]!r}; known are {', '.join(MEASURES)}{suite_names} "
            f"(suites: {', '.join(names) or 'none'})"
        )


def check_budgets(report: Report, budgets: Sequence[Budget]) -> None:
    """Hold a report against its budgets; a number that was not measured fails too.

    Raises:
        LlmtuneError: a name is unknown.
        CheckFailed: a budget is violated, or its number was not measured; all are named.
    """
    configured = report.manifest.config.get("evaluate", {}).get("suites") or ()
    stems = [str(name).rpartition("/")[2].removesuffix(".yaml") for name in configured]
    names = dict.fromkeys([*(suite.name for suite in report.suites), *stems])
    require_known_names(budgets, names)
    problems = []
    for budget in budgets:
        value = measure(report, budget.name)
        if value is None:
            problems.append(f"{budget}: {budget.name} was not measured in this run")
        elif OPERATORS[budget.op](value, budget.bound):
            problems.append(f"{budget}: {budget.name} is {_format(value)}")
    if problems:
        raise CheckFailed("--fail-if: " + "; ".join(problems))


def measure(report: Report, name: str) -> float | None:
    """Return the number that a budget names, None if it was not measured."""
    if name in MEASURES:
        value = MEASURES[name](report)
    else:
        suites = {suite.name: suite for suite in report.suites}
        suite_name, _, part = name.rpartition(".") if name not in suites else (name, "", "change")
        suite = suites.get(suite_name)
        value = _suite_number(suite, part) if suite is not None else None
    return value if value is not None and math.isfinite(value) else None


def _parse(expression: str) -> Budget:
    match = EXPRESSION.fullmatch(expression)
    try:
        bound = float(match["bound"]) if match else math.nan
    except ValueError:
        bound = math.nan
    if match is None or not math.isfinite(bound):
        raise LlmtuneError(
            f"--fail-if {expression!r}: expected NAME OP NUMBER, as in {EXAMPLE}, with one of "
            f"{' '.join(OPERATORS)}"
        )
    return Budget(match["name"], match["op"], bound)


def _suite_number(suite: SuiteReport, part: str) -> float | None:
    if part == "unparseable":
        return _unparseable_share(suite)
    if part in ("change", "gain"):
        if suite.change is None:
            return None
        return suite.change.difference if part == "change" else suite.gain(suite.change)[0]
    return suite.score(part)


def _unparseable_share(suite: SuiteReport) -> float | None:
    tuned = suite.arms.get("tuned")
    return tuned.unparseable / suite.n if tuned and suite.n else None


def _largest_loss(unit: str) -> Number:
    """Return what finds the largest worsening among the general suites of a unit."""

    def largest(report: Report) -> float | None:
        suites = [s for s in report.with_role("general") if s.unit.name == unit]
        losses = [-suite.gain(suite.change)[0] for suite in suites if suite.change is not None]
        return max(losses, default=None)

    return largest


def _smallest_gain(role: str) -> Number:
    def smallest(report: Report) -> float | None:
        suites = report.with_role(role)
        return min((s.gain(s.change)[0] for s in suites if s.change is not None), default=None)

    return smallest


def _unparseable(report: Report) -> float | None:
    shares = [_unparseable_share(suite) for suite in report.suites]
    return max((share for share in shares if share is not None), default=None)


def _diagnosed(diagnosis: Diagnosis[Any], name: str) -> Number:
    """Return what reads a number that a diagnosis found."""

    def read(report: Report) -> float | None:
        found = report.diagnostics.found.get(diagnosis.name)
        return None if found is None else diagnosis.numbers(found).get(name)

    return read


MEASURES: Mapping[str, Number] = {
    "general_loss": _largest_loss("nats/token"),
    "general_bits": _largest_loss("bits/byte"),
    "general_drop": _largest_loss("fraction"),
    "target_gain": _smallest_gain("target"),
    "transfer_gain": _smallest_gain("transfer"),
    "unparseable": _unparseable,
    **{
        name: _diagnosed(diagnosis, name)
        for diagnosis in DIAGNOSES
        for name in diagnosis.number_names
    },
    "seconds": lambda report: report.cost.total_seconds,
    "peak_bytes": lambda report: report.cost.largest_peak_bytes,
}
"""What a budget may name besides suites; docs/report.md explains each."""


def _format(value: float) -> str:
    return f"{value:.6g}".replace("-", MINUS, 1)
