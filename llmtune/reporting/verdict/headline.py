"""What is shown next to the verdict's name: what was not shown or measured, and what to do now."""

from collections.abc import Iterator

from llmtune.reporting.beside import find_disagreements, format_points
from llmtune.reporting.verdict.evidence import Evidence
from llmtune.reporting.verdict.outcome import AT_STRENGTH, TO_DO, UNSHOWN, Verdict
from llmtune.reporting.verdict.sentences import format_unshown

SHIPPING = ("SHIP", UNSHOWN, f"{AT_STRENGTH} x")


def find_carried(verdict: Verdict, evidence: Evidence) -> Iterator[str]:
    """Yield what was not shown or not measured and could change a verdict to ship."""
    if verdict.kind not in SHIPPING:
        return
    if not evidence.with_role("general"):
        yield "general ability not measured"
    if verdict.kind == UNSHOWN:
        for suite in evidence.unshown():
            yield f"general ability not shown: {format_unshown(suite, evidence)}"
    yield from _only_for_ranking(evidence)
    missing = _unmeasured(evidence)
    if missing:
        verb = "was" if len(missing) == 1 else "were"
        yield f"{' and '.join(missing)} {verb} not measured and could be as good"


def _only_for_ranking(evidence: Evidence) -> Iterator[str]:
    """Yield the target suites on which the likeliest choice and the written answer part."""
    for suite in evidence.with_role("target"):
        for found in find_disagreements(suite):
            if found.is_about_writing:
                yield (
                    f"on {suite.name} it holds for ranking the choices "
                    f"({format_points(found.main)}); written answers change by "
                    f"{format_points(found.beside)}"
                )


def find_what_to_do(verdict: Verdict, evidence: Evidence) -> str:
    """Return what to do now."""
    if verdict.kind in SHIPPING and _unmeasured(evidence):
        command = "judge RUN evaluate.extent=full" if evidence.is_judged else "report RUN --full"
        return (
            f"{TO_DO[verdict.kind]} To know whether less would do, measure "
            f"{' and '.join(_unmeasured(evidence))}: llmtune {command}"
        )
    return TO_DO[verdict.kind]


def _unmeasured(evidence: Evidence) -> list[str]:
    """Return the alternatives without training that were not measured and apply to the task."""
    targets = evidence.with_role("target")
    missing = [] if evidence.prompts() else ["few-shot prompting"]
    arms = {name for suite in targets for name in suite.rivals}
    has_choices = any(suite.chance is not None for suite in targets)
    return missing + [
        diagnosis.alternative.words
        for diagnosis, found in evidence.diagnostics
        if diagnosis.alternative is not None
        and diagnosis.is_missing(found, arms, has_choices=has_choices)
    ]
