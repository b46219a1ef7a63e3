"""The rules on base and tuned model: each returns its verdict where its numbers hold, else None."""

from typing import Any

from llmtune.reporting.evidence import Evidence, is_above_majority
from llmtune.reporting.numbers import FRACTION, format_count
from llmtune.reporting.outcome import Verdict
from llmtune.reporting.sentences import (
    change_formatter,
    format_below_majority,
    format_bounds,
    format_clean,
    format_what_would_decide,
)
from llmtune.reporting.suites import SuiteReport


def contaminated(evidence: Evidence) -> Verdict | None:
    """CONTAMINATED: too many items of a target suite stand word for word in the training rows."""
    found = evidence.contaminated()
    if not found:
        return None
    bound = evidence.thresholds.contaminated_share
    reasons, numbers = [], {}
    for suite, leaked in found:
        reasons.append(
            f"{suite.name}: {format_count(leaked.exact)} of {format_count(leaked.n)} items stand "
            f"word for word in the training rows ({FRACTION.score(leaked.exact_share)}, more than "
            f"{FRACTION.score(bound)})."
        )
        reasons += filter(None, [format_clean(suite)])
        numbers[suite.name] = {"exact": leaked.exact, "n": leaked.n, "bound": bound}
    reasons.append("Take these items out of the suite or out of the training rows, and run again.")
    return Verdict("CONTAMINATED", tuple(reasons), numbers)


def not_measured(evidence: Evidence) -> Verdict | None:
    """NOT-MEASURED: no target suite has both a base and a tuned score."""
    if evidence.with_role("target"):
        return None
    has_suites = any(suite.change for suite in evidence.suites)
    reason = (
        "No suite has the role `target`, so whether the tuning worked on its task is unknown."
        if has_suites
        else "Base and tuned model were not compared on any suite, so there is nothing to judge."
    )
    return Verdict("NOT-MEASURED", (reason,))


def negative(evidence: Evidence) -> Verdict | None:
    """NEGATIVE: on a target suite the tuned model is worse, its interval clear of 0."""
    worse = evidence.worse("target")
    if not worse:
        return None
    format_suite = change_formatter(evidence)
    reasons = [*map(format_suite, worse), *map(format_suite, evidence.broken())]
    reasons.append(
        "The tuning hurt the very task it was trained on: check labels and format first."
    )
    return Verdict("NEGATIVE", tuple(reasons), suite_numbers(worse))


def broke_general(evidence: Evidence) -> Verdict | None:
    """BROKE-GENERAL: a general suite lost more than the bound, its interval clear of 0."""
    broken = evidence.broken()
    if not broken:
        return None
    format_suite = change_formatter(evidence)
    reasons = [format_suite(suite) for suite in (*evidence.with_role("target"), *broken)]
    reasons.append(f"General ability may lose {format_bounds(evidence, broken)}, and lost more.")
    return Verdict("BROKE-GENERAL", tuple(reasons), suite_numbers(broken))


def ship(evidence: Evidence) -> Verdict | None:
    """SHIP: a target gain clear of 0 and above the majority class, and general not broken."""
    better = evidence.better("target")
    if evidence.worse("target") or evidence.broken() or not better:
        return None
    if any(not is_above_majority(suite) for suite in better):
        return None
    format_suite = change_formatter(evidence)
    reasons = [format_suite(suite) for suite in evidence.with_role("target")]
    generals = evidence.with_role("general")
    reasons += [format_suite(suite) for suite in generals]
    if generals:
        reasons.append(
            f"No general suite is shown to have lost {format_bounds(evidence, generals)}."
        )
    return Verdict("SHIP", tuple(reasons), suite_numbers((*better, *generals)))


def inconclusive(evidence: Evidence) -> Verdict | None:
    """INCONCLUSIVE: neither a gain nor a loss on the target is shown by these items."""
    targets = evidence.with_role("target")
    better = evidence.better("target")
    if not targets or evidence.worse("target"):
        return None
    if better and all(is_above_majority(suite) for suite in better):
        return None
    format_suite = change_formatter(evidence)
    reasons: list[str] = []
    for suite in targets:
        reasons.append(format_suite(suite))
        reasons.append(
            format_below_majority(suite) if suite in better else format_what_would_decide(suite)
        )
    return Verdict("INCONCLUSIVE", tuple(filter(None, reasons)), suite_numbers(targets))


def suite_numbers(suites: tuple[SuiteReport, ...]) -> dict[str, Any]:
    """Return the numbers of base against tuned by suite, as report.json holds what decided."""
    return {
        suite.name: {
            "role": suite.role,
            "difference": suite.change.difference,
            "interval": [suite.change.low, suite.change.high],
            "n": suite.n,
            "mde": suite.mde,
            "needed_items": suite.needed_items,
        }
        for suite in suites
        if suite.change is not None
    }
