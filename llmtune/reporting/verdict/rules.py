"""The rules in their order; the first that holds decides."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace

from llmtune.evaluation.diagnosis.config import ALTERNATIVES
from llmtune.reporting.numbers import FRACTION, NATS, format_count
from llmtune.reporting.suites import SuiteReport
from llmtune.reporting.verdict.evidence import Evidence, is_above_majority
from llmtune.reporting.verdict.outcome import (
    ABILITY_WORDS,
    AT_STRENGTH,
    MERGE_DIFFERENTLY,
    UNSHOWN,
    Numbers,
    Verdict,
    find_carried,
    find_what_to_do,
)
from llmtune.reporting.verdict.sentences import (
    change_formatter,
    format_at_strength,
    format_below_majority,
    format_bounds,
    format_clean,
    format_doubt,
    format_lost_answers,
    format_merging,
    format_rivals,
    format_unshown,
    format_what_would_decide,
)

Rule = Callable[[Evidence], Verdict | None]


def leaked_items(evidence: Evidence) -> Verdict | None:
    """CONTAMINATED: too many items of a target suite are in the training rows, or nearly so."""
    found = evidence.leaked()
    if not found:
        return None
    bound = evidence.thresholds.contaminated_share
    reasons, numbers = [], {}
    for suite, leaked in found:
        reasons.append(
            f"{suite.name}: {format_count(len(leaked.item_ids))} of {format_count(leaked.n)} items "
            f"are in the training rows ({FRACTION.score(leaked.share)}, more than "
            f"{FRACTION.score(bound)}): {leaked.ways}."
        )
        reasons += filter(None, [format_clean(suite)])
        numbers[suite.name] = {**leaked.numbers, "n": leaked.n, "bound": bound}
    reasons.append("Remove these items from the suite or from the training rows, and run again.")
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


def merge_differently(evidence: Evidence) -> Verdict | None:
    """MERGE-DIFFERENTLY: merging lost what training brought, or general ability, clear of 0."""
    lost = evidence.merged_worse()
    if not lost:
        return None
    reasons = [format_merging(suite, evidence.confidence) for suite in lost]
    numbers = {suite.name: asdict(suite.chain["merging"]) for suite in lost}
    return Verdict(MERGE_DIFFERENTLY, (*reasons, _way_to_merge(evidence)), numbers)


def _way_to_merge(evidence: Evidence) -> str:
    """Return what to merge into instead of the base that it was merged into."""
    merge_base = evidence.merge_base
    if merge_base is None and evidence.is_judged:
        return "Merge it here instead (without --merged), or ship base and adapter as they are."
    if merge_base is None:
        return "Check the merge (llmtune verify RUN), or ship base and adapter without merging."
    other = "dequantized" if merge_base == "original" else "original"
    why = {
        "dequantized": "the adapter was trained on the weights as the quantized model computes "
        "with them",
        "original": "what quantization changed in the weights was merged along",
    }[other]
    command, then = ("merge", ", then: llmtune eval RUN")
    if evidence.is_judged:
        command, then = "judge", ""
    return (
        f"Merge it differently: llmtune {command} RUN merge.base={other} ({why}; now it is "
        f"merge.base={merge_base}){then}"
    )


def negative(evidence: Evidence) -> Verdict | None:
    """NEGATIVE: on a target suite the tuned model is worse, its interval clear of 0.

    Also if it gives more whole answers that are right, and clearly fewer that hold the right one.
    """
    hurt = evidence.hurt_targets()
    if not hurt:
        return None
    format_suite = change_formatter(evidence)
    reasons = [*map(format_suite, hurt), *map(format_suite, evidence.broken())]
    if evidence.worse("target"):
        reasons.append("The tuning hurt the task it was trained on: check labels and format first.")
    reasons += [format_lost_answers(s, evidence.confidence) for s in evidence.lost_answers()]
    return Verdict("NEGATIVE", tuple(reasons), _suite_numbers(hurt))


def beyond_rescue(evidence: Evidence) -> Verdict | None:
    """BROKE-GENERAL if no smaller strength fixes it."""
    return None if ship_at_strength(evidence) else broke_general(evidence)


def use_prompt(evidence: Evidence) -> Verdict | None:
    """USE-PROMPT: few-shot or a custom prompt beats the bare base and is as good as tuning."""
    arms = evidence.prompts()
    as_good = [name for name in arms if evidence.is_as_good(name, among=arms)]
    if not as_good:
        return None
    reasons = list(format_rivals(evidence, as_good))
    reasons.append("A prompt needs no training, no merging and no weights to keep: use it.")
    return Verdict("USE-PROMPT", tuple(reasons), _rival_numbers(evidence, as_good))


def use_alternative(evidence: Evidence) -> Verdict | None:
    """USE-PROBE: what needs no adapter, a probe, beats the bare base and is as good as tuning."""
    measured = [arm for arm in ALTERNATIVES if any(arm in s.rivals for s in evidence.suites)]
    for arm in measured:
        if evidence.is_as_good(arm, among=measured):
            alternative = ALTERNATIVES[arm]
            reasons = (*format_rivals(evidence, [arm]), alternative.reason)
            return Verdict(alternative.verdict, reasons, _rival_numbers(evidence, [arm]))
    return None


def ship_at_strength(evidence: Evidence) -> Verdict | None:
    """SHIP at strength x: the full adapter forgets too much, and a smaller strength does not.

    The strength was chosen on the selection half of the items; every number here is from the other
    half. It holds if there a target gains clear of 0 and above the majority, none loses or falls
    behind full strength by more than the margin, and every general suite is shown to be within its
    bound.
    """
    choice = evidence.strengths.choice if evidence.strengths else None
    if choice is None:
        return None
    costly = [
        suite
        for suite in evidence.worse("general")
        if suite.ability in evidence.keep
        and evidence.used_bound(suite, suite.change) > evidence.thresholds.strength_share
    ]
    if not costly or any(suite.name not in choice.held for suite in costly):
        return None
    weakened = f"strength-{choice.strength:g}"
    if any(suite.has_collapsed(evidence.thresholds, weakened) for suite in evidence.broken()):
        return None
    targets = [suite for suite in evidence.with_role("target") if suite.name in choice.held]
    better = evidence.clear(targets, lambda suite: choice.held[suite.name], sign=1)
    worse = evidence.clear(targets, lambda suite: choice.held[suite.name], sign=-1)
    generals = [suite for suite in evidence.with_role("general") if suite.name in choice.held]
    are_within = all(evidence.is_within(suite, choice.held[suite.name]) for suite in generals)
    above = [
        suite
        for suite in better
        if is_above_majority(suite)
        and (suite.majority is None or choice.held_scores[suite.name][1] > suite.majority)
    ]
    if worse or not are_within or not above or not choice.keeps_target:
        return None
    if evidence.lost_answers():
        return None
    reasons = [
        format_at_strength(suite, choice, evidence.confidence) for suite in targets + generals
    ]
    reasons.append(
        f"At full strength, general ability lost more than necessary (bound "
        f"{format_bounds(evidence, tuple(costly))}). The strength was chosen on "
        f"{format_count(choice.num_selection)} other items: the smallest that keeps the target "
        f"within the margin of full strength and general ability within its bound."
    )
    place = " --out MERGED" if evidence.is_judged else ""
    reasons.append(f"Merge it with: llmtune merge RUN{place} --strength {choice.strength:g}")
    name = f"{AT_STRENGTH} {choice.strength:g}"
    numbers: Numbers = {
        "strength": choice.strength,
        **{suite.name: asdict(choice.held[suite.name]) for suite in targets + generals},
    }
    return Verdict(name, tuple(reasons), numbers)


def broke_general(evidence: Evidence) -> Verdict | None:
    """BROKE-GENERAL: a general suite lost more than the bound, its interval clear of 0."""
    broken = evidence.broken()
    if not broken:
        return None
    format_suite = change_formatter(evidence)
    reasons = [format_suite(suite) for suite in (*evidence.with_role("target"), *broken)]
    reasons.append(f"General ability may lose {format_bounds(evidence, broken)}, and lost more.")
    return Verdict("BROKE-GENERAL", tuple(reasons), _suite_numbers(broken))


def ship(evidence: Evidence) -> Verdict | None:
    """SHIP: a target gain clear of 0 and above the majority class, and general ability intact.

    If a general suite is not shown to be within its bound, or there is none, the name says so.
    """
    if not _is_gain(evidence) or evidence.broken() or evidence.doubtful():
        return None
    better, generals = evidence.better("target"), evidence.with_role("general")
    unshown = evidence.unshown()
    format_suite = change_formatter(evidence)
    reasons = [format_suite(suite) for suite in evidence.with_role("target")]
    reasons += [format_suite(suite) for suite in generals]
    kept = [suite for suite in generals if suite.ability in evidence.keep]
    shown = tuple(suite for suite in kept if suite not in unshown)
    if shown:
        reasons.append(
            f"General ability is within its bound of {format_bounds(evidence, shown)} on "
            f"{', '.join(suite.name for suite in shown)}: the whole interval is."
        )
    reasons += [f"{format_unshown(suite, evidence)}." for suite in unshown]
    name = "SHIP" if kept and not unshown else UNSHOWN
    return Verdict(name, tuple(reasons), _suite_numbers((*better, *generals)))


def more_data(evidence: Evidence) -> Verdict | None:
    """MORE-DATA: no gain is shown, and the learning curve says twice the rows lower the loss."""
    undecided = inconclusive(evidence)
    if undecided is None:
        return None
    for name, found in evidence.diagnostics.more_rows.items():
        low, high = found.interval
        if low > 0:
            reason = (
                f"{found.suite}: with twice the rows ({format_count(found.rows)}) the "
                f"{found.loss_name} would fall by {NATS.bare_size(found.gain)} (interval "
                f"{NATS.bare_size(low)} to {NATS.bare_size(high)}), from "
                f"{NATS.score(found.loss_now)} to {NATS.score(found.loss_then)}."
            )
            said = {"gain_at_2n": found.gain, "interval": [low, high], "rows": found.rows}
            numbers = {**undecided.numbers, name: said}
            return Verdict("MORE-DATA", (*undecided.reasons, reason), numbers)
    return None


def inconclusive(evidence: Evidence) -> Verdict | None:
    """INCONCLUSIVE: the items show neither a gain with general ability intact, nor harm."""
    targets, doubtful = evidence.with_role("target"), evidence.doubtful()
    if not targets or evidence.hurt_targets():
        return None
    if _is_gain(evidence) and not doubtful:
        return None
    better = evidence.better("target")
    format_suite = change_formatter(evidence)
    reasons: list[str] = []
    for suite in targets:
        reasons.append(format_suite(suite))
        if suite not in better:
            reasons.append(format_what_would_decide(suite))
        elif not is_above_majority(suite):
            reasons.append(format_below_majority(suite))
    for suite in doubtful:
        reasons += [format_suite(suite), format_doubt(suite, evidence)]
    return Verdict(
        "INCONCLUSIVE", tuple(filter(None, reasons)), _suite_numbers((*targets, *doubtful))
    )


def _is_gain(evidence: Evidence) -> bool:
    """Return whether a target gained, every gain is above the majority, and none was lost."""
    better = evidence.better("target")
    return (
        bool(better)
        and not evidence.hurt_targets()
        and all(is_above_majority(suite) for suite in better)
    )


RULES: tuple[Rule, ...] = (
    leaked_items,
    not_measured,
    merge_differently,
    negative,
    beyond_rescue,
    use_prompt,
    use_alternative,
    ship_at_strength,
    broke_general,
    ship,
    more_data,
    inconclusive,
)


def decide(evidence: Evidence) -> Verdict:
    """Return the verdict of the first rule that holds; `also` names later ones that hold too."""
    fired = [verdict for rule in RULES if (verdict := rule(evidence)) is not None]
    names = list(dict.fromkeys(verdict.name for verdict in fired))
    first = fired[0]
    gone = tuple(dict.fromkeys(ABILITY_WORDS[s.ability] for s in evidence.given_up()))
    first = replace(first, also=tuple(names[1:]), given_up=gone)
    return replace(
        first,
        carries=tuple(find_carried(first, evidence)),
        to_do=find_what_to_do(first, evidence),
    )


def _suite_numbers(suites: tuple[SuiteReport, ...]) -> Numbers:
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


def _rival_numbers(evidence: Evidence, arms: Iterable[str]) -> Numbers:
    return {
        suite.name: {arm: asdict(suite.rivals[arm]) for arm in arms if arm in suite.rivals}
        for suite in evidence.with_role("target")
    }
