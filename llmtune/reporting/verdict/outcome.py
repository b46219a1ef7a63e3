"""The verdict as a value: a name, sentences made from the numbers, and the numbers themselves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from llmtune.evaluation.diagnosis.config import ALTERNATIVES
from llmtune.reporting.beside import find_disagreements, has_fewer_answers, is_format_only
from llmtune.reporting.verdict.evidence import Evidence, gain_of
from llmtune.reporting.verdict.sentences import format_unshown

AT_STRENGTH = "SHIP at strength"
MERGE_DIFFERENTLY = "MERGE-DIFFERENTLY"
UNSHOWN = "SHIP, general not shown"
SHIPPING = ("SHIP", UNSHOWN, f"{AT_STRENGTH} x")
Numbers = Mapping[str, object]
"""What decided, by suite or by name, as report.json holds it."""
USUAL_CONFIDENCE = 0.95
ABILITY_WORDS = {"knowledge": "general knowledge", "text": "reading of text", "chat": "open chat"}
MEANINGS = {
    "CONTAMINATED": "Items of the target suite are among the training rows, so its scores prove "
    "nothing.",
    "SHIP": "A gain on the target that is clear of chance, and general ability shown to be within "
    "its bound.",
    UNSHOWN: "A gain on the target that is clear of chance. General ability is not shown to be "
    "within its bound, nor to be beyond it.",
    f"{AT_STRENGTH} x": "At a smaller strength of the adapter the gain stays, and general ability "
    "is within its bound.",
    MERGE_DIFFERENTLY: "The merged model is clearly worse than base + adapter: what was tuned "
    "is not what would ship.",
    "NEGATIVE": "The tuned model is worse at the task it was tuned for, clear of chance.",
    "BROKE-GENERAL": "General ability fell beyond its bound, clear of chance.",
    "USE-PROMPT": "Prompting the base model is as good as the tuned model, within the stated "
    "margin.",
    **{each.verdict: each.meaning for each in ALTERNATIVES.values()},
    "MORE-DATA": "No gain is shown yet, but the learning curve predicts that more rows would lower "
    "the loss.",
    "INCONCLUSIVE": "These items do not decide: neither a gain on the target with general ability "
    "intact, nor harm, is shown.",
    "NOT-MEASURED": "Base and tuned model were not compared on a target suite.",
}
"""What each verdict says, in one sentence; docs/report.md says what to do about it."""
TO_DO = {
    MERGE_DIFFERENTLY: "Merge it differently, as the last reason says, and evaluate again.",
    "CONTAMINATED": "Take these items out of the suite or out of the training rows, and run again.",
    "SHIP": "Look at the examples, then ship the merged model.",
    UNSHOWN: "Before shipping, measure general ability with more items (a suite with "
    "`role: general`).",
    f"{AT_STRENGTH} x": "Merge the adapter at this strength and ship that.",
    "NEGATIVE": "Check the labels and the format of the training rows first.",
    "BROKE-GENERAL": "Lower the learning rate or the steps, protect the base while training "
    "(`protect`), or mix general text into the training data.",
    "USE-PROMPT": "Use the prompt with the base as it is.",
    **{each.verdict: each.to_do for each in ALTERNATIVES.values()},
    "MORE-DATA": "Collect more rows before anything else.",
    "INCONCLUSIVE": "Write more evaluation items, or accept that the effect is smaller than these "
    "can show.",
    "NOT-MEASURED": "Add a suite with `role: target` and run `llmtune eval`.",
}
"""What to do now, by verdict."""
EXTRACT_INSTEAD = (
    "Take the answer out of the base's text instead (`extract` in the suite shows what that "
    "scores), or train with fewer steps or with `protect`, and evaluate again."
)
"""What to do if tuning taught the form of an answer and lost right ones."""
EXTRACT_FIRST = (
    "If what reads the answers can take them out of a text, first see what that scores without "
    "tuning (`extract` in the suite)."
)
"""What to do before shipping a gain of form."""
TONES = {
    "SHIP": "good",
    f"{AT_STRENGTH} x": "good",
    MERGE_DIFFERENTLY: "bad",
    "NEGATIVE": "bad",
    "BROKE-GENERAL": "bad",
    "CONTAMINATED": "bad",
}


class VerdictJson(TypedDict):
    """What decided, as report.json holds it next to the verdict's name."""

    reasons: list[str]
    numbers: Numbers
    also: list[str]
    headline: str
    carries: list[str]
    to_do: str


@dataclass(frozen=True)
class Verdict:
    """The outcome: a name, the sentences made from the numbers, and the numbers themselves.

    `also` names the verdicts of later rules that hold too. `carries` is what was not shown or not
    measured and could change the verdict, `to_do` what to do now.
    """

    name: str
    reasons: tuple[str, ...]
    numbers: Numbers = field(default_factory=dict)
    also: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()
    """What general ability is gone that nobody asked to keep, in words."""
    carries: tuple[str, ...] = ()
    to_do: str = ""

    @property
    def headline(self) -> str:
        """The name and what it carries, in one line."""
        return "; ".join((self.name, *self.carries))

    @property
    def kind(self) -> str:
        """The verdict's name without its number, as `MEANINGS` and the documentation list it."""
        return f"{AT_STRENGTH} x" if self.name.startswith(AT_STRENGTH) else self.name

    @property
    def meaning(self) -> str:
        """What this verdict says, in one sentence."""
        if not self.given_up:
            return MEANINGS[self.kind]
        gone = " and ".join(self.given_up)
        are = "are" if len(self.given_up) > 1 else "is"
        return f"{MEANINGS[self.kind]} For this task only: {gone} {are} gone."

    @property
    def tone(self) -> str:
        """`good`, `bad` or `open`: how it is colored."""
        return TONES.get(self.kind, "open")

    def as_json(self) -> VerdictJson:
        """Return what decided, as report.json holds it next to the name."""
        return {
            "reasons": list(self.reasons),
            "numbers": self.numbers,
            "also": list(self.also),
            "headline": self.headline,
            "carries": list(self.carries),
            "to_do": self.to_do,
        }


def find_carried(verdict: Verdict, evidence: Evidence) -> Iterator[str]:
    """Yield what was not shown or not measured and could change a verdict to ship."""
    if verdict.kind not in SHIPPING:
        return
    if not evidence.with_role("general"):
        yield "general ability not measured"
    elif missing := [ABILITY_WORDS[ability] for ability in evidence.unmeasured_abilities()]:
        yield f"{_join(missing)} not measured"
    if verdict.given_up:
        are = "are" if len(verdict.given_up) > 1 else "is"
        yield f"for this task only: {_join(verdict.given_up)} {are} gone"
    if evidence.confidence < USUAL_CONFIDENCE:
        yield f"at a confidence of {100 * evidence.confidence:g} % only"
    yield from _arms_left_out(evidence)
    yield from _lower_targets(evidence)
    if verdict.kind == UNSHOWN:
        for suite in evidence.unshown():
            yield f"general ability not shown: {format_unshown(suite, evidence)}"
    yield from _only_for_one_use(evidence)
    yield from evidence.diagnostics.unguarded()
    missing = _unmeasured(evidence)
    if missing:
        verb = "was" if len(missing) == 1 else "were"
        yield f"{' and '.join(missing)} {verb} not measured and could be as good"


def _arms_left_out(evidence: Evidence) -> Iterator[str]:
    """Yield the suites on which not the original, or not the merged model, was compared."""
    suites = [suite for suite in evidence.suites if suite.role in ("target", "general")]
    pairs = {suite.name: suite.compared for suite in suites if suite.compared is not None}
    quantized = [name for name, (before, _) in pairs.items() if before == "base"]
    if evidence.merge_base is not None and quantized:
        on = "" if len(quantized) == len(pairs) else f" on {_join(quantized)}"
        yield f"against the quantized base{on}: the original was not measured"
    unmerged = [name for name, (_, after) in pairs.items() if after == "tuned"]
    if 0 < len(unmerged) < len(pairs):
        yield f"the merged model was not measured on {_join(unmerged)}"


def _lower_targets(evidence: Evidence) -> Iterator[str]:
    """Yield the target suites that were measured lower, if not clear of chance."""
    for suite in evidence.with_role("target"):
        gain, low, high = gain_of(suite)
        if gain < 0 <= high:
            yield (
                f"{suite.name} was measured lower ({suite.unit.difference(gain)}, interval "
                f"{suite.unit.interval(low, high)}), which may be chance"
            )


def _join(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]


def _only_for_one_use(evidence: Evidence) -> Iterator[str]:
    """Yield the target suites on which the verdict holds for one use, or for the form alone."""
    for suite in evidence.with_role("target"):
        for found in find_disagreements(suite):
            if found.carried:
                yield found.carried


def find_what_to_do(verdict: Verdict, evidence: Evidence) -> str:
    """Return what to do now."""
    to_do = TO_DO[verdict.kind]
    # a suite that takes the answers out of the text itself has shown that score
    whole = [suite for suite in evidence.with_role("target") if suite.lenient is not None]
    if verdict.kind in SHIPPING and any(is_format_only(s) or has_fewer_answers(s) for s in whole):
        to_do = f"{EXTRACT_FIRST} {to_do}"
    if verdict.kind in SHIPPING and _unmeasured(evidence):
        command = "judge RUN evaluate.extent=full" if evidence.is_judged else "report RUN --full"
        return (
            f"{to_do} To know whether less would do, measure "
            f"{' and '.join(_unmeasured(evidence))}: llmtune {command}"
        )
    if verdict.kind == "NEGATIVE" and not evidence.worse("target"):
        return EXTRACT_INSTEAD
    return to_do


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
