"""What a reader must know besides the verdict: sentences made from the numbers."""

from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.data.problems import name_first
from llmtune.evaluation.diagnosis.config import ALTERNATIVES
from llmtune.reporting.beside import CUT_OFF
from llmtune.reporting.numbers import FRACTION, format_count
from llmtune.reporting.sections.arms import split_name
from llmtune.reporting.suites import SuiteReport, Thresholds
from llmtune.reporting.verdict.evidence import (
    Evidence,
    gain_of,
    is_above_majority,
    tuned_over,
)
from llmtune.reporting.verdict.rules import ship_at_strength
from llmtune.reporting.verdict.sentences import format_change, format_clean, format_over_majority

UNPARSEABLE_RATIO = 0.05
CUT_OFF_MORE = 0.1
"""Answers cut off more often than this, as a share, in one of the compared models."""
MAX_SLICES = 5
SEEN_ENOUGH = 0.9
"""Of the training rows, as a share."""


def find_caveats(evidence: Evidence) -> tuple[str, ...]:
    """Return the sentences that hold for these numbers; none if nothing is wrong."""
    checks = (
        _transfer_worse,
        _general_worse,
        _general_not_measured,
        _below_majority,
        _merged_worse,
        _slices_worse,
        _slices_left_out,
        _unparseable,
        _cut_off,
        _general_could_be_broken,
        _some_items_leaked,
        _smaller_strength_would_do,
        _rivals_undecided,
        _diagnosed,
    )
    return tuple(sentence for check in checks for sentence in check(evidence))


def find_training_caveats(training: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the caveats that follow from the train stage's result.

    A model that does not end most of its answers by itself writes until it is cut off.
    """
    price = training.get("quantization_price") or {}
    bound = Thresholds().general_loss_rise
    costly: tuple[str, ...] = ()
    if (price.get("price") or 0.0) > bound / 2:
        costly = (
            f"{price['method']} alone cost {price['price']:+.3f} nats/token on general text before "
            f"training, of {bound:g} that may be lost; model.quantization=null costs nothing but "
            "memory.",
        )
    costly += tuple(_rows_not_seen(training))
    check = training.get("stop_check") or {}
    stopped, asked = check.get("stopped"), check.get("asked")
    if not asked or stopped is None or 2 * stopped >= asked:
        return costly
    return (
        *costly,
        f"The tuned model ended only {stopped} of {asked} answers by itself (within "
        f"{check.get('max_new_tokens')} tokens, right after training): it may not have learned "
        "to stop.",
    )


def _rows_not_seen(training: Mapping[str, Any]) -> Iterator[str]:
    """Say which share of the rows was read, unless early stopping chose to read no more."""
    counted = training.get("rows") or {}
    rows, seen = counted.get("rows", 0), counted.get("seen", 0)
    if not rows or seen >= SEEN_ENOUGH * rows or training.get("stopped_by") == "early_stopping":
        return
    falling = ", and the loss was still falling" if counted.get("is_loss_falling") else ""
    yield (
        f"Only {format_count(seen)} of {format_count(rows)} training rows "
        f"({FRACTION.score(seen / rows)}) were seen{falling}: more steps "
        "(train.num_epochs=1 reads each row once) may give more."
    )


def worse_slices(suite: SuiteReport, significance: float) -> list[str]:
    """Return the slices that lost, clear of 0 after Holm's correction, worst first.

    Slices below the floor of items and clusters show nothing.
    """
    lost = [
        (suite.gain(each.change)[0], f"{each.column} = {each.value}")
        for each in suite.slices
        if suite.gain(each.change)[2] < 0 and each.change.is_enough and each.holm_p <= significance
    ]
    return [name for _, name in sorted(lost)]


def _transfer_worse(evidence: Evidence) -> Iterator[str]:
    for suite in evidence.worse("transfer"):
        sentence = format_change(suite, evidence.confidence)
        yield f"A domain outside the training data got worse. {sentence}"


def _general_worse(evidence: Evidence) -> Iterator[str]:
    broken = evidence.broken()
    for suite in evidence.worse("general"):
        if suite not in broken:
            bound = suite.unit.bound(evidence.thresholds.general_bound(suite.unit))
            lost = suite.unit.size(gain_of(suite)[0])
            yield f"{suite.name}: general ability fell by {lost}, within the bound of {bound}."


def _general_not_measured(evidence: Evidence) -> Iterator[str]:
    if evidence.with_role("target") and not evidence.with_role("general"):
        yield "General ability was not measured: no suite with role `general` was evaluated."


def _below_majority(evidence: Evidence) -> Iterator[str]:
    for suite in evidence.suites:
        if suite.compared is not None and not is_above_majority(suite):
            yield (
                f"{suite.name}: always giving the most frequent answer scores "
                f"{suite.unit.score(suite.majority)}; the {suite.compared[1]} model "
                f"({suite.unit.score(suite.after)}) is not {format_over_majority(suite)}."
            )


def _merged_worse(evidence: Evidence) -> Iterator[str]:
    for suite in evidence.suites:
        change = suite.chain.get("merging")
        if change is None:
            continue
        gain, _, high = suite.gain(change)
        if high < 0:
            yield (
                f"{suite.name}: the merged model is worse than base + adapter by "
                f"{suite.unit.size(gain)}, clear of 0; what you would ship is not what was tuned."
            )


def _slices_worse(evidence: Evidence) -> Iterator[str]:
    for suite in evidence.suites:
        names = worse_slices(suite, evidence.significance)
        if names:
            yield f"{suite.name}: these slices lost: {name_first(names, MAX_SLICES)}."


def _slices_left_out(evidence: Evidence) -> Iterator[str]:
    for suite in evidence.suites:
        for column, count in suite.wide_columns.items():
            yield (
                f"{suite.name}: `{column}` has {format_count(count)} values, too many to break the "
                "change down by; name a coarser field in the suite's `slices`."
            )


def _unparseable(evidence: Evidence) -> Iterator[str]:
    for suite in evidence.suites:
        for name, arm in suite.arms.items():
            if suite.n and arm.unparseable / suite.n > UNPARSEABLE_RATIO:
                share = FRACTION.score(arm.unparseable / suite.n)
                yield (
                    f"{suite.name}: {share} of the {name} model's answers could not be parsed and "
                    "score 0, so part of the difference may be due to format alone."
                )


def _cut_off(evidence: Evidence) -> Iterator[str]:
    for suite in evidence.suites:
        if suite.compared is None:
            continue
        before, after = (suite.arms[arm].also.get(CUT_OFF) for arm in suite.compared)
        if before is not None and after is not None and before - after > CUT_OFF_MORE:
            yield (
                f"{suite.name}: {FRACTION.score(before)} of the answers of the {suite.compared[0]} "
                f"model were cut off at max_new_tokens, {FRACTION.score(after)} of those of the "
                f"{suite.compared[1]} model; the rest of them may have been right, so allow more "
                "tokens before you believe the gain."
            )


def _general_could_be_broken(evidence: Evidence) -> Iterator[str]:
    broken = evidence.broken()
    for suite in evidence.with_role("general"):
        bound = evidence.thresholds.general_bound(suite.unit)
        _, low, _ = gain_of(suite)
        if suite not in broken and -low > bound:
            yield (
                f"{suite.name}: its {suite.n} items cannot rule out a loss beyond the bound of "
                f"{suite.unit.bound(bound)}; it may be as large as {suite.unit.size(low)}."
            )


def _some_items_leaked(evidence: Evidence) -> Iterator[str]:
    blocked = {suite.name for suite, _ in evidence.leaked()}
    found = evidence.diagnostics.leaks
    for suite in evidence.suites:
        leaked = found.get(suite.name)
        if leaked and leaked.item_ids and suite.name not in blocked:
            yield (
                f"{suite.name}: {format_count(len(leaked.item_ids))} of {format_count(leaked.n)} "
                f"items are in the training rows, or nearly so ({leaked.ways}). "
                f"{format_clean(suite)}"
            ).rstrip()


def _smaller_strength_would_do(evidence: Evidence) -> Iterator[str]:
    choice = evidence.strengths.choice if evidence.strengths else None
    if choice is None or not evidence.better("target") or ship_at_strength(evidence):
        return
    forgotten = [s for s in evidence.worse("general") if s.name in choice.held]
    if forgotten:
        losses = ", ".join(
            f"{suite.name} {suite.unit.change(choice.held[suite.name].difference)} instead of "
            f"{suite.unit.change(choice.held_full[suite.name].difference)}"
            for suite in forgotten
        )
        yield (
            f"Strength {choice.strength:g} keeps the target within the margin of full "
            f"strength and forgets less ({losses}; on the half of the items not used to choose it)."
        )


def _rivals_undecided(evidence: Evidence) -> Iterator[str]:
    """Yield the alternatives that tuning is not shown to beat, nor they to be as good."""
    for suite in evidence.better("target"):
        for arm in (*evidence.prompts(), *ALTERNATIVES):
            change = tuned_over(suite, arm)
            if change is None or evidence.is_as_good(arm, among=evidence.prompts()):
                continue
            lead, low, high = suite.gain(change)
            if low <= 0 <= high:
                yield (
                    f"{suite.name}: tuning is not shown to beat {split_name(arm).label} "
                    f"({suite.unit.difference(lead)}, interval {suite.unit.interval(low, high)}), "
                    f"which is not shown to be as good (within "
                    f"{suite.unit.size(evidence.margin(suite))}) either."
                )


def _diagnosed(evidence: Evidence) -> Iterator[str]:
    """Yield what the diagnoses themselves say that a reader must know."""
    for diagnosis, found in evidence.diagnostics:
        if found is not None:
            yield from diagnosis.caveats(found)
