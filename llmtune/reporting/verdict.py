"""The verdict: rules from the measured numbers to one word and the sentences that justify it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmtune.evaluation.stats import holm
from llmtune.reporting.numbers import FRACTION, Unit, write_count
from llmtune.reporting.suites import SuiteReport


@dataclass(frozen=True)
class Thresholds:
    """What counts as broken; a general change beyond its bound with an interval clear of 0 does.

    `general_drop` is a fraction of 1, `general_loss_rise` in nats/token, `general_bits_rise` in
    bits/byte (0.2 nats/token at about four bytes a token).
    """

    general_drop: float = 0.05
    general_loss_rise: float = 0.2
    general_bits_rise: float = 0.07

    def general_bound(self, unit: Unit) -> float:
        """Return the largest tolerated worsening of a general suite, in its raw unit."""
        bounds = {"nats/token": self.general_loss_rise, "bits/byte": self.general_bits_rise}
        return bounds.get(unit.name, self.general_drop)


@dataclass(frozen=True)
class Evidence:
    """The numbers a rule may look at; a further arm (few-shot, probe, strength) is a field here."""

    suites: tuple[SuiteReport, ...]
    thresholds: Thresholds = field(default_factory=Thresholds)
    confidence: float = 0.95

    def with_role(self, role: str) -> tuple[SuiteReport, ...]:
        """Return the suites of a role on which base and tuned were compared."""
        return tuple(s for s in self.suites if s.role == role and s.change is not None)

    @property
    def significance(self) -> float:
        """Return the level that Holm-adjusted p-values are held against."""
        return 1 - self.confidence

    def better(self, role: str) -> tuple[SuiteReport, ...]:
        """Return the role's suites with a gain clear of 0, Holm-adjusted over the role."""
        return self._clear(role, sign=1)

    def worse(self, role: str) -> tuple[SuiteReport, ...]:
        """Return the role's suites with a loss clear of 0, Holm-adjusted over the role."""
        return self._clear(role, sign=-1)

    def broken(self) -> tuple[SuiteReport, ...]:
        """Return the general suites that lost more than their bound, clear of 0."""
        worse = self.worse("general")
        return tuple(s for s in worse if -gain_of(s)[0] > self.thresholds.general_bound(s.unit))

    def _clear(self, role: str, *, sign: int) -> tuple[SuiteReport, ...]:
        suites = self.with_role(role)
        adjusted = holm([s.change.p_value for s in suites if s.change])
        found = []
        for suite, p_value in zip(suites, adjusted, strict=True):
            _, low, high = gain_of(suite)
            is_clear = low > 0 if sign > 0 else high < 0
            if is_clear and p_value <= self.significance:
                found.append(suite)
        return tuple(found)


@dataclass(frozen=True)
class Verdict:
    """The outcome: a name, the sentences made from the numbers, and the numbers themselves."""

    name: str
    reasons: tuple[str, ...]
    numbers: dict[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return what decided, as report.json holds it beside the name."""
        return {
            "reasons": list(self.reasons),
            "numbers": self.numbers,
            "also": list(self.also),
        }


MEANINGS = {
    "SHIP": "A gain on the target that is clear of chance, and general ability within its bound.",
    "NEGATIVE": "The tuned model is worse at the very task it was tuned for, clear of chance.",
    "BROKE-GENERAL": "General ability fell beyond its bound, clear of chance.",
    "INCONCLUSIVE": "These items show neither a gain nor a loss on the target.",
    "NOT-MEASURED": "There is no comparison of base and tuned model on a target suite to judge by.",
}
"""What each verdict says, in one sentence; docs/report.md says what to do about it."""

Rule = Callable[[Evidence], Verdict | None]


def decide(evidence: Evidence) -> Verdict:
    """Return the first rule's verdict that holds; `also` names the later ones that hold too."""
    fired = [verdict for rule in RULES if (verdict := rule(evidence)) is not None]
    first = fired[0]
    return Verdict(first.name, first.reasons, first.numbers, tuple(v.name for v in fired[1:]))


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
    reasons = [*map(_describer(evidence), worse), *map(_describer(evidence), evidence.broken())]
    reasons.append(
        "The tuning hurt the very task it was trained on: check labels and format first."
    )
    return Verdict("NEGATIVE", tuple(reasons), _numbers(worse))


def broke_general(evidence: Evidence) -> Verdict | None:
    """BROKE-GENERAL: a general suite lost more than the bound, its interval clear of 0."""
    broken = evidence.broken()
    if not broken:
        return None
    describe = _describer(evidence)
    reasons = [describe(suite) for suite in (*evidence.with_role("target"), *broken)]
    reasons.append(f"General ability may lose {_bounds(evidence, broken)}, and lost more.")
    return Verdict("BROKE-GENERAL", tuple(reasons), _numbers(broken))


def ship(evidence: Evidence) -> Verdict | None:
    """SHIP: a target gain clear of 0 and above the majority class, and general not broken."""
    better = evidence.better("target")
    if evidence.worse("target") or evidence.broken() or not better:
        return None
    if any(not is_above_majority(suite) for suite in better):
        return None
    describe = _describer(evidence)
    reasons = [describe(suite) for suite in evidence.with_role("target")]
    generals = evidence.with_role("general")
    reasons += [describe(suite) for suite in generals]
    if generals:
        reasons.append(f"No general suite is shown to have lost {_bounds(evidence, generals)}.")
    return Verdict("SHIP", tuple(reasons), _numbers((*better, *generals)))


def inconclusive(evidence: Evidence) -> Verdict | None:
    """INCONCLUSIVE: neither a gain nor a loss on the target is shown by these items."""
    targets = evidence.with_role("target")
    better = evidence.better("target")
    if not targets or evidence.worse("target"):
        return None
    if better and all(is_above_majority(suite) for suite in better):
        return None
    describe = _describer(evidence)
    reasons: list[str] = []
    for suite in targets:
        reasons.append(describe(suite))
        reasons.append(_below_majority(suite) if suite in better else _what_would_decide(suite))
    return Verdict("INCONCLUSIVE", tuple(filter(None, reasons)), _numbers(targets))


RULES: tuple[Rule, ...] = (not_measured, negative, broke_general, ship, inconclusive)


def gain_of(suite: SuiteReport) -> tuple[float, float, float]:
    """Return the change from base to tuned and its interval, turned so that positive is better."""
    assert suite.change is not None, "only compared suites are asked for their gain"
    return suite.gain(suite.change)


def is_above_majority(suite: SuiteReport) -> bool:
    """Return whether the tuned model beats always giving the most frequent right answer."""
    tuned = suite.score("tuned")
    return suite.majority is None or tuned is None or tuned > suite.majority


def describe_change(suite: SuiteReport, confidence: float) -> str:
    """Write one suite's change as a sentence made from its numbers."""
    assert suite.change is not None, "only compared suites are described"
    unit, change = suite.unit, suite.change
    gain, low, high = gain_of(suite)
    word = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
    base, tuned = suite.arms["base"].mean, suite.arms["tuned"].mean
    factor = f", perplexity ×{math.exp(change.difference):.2f}" if unit.name == "nats/token" else ""
    return (
        f"{suite.name}: {unit.score(base)} → {unit.score(tuned)}, a change of "
        f"{unit.difference(change.difference)} ({confidence * 100:g} % interval "
        f"{unit.interval(change.low, change.high)}, n = {suite.n}{factor}): {word}."
    )


def _describer(evidence: Evidence) -> Callable[[SuiteReport], str]:
    return lambda suite: describe_change(suite, evidence.confidence)


def _bounds(evidence: Evidence, suites: tuple[SuiteReport, ...]) -> str:
    units = dict.fromkeys(suite.unit for suite in suites)
    return " or ".join(unit.bound(evidence.thresholds.general_bound(unit)) for unit in units)


def _what_would_decide(suite: SuiteReport) -> str:
    assert suite.change is not None
    mde = f" {suite.n} items can show {suite.unit.size(suite.mde)} or more." if suite.mde else ""
    _, low, high = gain_of(suite)
    if low > 0 or high < 0:
        return f"On {suite.name} this is not clear of chance after Holm's correction over suites."
    if suite.gained == 0 and suite.lost == 0 and suite.change.difference == 0:
        return f"No item of {suite.name} changed its score."
    if suite.needed_items is None:
        return f"The two are equal on {suite.name}, so no number of items would decide.{mde}"
    size = suite.unit.size(suite.change.difference)
    return (
        f"About {write_count(suite.needed_items)} items would decide a difference of "
        f"{size} on {suite.name}.{mde}"
    )


def _below_majority(suite: SuiteReport) -> str:
    return (
        f"The gain on {suite.name} is real, but always giving its most frequent answer scores "
        f"{FRACTION.score(suite.majority)}, and the tuned model is not above that."
    )


def _numbers(suites: tuple[SuiteReport, ...]) -> dict[str, Any]:
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
