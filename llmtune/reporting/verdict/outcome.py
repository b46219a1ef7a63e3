"""The verdict as a value: a name, sentences made from the numbers, and the numbers themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

AT_STRENGTH = "SHIP at strength"
MERGE_DIFFERENTLY = "MERGE-DIFFERENTLY"


Numbers = Mapping[str, object]
"""What decided, by suite or by name, as report.json holds it."""


class VerdictJson(TypedDict):
    """What decided, as report.json holds it next to the verdict's name."""

    reasons: list[str]
    numbers: Numbers
    also: list[str]


@dataclass(frozen=True)
class Verdict:
    """The outcome: a name, the sentences made from the numbers, and the numbers themselves.

    `also` names the verdicts of later rules that hold too.
    """

    name: str
    reasons: tuple[str, ...]
    numbers: Numbers = field(default_factory=dict)
    also: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The verdict's name without its number, as `MEANINGS` and the documentation list it."""
        return f"{AT_STRENGTH} x" if self.name.startswith(AT_STRENGTH) else self.name

    @property
    def meaning(self) -> str:
        """What this verdict says, in one sentence."""
        return MEANINGS[self.kind]

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
        }


MEANINGS = {
    "CONTAMINATED": "Items of the target suite are among the training rows, so its scores prove "
    "nothing.",
    "SHIP": "A gain on the target that is clear of chance, and general ability within its bound.",
    f"{AT_STRENGTH} x": "At a smaller strength of the adapter the gain stays, and general ability "
    "is within its bound.",
    MERGE_DIFFERENTLY: "The merged model is clearly worse than base + adapter: what was tuned "
    "is not what would ship.",
    "NEGATIVE": "The tuned model is worse at the task it was tuned for, clear of chance.",
    "BROKE-GENERAL": "General ability fell beyond its bound, clear of chance.",
    "USE-PROMPT": "Prompting the base model does as well: the tuned model is not shown to be "
    "better.",
    "USE-PROBE": "A linear probe on the frozen base does as well: the tuned model is not shown to "
    "be better.",
    "MORE-DATA": "No gain is shown yet, but the learning curve predicts that more rows would lower "
    "the loss.",
    "INCONCLUSIVE": "These items show neither a gain nor a loss on the target.",
    "NOT-MEASURED": "Base and tuned model were not compared on a target suite.",
}
"""What each verdict says, in one sentence; docs/report.md says what to do about it."""

TONES = {
    "SHIP": "good",
    f"{AT_STRENGTH} x": "good",
    MERGE_DIFFERENTLY: "bad",
    "NEGATIVE": "bad",
    "BROKE-GENERAL": "bad",
    "CONTAMINATED": "bad",
}
