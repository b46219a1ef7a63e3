"""Sentences about changes, made from their numbers, for the rules and the caveats."""

import math
from collections.abc import Callable, Iterable, Iterator

from llmtune.evaluation.stats import FEWEST_CLUSTERS, FEWEST_ITEMS
from llmtune.reporting.numbers import FRACTION, Unit, format_count
from llmtune.reporting.sections.arms import split_name
from llmtune.reporting.sections.strengths import StrengthChoice
from llmtune.reporting.suites import Change, SuiteReport
from llmtune.reporting.verdict.evidence import Evidence, gain_of, over_base

FEWER_SHARED = 0.5
"""Below this share of before it is said how many words of the base's answers are left."""


def format_change(suite: SuiteReport, confidence: float) -> str:
    """Format one suite's change as a sentence made from its numbers."""
    assert suite.change is not None, "only compared suites are described"
    unit, change = suite.unit, suite.change
    factor = f", perplexity ×{math.exp(change.difference):.2f}" if unit.name == "nats/token" else ""
    return (
        f"{suite.name}: {unit.score(suite.before)} → {unit.score(suite.after)}, a change of "
        f"{format_difference(suite, change, confidence)}, n = {suite.n}{factor}): "
        f"{word_for(suite, change)}.{format_answers(suite)}"
    )


def format_answers(suite: SuiteReport) -> str:
    """Format what answers were like before and are now; empty for a suite that has none written."""
    before, after = (suite.answers(arm) for arm in suite.compared or ("", ""))
    if before is None or after is None:
        return ""
    said = (
        f" An answer has {after.answer_words:.1f} words, before {before.answer_words:.1f}; "
        f"{FRACTION.score(after.short_answers)} are empty or one word, before "
        f"{FRACTION.score(before.short_answers)}."
    )
    if after.shared_words is None or before.shared_words is None:
        return said
    if after.shared_words > FEWER_SHARED * before.shared_words:
        return said
    return (
        f"{said} Of its words, {FRACTION.score(after.shared_words)} are also in the other answers "
        f"of the {suite.compared[0] if suite.compared else 'base'} model, before "
        f"{FRACTION.score(before.shared_words)}: is it a different language?"
    )


def format_lost_answers(suite: SuiteReport, confidence: float) -> str:
    """Format how many fewer answers hold the right one, although more whole answers are right."""
    assert suite.lenient is not None, "only suites of whole answers are described"
    return (
        f"{suite.name}: it learned the form and lost right answers: "
        f"{suite.unit.size(suite.lenient.difference)} fewer answers hold the right one anywhere in "
        f"the text, {format_difference(suite, suite.lenient, confidence)}). The model before, with "
        "the answer taken out of its text, may beat what ships."
    )


def format_merging(suite: SuiteReport, confidence: float) -> str:
    """Format what merging alone changed."""
    unit, change = suite.unit, suite.chain["merging"]
    return (
        f"{suite.name}: base + adapter {unit.score(suite.score('tuned'))}, merged "
        f"{unit.score(suite.score('merged'))}, a change of "
        f"{format_difference(suite, change, confidence)}): {word_for(suite, change)}."
    )


def format_rival(suite: SuiteReport, arm: str, confidence: float) -> str:
    """Format how the tuned model compares with a different arm, and what the items can show."""
    rival, unit = suite.rivals[arm], suite.unit
    assert rival.tuned_over is not None, "only compared arms are described"
    draws = suite.arms[arm].about.get("draws") or {}
    drawn = f" (mean of {len(draws)} draws)" if len(draws) > 1 else ""
    mde = f" {format_can_show(rival.n, rival.mde, unit)}." if rival.mde else ""
    label = split_name(arm).label.partition(",")[0]
    return (
        f"{suite.name}: {label}{drawn} {unit.score(suite.score(arm))}, tuned "
        f"{unit.score(suite.score('tuned'))}, tuned minus it "
        f"{format_difference(suite, rival.tuned_over, confidence)}): "
        f"{word_for(suite, rival.tuned_over)}.{mde}"
    )


def format_rivals(evidence: Evidence, arms: Iterable[str]) -> Iterator[str]:
    """Yield how these arms compare with the tuned model and with the bare base, and what broke."""
    for arm in arms:
        for suite in evidence.with_role("target"):
            change = over_base(suite, arm)
            if change is None:
                continue
            yield format_rival(suite, arm, evidence.confidence)
            over = format_difference(suite, change, evidence.confidence)
            yield f"Over the bare base that is {over}): {word_for(suite, change)}."
    yield from map(change_formatter(evidence), evidence.broken())


def format_at_strength(suite: SuiteReport, choice: StrengthChoice, confidence: float) -> str:
    """Format a suite's change at the chosen strength, on the items that did not choose it."""
    base, here, full = choice.held_scores[suite.name]
    change, unit = choice.held[suite.name], suite.unit
    return (
        f"{suite.name}, on the half not used to choose it: {unit.score(base)} → {unit.score(here)} "
        f"at strength {choice.strength:g}, {format_difference(suite, change, confidence)}): "
        f"{word_for(suite, change)}; {unit.score(full)} at full strength."
    )


def format_clean(suite: SuiteReport) -> str:
    """Format the scores on the items that are not in the training rows; empty if all are."""
    if suite.clean is None:
        return ""
    unit, clean = suite.unit, suite.clean
    return (
        f"On the other {format_count(clean.n)} items: {unit.score(clean.before)} → "
        f"{unit.score(clean.after)}, a change of {unit.difference(clean.change.difference)} "
        f"{unit.interval(clean.change.low, clean.change.high)}."
    )


def format_difference(suite: SuiteReport, change: Change, confidence: float) -> str:
    """Format a difference and its interval; the caller closes the parenthesis."""
    unit = suite.unit
    return (
        f"{unit.difference(change.difference)} ({confidence * 100:g} % interval "
        f"{unit.interval(change.low, change.high)}"
    )


def word_for(suite: SuiteReport, change: Change) -> str:
    """Return `better`, `worse` or `no difference shown`."""
    _, low, high = suite.gain(change)
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def change_formatter(evidence: Evidence) -> Callable[[SuiteReport], str]:
    """Return what writes a suite's change at the confidence of this evidence."""
    return lambda suite: format_change(suite, evidence.confidence)


def format_bounds(evidence: Evidence, suites: tuple[SuiteReport, ...]) -> str:
    """Format how much these suites may lose, each unit once."""
    units = dict.fromkeys(suite.unit for suite in suites)
    return " or ".join(unit.bound(evidence.thresholds.general_bound(unit)) for unit in units)


def format_what_would_decide(suite: SuiteReport) -> str:
    """Format how many items would decide this difference, or why none would."""
    assert suite.change is not None
    mde = f" {format_can_show(suite.n, suite.mde, suite.unit)}." if suite.mde else ""
    _, low, high = gain_of(suite)
    if not suite.change.is_enough:
        return f"{suite.name} is too small for a claim: {_format_floor(suite)}."
    change = suite.change
    if low > 0 and change.gain_p > change.p_value:
        return (
            f"On {suite.name} a few items changed for the worse by much more than most for the "
            f"better (skewness {change.harm_tail:.1f}); of such a tail a sample shows too little, "
            f"so its p-value of {change.p_value:.2g} counts as {change.gain_p:.2g}.{mde}"
        )
    if low > 0 or high < 0:
        return f"On {suite.name} this is not clear of chance after Holm's correction over suites."
    if suite.trainings > 1:
        return (
            f"{suite.trainings} trainings on {format_count(suite.n)} items of {suite.name} do not "
            f"decide; more seeds or more items might.{mde}"
        )
    if suite.gained == 0 and suite.lost == 0 and suite.change.difference == 0:
        return f"No item of {suite.name} changed its score.{mde}"
    if suite.needed_items is None:
        return f"The two are equal on {suite.name}, so no number of items would settle it.{mde}"
    size = suite.unit.size(suite.change.difference)
    return (
        f"About {format_count(suite.needed_items)} items would decide a difference of "
        f"{size} on {suite.name}.{mde}"
    )


def format_can_show(n: int, mde: float, unit: Unit) -> str:
    """Format the smallest difference that so many items show."""
    items = f"{format_count(n)} item{'' if n == 1 else 's'}"
    if unit == FRACTION and mde > 1:
        return f"{items} cannot show any difference"
    return f"{items} can show {unit.size(mde)} or more"


def format_unshown(suite: SuiteReport, evidence: Evidence) -> str:
    """Format why a general suite is not shown to be within its bound, without a full stop."""
    assert suite.change is not None
    if not suite.change.is_enough:
        return f"{suite.name} is too small for a claim: {_format_floor(suite)}"
    if evidence.is_at_chance(suite):
        return (
            f"on {suite.name} there was next to nothing to lose ({suite.unit.score(suite.before)} "
            f"before, and guessing scores {suite.unit.score(suite.chance)})"
        )
    bound = suite.unit.bound(evidence.thresholds.general_bound(suite.unit))
    shows = f"; {format_can_show(suite.n, suite.mde, suite.unit)}" if suite.mde else ""
    lost = suite.unit.size(gain_of(suite)[1])
    return f"{suite.name} may have lost {lost}, beyond its bound of {bound}{shows}"


def format_doubt(suite: SuiteReport, evidence: Evidence) -> str:
    """Format that a general suite was measured beyond its bound and chance may explain it."""
    bound = suite.unit.bound(evidence.thresholds.general_bound(suite.unit))
    needed = (
        f" About {format_count(suite.needed_items)} items would decide."
        if suite.needed_items
        else ""
    )
    return (
        f"{suite.name} was measured beyond its bound of {bound}, and its {format_count(suite.n)} "
        f"items cannot tell whether that is chance.{needed}"
    )


def _format_floor(suite: SuiteReport) -> str:
    clusters = f" in {format_count(suite.clusters)} clusters" if suite.clusters else ""
    items = f"{format_count(suite.n)} item{'' if suite.n == 1 else 's'}"
    return f"{items}{clusters}, of {FEWEST_ITEMS} in {FEWEST_CLUSTERS} that are the least"


def format_below_majority(suite: SuiteReport) -> str:
    """Return the sentence for a gain that is not shown to be above the most frequent answer."""
    return (
        f"The gain on {suite.name} is real, but always giving its most frequent answer scores "
        f"{FRACTION.score(suite.majority)}, and the tuned model is not "
        f"{format_over_majority(suite)}."
    )


def format_over_majority(suite: SuiteReport) -> str:
    """Return `above that`, or what is not shown of it if it was measured higher by chance."""
    change = suite.over_majority
    if change is None or change.difference <= 0:
        return "above that"
    return (
        f"shown to be above that ({suite.unit.difference(change.difference)}, interval "
        f"{suite.unit.interval(change.low, change.high)})"
    )
