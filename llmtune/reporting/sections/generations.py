"""The same prompts answered by both models, with the words that differ marked."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import read_json
from llmtune.io.run_dir import RunDir

PIECES = re.compile(r"\s+|\w+|[^\w\s]")
REAL_ANSWER = 5
"""From so many words of the base on, an answer of one word or none has collapsed."""
LONG_ANSWER = 20
"""Only an answer of so many words can be called one that repeats itself."""
SHORTER = 4
"""So many times as long in characters is the base's answer: not all languages have spaces."""
FEW_DISTINCT = 0.5
"""Share of distinct words, of the base's share, below which an answer repeats itself."""


@dataclass(frozen=True)
class Generation:
    """One prompt answered by both models; `stopped` says whether the model ended by itself."""

    prompt: str
    base: str
    tuned: str
    reference: str | None = None
    base_stopped: bool | None = None
    tuned_stopped: bool | None = None

    @property
    def collapse(self) -> str:
        """How the tuned model's answer has collapsed beside the base's; empty if it has not.

        An answer as short as its reference has not.
        """
        before, after = self.base.split(), self.tuned.split()
        expected = len(self.reference.split()) if self.reference else REAL_ANSWER
        is_short = SHORTER * len(self.tuned.strip()) < len(self.base.strip())
        is_word = len(after) <= 1 < min(expected, len(before)) and is_short
        if is_word and len(before) >= REAL_ANSWER:
            return "one word" if after else "empty"
        if len(after) >= LONG_ANSWER and before:
            shares = [
                len({word.casefold() for word in each}) / len(each) for each in (before, after)
            ]
            if shares[1] < FEW_DISTINCT * shares[0]:
                return "repeats itself"
        return ""


@dataclass(frozen=True)
class Passage:
    """A stretch of text that both sides share, or that only this side has (`changed`)."""

    text: str
    changed: bool


Passages = tuple[Passage, ...]


class GenerationsSection(TypedDict):
    """What the template shows: each example with the base's and the tuned model's passages."""

    generations: list[tuple[Generation, Passages, Passages]]
    num_collapsed: int


def read_generations(run: RunDir) -> tuple[Generation, ...]:
    """Read generations.json; none if the run has not made it.

    Raises:
        LlmtuneError: the file is not the list of examples it should be.
    """
    path = run.generations_path
    if not path.exists():
        return ()
    known = Generation.__dataclass_fields__
    try:
        rows = read_json(path)
        return tuple(Generation(**{k: v for k, v in row.items() if k in known}) for row in rows)
    except (LlmtuneError, AttributeError, TypeError) as error:
        raise LlmtuneError(
            f"{path}: expected a list of {{prompt, base, tuned, reference}}, but: {error}; "
            "evaluate the run again to rewrite it"
        ) from None


def show_generations(generations: Sequence[Generation]) -> GenerationsSection | None:
    """Return the example prompts answered by both models, changed words marked."""
    if not generations:
        return None
    return {
        "generations": [(each, *mark_changes(each.base, each.tuned)) for each in generations],
        "num_collapsed": sum(bool(each.collapse) for each in generations),
    }


def mark_changes(before: str, after: str) -> tuple[Passages, Passages]:
    """Split two texts into shared and changed passages; joined, each gives its text back.

    Words, punctuation and white space are the pieces compared; white space between two changed
    words counts as changed, so that a changed phrase is one mark.
    """
    left, right = PIECES.findall(before), PIECES.findall(after)
    left_marks, right_marks = [True] * len(left), [True] * len(right)
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            left_marks[block.a + offset] = right_marks[block.b + offset] = False
    return _passages(left, left_marks), _passages(right, right_marks)


def _passages(pieces: list[str], marks: list[bool]) -> Passages:
    last = len(pieces) - 1
    for index, piece in enumerate(pieces):
        if piece.isspace():
            between = 0 < index < last and marks[index - 1] and marks[index + 1]
            marks[index] = between
    passages: list[Passage] = []
    for piece, changed in zip(pieces, marks, strict=True):
        if passages and passages[-1].changed == changed:
            passages[-1] = Passage(passages[-1].text + piece, changed)
        else:
            passages.append(Passage(piece, changed))
    return tuple(passages)
