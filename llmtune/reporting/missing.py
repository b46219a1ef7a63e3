"""What a report does not hold, and the command that would measure it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from llmtune.evaluation.compare import arm_kind
from llmtune.evaluation.diagnosis.base import FULL, QUICK, Diagnosis
from llmtune.reporting.diagnostics import Diagnostics
from llmtune.reporting.suites import SuiteReport

EVALUATE = "llmtune eval RUN"
JUDGE = "llmtune judge RUN"
MAIN_WORDS = {
    "original": "the original base",
    "base": "the base model",
    "tuned": "the tuned model",
    "merged": "the merged model",
}


@dataclass(frozen=True)
class Missing:
    """One thing that was not measured; `command` measures it, None if no command alone does."""

    name: str
    command: str | None


@dataclass(frozen=True)
class Present:
    """What a run has made, beside its suites.

    `judged` is what `llmtune judge` was given instead of training: a whole model has no adapter.
    """

    loss_curve: bool
    generations: bool
    merge: bool
    judged: Literal["adapter", "model"] | None = None
    rows: bool = True
    """Whether the rows that were trained on are known."""


def find_missing(
    suites: tuple[SuiteReport, ...], diagnostics: Diagnostics, present: Present
) -> tuple[Missing, ...]:
    """Return what was not made, in the order of the report."""
    scored = {arm_kind(name) for suite in suites for name in suite.arms}
    has_choices = any(suite.chance is not None for suite in suites if suite.role == "target")
    has_general = any(suite.role == "general" for suite in suites)
    unmade = [
        diagnosis
        for diagnosis, found in diagnostics
        if diagnosis.is_missing(found, scored, has_choices=has_choices)
    ]
    find = _of_run if present.judged is None else _of_judgment
    return tuple(find(scored, unmade, present, has_general=has_general))


def _of_run(
    scored: Set[str], unmade: Sequence[Diagnosis[Any]], present: Present, *, has_general: bool
) -> Iterator[Missing]:
    """Yield what a run did not make: first what every run has, then what an extent adds."""
    by_command: dict[str, list[Missing]] = defaultdict(list)
    for diagnosis in unmade:
        by_command[diagnosis.measured_by].append(Missing(diagnosis.what, diagnosis.measured_by))
    for arm, words in MAIN_WORDS.items():
        if arm not in scored:
            yield Missing(f"evaluation of {words}", EVALUATE)
    if not has_general:
        command = "llmtune eval RUN evaluate.suites='[..., general]'"
        yield Missing("a suite of general ability", command)
    if not present.loss_curve:
        yield Missing("loss curve", "llmtune train RUN")
    if not present.generations:
        yield Missing("example generations", EVALUATE)
    if not present.merge:
        yield Missing("merge check", "llmtune merge RUN")
    yield from by_command.pop(QUICK, ())
    if "strength" not in scored:
        yield Missing("other strengths of the adapter", QUICK)
    if "few-shot" not in scored:
        yield Missing("few-shot prompting of the base", FULL)
    yield from by_command.pop(FULL, ())
    for others in by_command.values():
        yield from others


def _of_judgment(
    scored: Set[str], unmade: Sequence[Diagnosis[Any]], present: Present, *, has_general: bool
) -> Iterator[Missing]:
    """Yield what a judgment did not measure, as far as there is something to measure."""
    for arm, words in MAIN_WORDS.items():
        if arm in ("original", "merged") and arm not in scored:
            yield Missing(f"evaluation of {words}", JUDGE)
    if not has_general:
        yield Missing("a suite of general ability", f"{JUDGE} --suites general ...")
    if present.judged != "adapter":
        return
    if "tuned" not in scored:
        yield Missing("evaluation of base + adapter", JUDGE)
    if not present.generations:
        yield Missing("example generations", JUDGE)
    rows = "" if present.rows else " data.train='[{path: FILE}]'"
    for diagnosis in unmade:
        if diagnosis.extent is not None:
            extent = f"evaluate.extent={diagnosis.extent}"
            needed = rows if diagnosis.needs_rows else ""
            yield Missing(diagnosis.what, f"{JUDGE} {extent}{needed}")
    if "few-shot" not in scored:
        yield Missing("few-shot prompting of the base", f"{JUDGE} evaluate.extent=full{rows}")
