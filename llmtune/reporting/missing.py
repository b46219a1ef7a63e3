"""What a report does not hold, and the command that would measure it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmtune.evaluation.compare import arm_kind
from llmtune.evaluation.diagnosis.base import FULL, QUICK
from llmtune.reporting.diagnostics import Diagnostics
from llmtune.reporting.suites import SuiteReport

EVALUATE = "llmtune eval RUN"
JUDGE = "llmtune judge RUN"


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
    if present.judged is not None:
        return _find_missing_of_judged(suites, diagnostics, present)
    kinds = {arm_kind(name) for suite in suites for name in suite.arms}
    has_choices = any(suite.chance is not None for suite in suites if suite.role == "target")
    diagnosed: dict[str, dict[Missing, bool]] = {QUICK: {}, FULL: {}, "": {}}
    for diagnosis, found in diagnostics:
        command = diagnosis.measured_by
        diagnosed[command if command in diagnosed else ""][Missing(diagnosis.what, command)] = (
            diagnosis.is_missing(found, kinds, has_choices=has_choices)
        )
    absent: Mapping[Missing, bool] = {
        Missing("evaluation of the original base", EVALUATE): "original" not in kinds,
        Missing("evaluation of the base model", EVALUATE): "base" not in kinds,
        Missing("evaluation of the tuned model", EVALUATE): "tuned" not in kinds,
        Missing("evaluation of the merged model", EVALUATE): "merged" not in kinds,
        Missing(
            "a suite of general ability", "llmtune eval RUN evaluate.suites='[..., general]'"
        ): (not any(suite.role == "general" for suite in suites)),
        Missing("loss curve", "llmtune train RUN"): not present.loss_curve,
        Missing("example generations", EVALUATE): not present.generations,
        Missing("merge check", "llmtune merge RUN"): not present.merge,
        **diagnosed[QUICK],
        Missing("other strengths of the adapter", QUICK): "strength" not in kinds,
        Missing("few-shot prompting of the base", FULL): "few-shot" not in kinds,
        **diagnosed[FULL],
        **diagnosed[""],
    }
    return tuple(missing for missing, is_absent in absent.items() if is_absent)


def _find_missing_of_judged(
    suites: tuple[SuiteReport, ...], diagnostics: Diagnostics, present: Present
) -> tuple[Missing, ...]:
    """Return what a judgment did not measure, as far as there is something to measure."""
    kinds = {arm_kind(name) for suite in suites for name in suite.arms}
    has_choices = any(suite.chance is not None for suite in suites if suite.role == "target")
    has_general = any(suite.role == "general" for suite in suites)
    absent: dict[Missing, bool] = {
        Missing("evaluation of the original base", JUDGE): "original" not in kinds,
        Missing("evaluation of the merged model", JUDGE): "merged" not in kinds,
        Missing("a suite of general ability", f"{JUDGE} --suites general ..."): not has_general,
    }
    if present.judged == "adapter":
        absent[Missing("evaluation of base + adapter", JUDGE)] = "tuned" not in kinds
        absent[Missing("example generations", JUDGE)] = not present.generations
        rows = "" if present.rows else " data.train='[{path: FILE}]'"
        extents = {QUICK: "quick", FULL: "full"}
        for diagnosis, found in diagnostics:
            if diagnosis.measured_by in extents:
                extent = f"evaluate.extent={extents[diagnosis.measured_by]}"
                command = f"{JUDGE} {extent}{rows if diagnosis.needs_rows else ''}"
                absent[Missing(diagnosis.what, command)] = diagnosis.is_missing(
                    found, kinds, has_choices=has_choices
                )
        few_shot = f"{JUDGE} evaluate.extent=full{rows}"
        absent[Missing("few-shot prompting of the base", few_shot)] = "few-shot" not in kinds
    return tuple(missing for missing, is_absent in absent.items() if is_absent)
