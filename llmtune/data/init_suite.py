"""A first suite from the rows that a run holds out, so that its report can judge the task."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from llmtune.data.conversation import Conversation
from llmtune.data.overlap import conversation_key, held_out_draw
from llmtune.data.rows import LoadedRow

FEWEST_ITEMS = 20
"""Fewer can hardly tell base and tuned model apart."""
MOST_ITEMS = 300
KEPT_ITEMS = 4 * MOST_ITEMS
"""Rows in memory while it is not known yet which are held out."""
FEWEST_HELD_OUT = 0.01
MOST_CHOICES = 20
ROWS_A_CHOICE = 5
"""Answers of fewer rows each are not labels."""
CHARACTERS_PER_TOKEN = 3.0
"""English runs at 4 or so; a low guess asks for more length, never for less."""


@dataclass(frozen=True)
class SuiteDraft:
    """The rows that a first suite asks; a task of suites says whether it can (`SuiteConfig.draft`).

    `choices` is empty if the answers are not labels, `asks` false for documents.
    """

    items: tuple[dict[str, str], ...]
    system: str | None = None
    choices: tuple[str, ...] = ()
    longest_answer: int = 0
    """Characters."""
    asks: bool = True

    @property
    def longest_answer_tokens(self) -> int:
        """The tokens of the longest answer, guessed from its characters."""
        return math.ceil(self.longest_answer / CHARACTERS_PER_TOKEN)


@dataclass(frozen=True)
class NoSuite:
    """Why no suite could be drafted."""

    reason: str


@dataclass(frozen=True)
class _Turn:
    """A row as a question and its answer, or as a document (without a question)."""

    prompt: str | None
    answer: str
    system: str | None


def share_to_hold_out(num_rows: int) -> float:
    """Return the share of the rows to keep out of training: about 300 rows, 1 to 20 %."""
    return round(min(0.2, max(FEWEST_HELD_OUT, MOST_ITEMS / num_rows)), 3)


class SuiteRows:
    """Gathers in one pass what a suite can ask, though the share held out is known at its end."""

    def __init__(self, *, holds_all: bool) -> None:
        self.holds_all = holds_all
        """Whether every row is held out (a file of its own)."""
        self._answers: Counter[str] = Counter()
        self._turns: dict[bytes, _Turn] = {}
        self._num_rows = self._num_asked = 0
        self._draws = (1.0, 0.0)
        """The smallest and the largest number that a row has drawn."""

    def add(self, row: LoadedRow, num_read: int) -> None:
        """Take a row; `num_read` rows were read so far, those that cannot be used with them."""
        self._num_rows += 1
        key = conversation_key(row.conversation)
        draw = held_out_draw(key)
        self._draws = (min(self._draws[0], draw), max(self._draws[1], draw))
        turn = _read_turn(row.conversation)
        if turn is None:
            return
        self._num_asked += 1
        if len(self._answers) <= MOST_CHOICES:
            self._answers[turn.answer] += 1
        share = 1.0 if self.holds_all else share_to_hold_out(num_read)
        if draw < share:  # the share only falls as rows are read
            self._turns[key] = turn
        if len(self._turns) >= KEPT_ITEMS:
            self._turns = self._held_out(share)
            if self.holds_all or share == FEWEST_HELD_OUT:
                self._turns = _smallest_keys(self._turns)

    def share_of(self, num_read: int) -> float | None:
        """Return the share to hold out, 0 if it would leave one of the two sides without rows."""
        if self.holds_all:
            return None
        share = share_to_hold_out(num_read)
        smallest, largest = self._draws
        return share if smallest < share <= largest else 0.0

    def draft(self, share: float | None) -> SuiteDraft | NoSuite:
        """Draft a suite over the rows that a run with this `evaluation_share` holds out."""
        if self._num_rows and not self._num_asked:
            return NoSuite("the rows are not single questions with an answer")
        held_out = self._held_out(1.0 if share is None else share)
        turns = _of_commonest_system(_smallest_keys(held_out).values())
        if len(turns) < FEWEST_ITEMS:
            held = "" if share is None else " are held out"
            return NoSuite(f"too few rows{held}: {len(turns)}, and {FEWEST_ITEMS} are needed")
        if turns[0].prompt is None:
            return SuiteDraft(tuple({"text": turn.answer} for turn in turns), asks=False)
        return SuiteDraft(
            items=tuple({"prompt": turn.prompt or "", "answer": turn.answer} for turn in turns),
            system=turns[0].system,
            choices=tuple(sorted(self._answers)) if _are_labels(self._answers) else (),
            longest_answer=max(len(turn.answer) for turn in turns),
        )

    def _held_out(self, share: float) -> dict[bytes, _Turn]:
        return {key: turn for key, turn in self._turns.items() if held_out_draw(key) < share}


def render_items(draft: SuiteDraft) -> str:
    """Return the suite's items as JSONL."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in draft.items)


def _read_turn(conversation: Conversation) -> _Turn | None:
    """Return the row's one question and answer; None if it is something else."""
    if conversation.kind == "text":
        return _Turn(None, conversation.text, None) if conversation.text.strip() else None
    if conversation.kind != "chat" or conversation.tools:
        return None
    messages = conversation.messages
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = messages[1:] if system is not None else messages
    if [message["role"] for message in turns] != ["user", "assistant"]:
        return None
    prompt, answer = (message["content"] for message in turns)
    is_plain = (
        isinstance(prompt, str) and isinstance(answer, str) and not turns[1].get("tool_calls")
    )
    return _Turn(prompt, answer, system) if is_plain and prompt.strip() and answer.strip() else None


def _smallest_keys(held_out: dict[bytes, _Turn]) -> dict[bytes, _Turn]:
    """Keep the rows whose hashes are smallest: a choice that no order of the file decides."""
    kept = set(sorted(held_out)[:MOST_ITEMS])
    return {key: turn for key, turn in held_out.items() if key in kept}


def _of_commonest_system(turns: Iterable[_Turn]) -> list[_Turn]:
    """Return the turns under the commonest system prompt: a suite has one, or none."""
    found = list(turns)
    if not found:
        return []
    system = Counter(turn.system for turn in found).most_common(1)[0][0]
    return [turn for turn in found if turn.system == system]


def _are_labels(answers: Counter[str]) -> bool:
    return 2 <= len(answers) <= MOST_CHOICES and min(answers.values()) >= ROWS_A_CHOICE
