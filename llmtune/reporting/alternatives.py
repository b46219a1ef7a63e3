"""The rules that look at another way to the same end: a prompt, a probe, a strength, more rows."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from llmtune.evaluation.compare import arm_kind
from llmtune.reporting.arms import FEW_SHOT, PROMPTING, split_name
from llmtune.reporting.evidence import Evidence
from llmtune.reporting.numbers import NATS, format_count
from llmtune.reporting.outcome import AT_STRENGTH, Verdict
from llmtune.reporting.rules import inconclusive
from llmtune.reporting.sentences import (
    change_formatter,
    format_bounds,
    format_difference,
    format_rival,
    word_for,
)
from llmtune.reporting.strengths import StrengthChoice
from llmtune.reporting.suites import Change, Rival, SuiteReport


def use_prompt(evidence: Evidence) -> Verdict | None:
    """USE-PROMPT: few-shot or an own prompt beats the bare base, and is not beaten by tuning."""
    arms = [
        name
        for name in _arm_names(evidence)
        if arm_kind(name) in PROMPTING and not _is_single_draw(name)
    ]
    as_good = [name for name in arms if _is_as_good(evidence, name, among=arms)]
    if not as_good:
        return None
    reasons = list(_format(evidence, as_good))
    reasons.append("A prompt needs no training, no merging and no weights to keep: use it.")
    return Verdict("USE-PROMPT", tuple(reasons), _numbers(evidence, as_good))


def use_probe(evidence: Evidence) -> Verdict | None:
    """USE-PROBE: a linear probe beats the bare base, and is not beaten by tuning."""
    if not _is_as_good(evidence, "probe", among=["probe"]):
        return None
    reasons = list(_format(evidence, ["probe"]))
    reasons.append(
        "A probe leaves the base as it is, so nothing else can break, and it costs one forward "
        "pass: use it."
    )
    return Verdict("USE-PROBE", tuple(reasons), _numbers(evidence, ["probe"]))


def ship_at_strength(evidence: Evidence) -> Verdict | None:
    """SHIP at strength x: the full adapter forgets too much, and a smaller strength does not.

    The strength was chosen on the selection half of the items; every number here is of the other
    half. It holds where a target gains clear of 0 and above the majority there, none loses, and
    every general suite that the full strength broke was measured and is not broken.
    """
    choice = evidence.strengths.choice if evidence.strengths else None
    if choice is None:
        return None
    costly = [
        suite
        for suite in evidence.worse("general")
        if evidence.used_bound(suite, suite.change) > evidence.thresholds.strength_share
    ]
    if not costly or any(suite.name not in choice.held for suite in costly):
        return None
    targets = [suite for suite in evidence.with_role("target") if suite.name in choice.held]
    better = evidence.clear(targets, lambda suite: choice.held[suite.name], sign=1)
    worse = evidence.clear(targets, lambda suite: choice.held[suite.name], sign=-1)
    generals = [suite for suite in evidence.with_role("general") if suite.name in choice.held]
    lost = evidence.clear(generals, lambda suite: choice.held[suite.name], sign=-1)
    is_broken = any(evidence.used_bound(suite, choice.held[suite.name]) > 1 for suite in lost)
    above = [s for s in better if s.majority is None or choice.held_scores[s.name][1] > s.majority]
    if worse or is_broken or not above:
        return None
    reasons = [_format_held(suite, choice, evidence.confidence) for suite in targets + generals]
    reasons.append(
        f"At full strength general ability lost more than it needs to (bound "
        f"{format_bounds(evidence, tuple(costly))}). The strength was chosen on "
        f"{format_count(choice.num_selection)} other items: the smallest that keeps the target "
        f"within one standard error and general ability within its bound."
    )
    reasons.append(f"Merge it with: llmtune merge RUN --strength {choice.strength:g}")
    name = f"{AT_STRENGTH} {choice.strength:g}"
    numbers = {"strength": choice.strength} | {
        suite.name: asdict(choice.held[suite.name]) for suite in targets + generals
    }
    return Verdict(name, tuple(reasons), numbers)


def more_data(evidence: Evidence) -> Verdict | None:
    """MORE-DATA: no gain is shown, and the learning curve says twice the rows lower the loss."""
    curve = evidence.learning_curve
    undecided = inconclusive(evidence)
    if undecided is None or curve is None or curve.fit is None or curve.refused:
        return None
    low, high = curve.fit.gain_interval
    if low <= 0:
        return None
    law = curve.fit
    reasons = (
        *undecided.reasons,
        f"{curve.suite}: with twice the rows ({format_count(law.at_2n.rows)}) the "
        f"{curve.loss_name} would fall by {NATS.bare_size(law.gain_at_2n)} (interval "
        f"{NATS.bare_size(low)} to {NATS.bare_size(high)}), from {NATS.score(law.at_n.loss)} to "
        f"{NATS.score(law.at_2n.loss)}.",
    )
    numbers = {"gain_at_2n": law.gain_at_2n, "interval": [low, high], "rows": law.at_2n.rows}
    return Verdict("MORE-DATA", reasons, undecided.numbers | {"learning_curve": numbers})


def _arm_names(evidence: Evidence) -> list[str]:
    targets = evidence.with_role("target")
    return list(dict.fromkeys(name for suite in targets for name in suite.rivals))


def _is_single_draw(name: str) -> bool:
    taken_apart = split_name(name)
    return taken_apart.kind == FEW_SHOT and bool(taken_apart.rest)


def _is_as_good(evidence: Evidence, arm: str, *, among: list[str]) -> bool:
    """Return whether tuning nowhere beats this arm, and the arm somewhere beats the bare base.

    Both are Holm-adjusted over the suites, and beating the base counts with its p-value times the
    number of arms in `among`, so that the best of many prompts is not believed for being the best.
    """
    targets = evidence.with_role("target")
    measured = [suite for suite in targets if _change(suite, arm, "tuned_over") is not None]
    if not measured:
        return False
    if evidence.clear(measured, lambda suite: _change(suite, arm, "tuned_over"), sign=1):
        return False
    tried = max(len(among), 1)
    beaten = evidence.clear(measured, lambda suite: _change(suite, arm, "over_base"), sign=1)
    return any(_p(suite, arm) * tried <= evidence.significance for suite in beaten)


def _change(suite: SuiteReport, arm: str, which: str) -> Change | None:
    rival: Rival | None = suite.rivals.get(arm)
    return getattr(rival, which) if rival else None


def _p(suite: SuiteReport, arm: str) -> float:
    change = _change(suite, arm, "over_base")
    return change.p_value if change else 1.0


def _format(evidence: Evidence, arms: Iterable[str]) -> Iterable[str]:
    for arm in arms:
        for suite in evidence.with_role("target"):
            over_base = _change(suite, arm, "over_base")
            if over_base is None:
                continue
            yield format_rival(suite, arm, evidence.confidence)
            over = format_difference(suite, over_base, evidence.confidence)
            yield f"Over the bare base that is {over}): {word_for(suite, over_base)}."
    yield from map(change_formatter(evidence), evidence.broken())


def _format_held(suite: SuiteReport, choice: StrengthChoice, confidence: float) -> str:
    base, here, full = choice.held_scores[suite.name]
    change, unit = choice.held[suite.name], suite.unit
    return (
        f"{suite.name}, on the half that did not choose: {unit.score(base)} → {unit.score(here)} "
        f"at strength {choice.strength:g}, {format_difference(suite, change, confidence)}): "
        f"{word_for(suite, change)}; {unit.score(full)} at full strength."
    )


def _numbers(evidence: Evidence, arms: Iterable[str]) -> dict[str, Any]:
    return {
        suite.name: {arm: asdict(suite.rivals[arm]) for arm in arms if arm in suite.rivals}
        for suite in evidence.with_role("target")
    }
