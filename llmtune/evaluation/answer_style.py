"""What written answers are like, whatever they say: their length, variety and ends (light)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmtune.evaluation.results import ItemScore

SHORT_WORDS = 1
"""An answer of so few words, or of none, is hardly one."""


@dataclass(frozen=True)
class AnswerStyle:
    """What an arm's own answers are like, beside the base's; shares but for the first two."""

    answer_words: float
    length_ratio: float
    """Their words divided by the base's."""
    short_answers: float
    distinct_words: float | None = None
    ended_answers: float | None = None
    """None in results of older versions, as the one above."""

    WORDS: ClassVar[Mapping[str, str]] = {
        "answer_words": "words an answer",
        "length_ratio": "length against the original",
        "short_answers": "empty or one word",
        "distinct_words": "distinct words",
        "ended_answers": "ended by itself",
    }

    @classmethod
    def measure(cls, scores: Sequence[ItemScore]) -> "AnswerStyle":
        """Return it from the items' predictions; their right answers are the base's."""
        words = [(item.prediction or "").split() for item in scores]
        base = [(item.answer or "").split() for item in scores]
        all_words = [word.casefold() for answer in words for word in answer]
        return cls(
            answer_words=len(all_words) / len(scores),
            length_ratio=len(all_words) / max(sum(map(len, base)), 1),
            short_answers=sum(len(answer) <= SHORT_WORDS for answer in words) / len(scores),
            distinct_words=len(set(all_words)) / max(len(all_words), 1),
            ended_answers=sum(bool(item.details["stopped"]) for item in scores) / len(scores),
        )

    @classmethod
    def read(cls, also: Mapping[str, Any]) -> "AnswerStyle | None":
        """Return it from what a task says beside its score; None if it says nothing of answers."""
        kept = {key: also[key] for key in cls.WORDS if key in also}
        return cls(**kept) if "answer_words" in kept else None

    def has_collapsed(self, before: "AnswerStyle", *, rise: float, length: float) -> bool:
        """Return whether these hardly answer any more where those before did.

        Args:
            rise: of the share of empty and one-word answers, from which on they do not.
            length: words of an answer, as a share of those before, below which they do not.
        """
        is_shorter = self.answer_words < length * before.answer_words
        return self.short_answers - before.short_answers > rise or is_shorter

    def runs_on(self, before: "AnswerStyle", *, fall: float, distinct: float) -> bool:
        """Return whether these do not end any more, or repeat themselves, unlike those before.

        Args:
            fall: of the share of answers that end by themselves, beyond which they do not.
            distinct: distinct words as a share of those before, below which they repeat.
        """
        ended, ended_before = self.ended_answers, before.ended_answers
        if ended is not None and ended_before is not None and ended_before - ended > fall:
            return True
        words, words_before = self.distinct_words, before.distinct_words
        return words is not None and words_before is not None and words < distinct * words_before
