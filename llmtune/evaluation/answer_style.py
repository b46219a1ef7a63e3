"""What written answers are like, whatever they say: their length, variety and ends (light)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from llmtune.evaluation.results import ItemScore

SHORT_WORDS = 1
"""An answer of so few words, or of none, is hardly one."""
SIGNS = ".,;:!?\"'()[]*_`#-"


@dataclass(frozen=True)
class AnswerStyle:
    """What an arm's own answers are like, beside the base's; shares but for the first two."""

    answer_words: float
    length_ratio: float
    """Their words divided by the base's."""
    short_answers: float
    distinct_words: float | None = None
    ended_answers: float | None = None
    shared_words: float | None = None
    """Words that the base's answers to other prompts hold, too; a different language has few.
    None in results of older versions, as the two above."""

    WORDS: ClassVar[Mapping[str, str]] = {
        "answer_words": "words an answer",
        "length_ratio": "length against the original",
        "short_answers": "empty or one word",
        "distinct_words": "distinct words",
        "ended_answers": "ended by itself",
        "shared_words": "words of the original's other answers",
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
            shared_words=_share_elsewhere(words, base),
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

    def speaks_otherwise(self, before: "AnswerStyle", *, shared: float) -> bool:
        """Return whether these use other words than the base, as in a different language.

        Args:
            shared: words that the base's other answers hold, as a share of that before.
        """
        words, words_before = self.shared_words, before.shared_words
        return words is not None and words_before is not None and words < shared * words_before


def _share_elsewhere(written: Sequence[Sequence[str]], base: Sequence[Sequence[str]]) -> float:
    """Return which share of the written words is in the base's answers to the other prompts."""
    known = [{plain for word in answer if (plain := _plain(word))} for answer in base]
    in_answers = Counter(word for words in known for word in words)
    found = total = 0
    for answer, own in zip(written, known, strict=True):
        words = [plain for word in answer if (plain := _plain(word))]
        found += sum(in_answers[word] > (word in own) for word in words)
        total += len(words)
    return found / max(total, 1)


def _plain(word: str) -> str:
    """Return a word without case and the signs around it."""
    return word.casefold().strip(SIGNS)
