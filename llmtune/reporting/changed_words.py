"""Two texts side by side, with the words that differ marked."""

import difflib
import re
from dataclasses import dataclass

PIECES = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Passage:
    """A stretch of text that both sides share, or that only this side has (`changed`)."""

    text: str
    changed: bool


def mark_changes(before: str, after: str) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
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


def _passages(pieces: list[str], marks: list[bool]) -> tuple[Passage, ...]:
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
