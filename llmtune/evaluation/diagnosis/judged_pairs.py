"""Pairs of answers that a judge compared: its settings, its verdicts, and what they come to."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from llmtune.evaluation.diagnosis.base import Diagnostic
from llmtune.evaluation.endpoint import EndpointConfig

Choice = Literal["before", "after", "tie"]
"""Which answer was preferred: that of the model before, of what ships, or neither."""
WHERE = "evaluate.pairwise"
POINTS: dict[Choice, float] = {"before": 0.0, "tie": 0.5, "after": 1.0}


class PairwiseConfig(EndpointConfig):
    """A judge behind an OpenAI-compatible endpoint, asked which of two answers is better."""

    suites: tuple[str, ...] | None = None
    """Suites whose answers are judged; null takes all that have written answers."""
    limit: int = Field(default=100, ge=1)
    """Items of a suite at most; each costs two requests."""
    criterion: str = "Which answer is more correct, and more helpful to the person who asked?"
    """What makes an answer the better one."""


@dataclass(frozen=True)
class JudgedPair:
    """One item: what the judge preferred when the answer from before came first, and second.

    None where the reply was not a verdict. `same` answers are a tie that nobody was asked about.
    """

    id: str
    before_first: Choice | None
    after_first: Choice | None
    same: bool = False

    @property
    def points(self) -> float | None:
        """What ships scores 1 if it is preferred, 1/2 if neither is; the mean of both orders."""
        if self.before_first is None or self.after_first is None:
            return None
        return (POINTS[self.before_first] + POINTS[self.after_first]) / 2


@dataclass(frozen=True)
class JudgedSuite:
    """The pairs of one suite and the win rate of what ships, with its interval.

    `worst` is the win rate if every pair without a verdict had been lost.
    """

    name: str
    compared: tuple[str, str]
    pairs: tuple[JudgedPair, ...]
    win_rate: float | None
    low: float | None
    high: float | None
    p_value: float | None
    is_enough: bool
    worst: float

    @property
    def asked(self) -> tuple[JudgedPair, ...]:
        """The pairs that the judge gave a verdict on in both orders."""
        return tuple(pair for pair in self.pairs if not pair.same and pair.points is not None)

    @property
    def num_unread(self) -> int:
        """How many pairs have a reply that was not a verdict."""
        return sum(pair.points is None for pair in self.pairs)

    @property
    def agreement(self) -> float | None:
        """The share of pairs on which the judge said the same in both orders."""
        same = [pair.before_first == pair.after_first for pair in self.asked]
        return sum(same) / len(same) if same else None

    @property
    def first_share(self) -> float | None:
        """How often the answer that was shown first was preferred, where one was."""
        firsts = [
            choice == first
            for pair in self.asked
            for choice, first in ((pair.before_first, "before"), (pair.after_first, "after"))
            if choice != "tie"
        ]
        return sum(firsts) / len(firsts) if firsts else None

    def count(self, low: float, high: float) -> int:
        """Return how many pairs have so many points."""
        return sum(p.points is not None and low <= p.points <= high for p in self.pairs)


@dataclass(frozen=True, kw_only=True)
class PairwiseResult(Diagnostic):
    """What a judge preferred, and what its verdicts took."""

    FILE_NAME: ClassVar[str] = "pairwise.json"
    model: str
    endpoint: str
    criterion: str
    suites: tuple[JudgedSuite, ...]
    requests: int
    input_tokens: float | None
    output_tokens: float | None
    price: float | None
    """Of all the requests together, kept ones included."""
    confidence: float
