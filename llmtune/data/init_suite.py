"""A first suite from the rows that a run holds out, so that its report can judge the task."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.data.conversation import Conversation
from llmtune.data.init_job import Job, trained_places
from llmtune.data.overlap import held_out_draw
from llmtune.data.rows import LoadedRow

FEWEST_ITEMS = 20
"""Fewer can hardly tell base and tuned model apart."""
FEWEST_GROUPS = 8
"""The fewest chats or documents: turns or passages of one depend on each other."""
MOST_ITEMS = 300
FEW_ROWS = 100
KEPT_ITEMS = 4 * MOST_ITEMS
"""Rows in memory while it is not known yet which are held out."""
FEWEST_HELD_OUT = 0.01
PASSAGE_CHARACTERS = (2000, 500)
"""The second if the first gives too few passages."""
PASSAGES_A_DOCUMENT = 8
TURNS_A_CHAT = 8
CHARACTERS_PER_TOKEN = 3.0
"""English runs at 4 or so; a low guess asks for more length, never for less."""


@dataclass(frozen=True)
class SuiteDraft:
    """The rows that a first suite asks; a task of suites says whether it can (`SuiteConfig.draft`).

    `choices` is empty if the answers are not labels, `asks` false for documents.
    """

    items: tuple[dict[str, Any], ...]
    system: str | None = None
    choices: tuple[str, ...] = ()
    longest_answer: int = 0
    """Characters."""
    asks: bool = True
    is_json: bool = False
    """Whether the answers are JSON."""
    has_turns: bool = False
    """Whether items are turns of chats: `messages`, `answer` and `conversation`."""
    is_cut: bool = False
    """Whether passages of one `document` are several items."""
    is_plain: bool = False
    """Whether prompts are texts to continue, without a chat template."""

    @property
    def longest_answer_tokens(self) -> int:
        """The tokens of the longest answer, guessed from its characters."""
        return math.ceil(self.longest_answer / CHARACTERS_PER_TOKEN)

    @property
    def longest_choice_tokens(self) -> int:
        """The tokens of the longest choice, guessed from its characters."""
        return math.ceil(max(map(len, self.choices)) / CHARACTERS_PER_TOKEN)


@dataclass(frozen=True)
class NoSuite:
    """Why no suite could be drafted."""

    reason: str


@dataclass(frozen=True)
class _Turn:
    """A row as a question and its answer."""

    prompt: str
    answer: str
    system: str | None


def share_to_hold_out(num_rows: int) -> float:
    """Return the share of the rows to keep out of training: about 300 rows, 1 to 20 %.

    Of fewer than a hundred 30 %, or nothing could be said of so few.
    """
    return round(
        min(0.3 if num_rows < FEW_ROWS else 0.2, max(FEWEST_HELD_OUT, MOST_ITEMS / num_rows)), 3
    )


class SuiteRows:
    """Gathers in one pass what a suite can ask, though the share held out is known at its end."""

    def __init__(self, *, holds_all: bool) -> None:
        self.holds_all = holds_all
        """Whether every row is held out (a file of its own)."""
        self._kept: dict[bytes, Conversation] = {}
        self._draws = (1.0, 0.0)
        """The smallest and the largest number that a row has drawn."""

    def add(self, row: LoadedRow, num_read: int) -> bytes:
        """Take a row and return its key; `num_read` rows were read so far, bad ones with them."""
        key = row.key
        draw = held_out_draw(key)
        self._draws = (min(self._draws[0], draw), max(self._draws[1], draw))
        share = 1.0 if self.holds_all else share_to_hold_out(num_read)
        if draw < share:  # the share only falls as rows are read
            self._kept[key] = row.conversation
        if len(self._kept) >= KEPT_ITEMS:
            self._kept = self._held_out(share)
            if self.holds_all or share == FEWEST_HELD_OUT:
                self._kept = _smallest_keys(self._kept)
        return key

    def share_of(self, num_read: int) -> float | None:
        """Return the share to hold out, 0 if it would leave one of the two sides without rows."""
        if self.holds_all:
            return None
        share = share_to_hold_out(num_read)
        smallest, largest = self._draws
        return share if smallest < share <= largest else 0.0

    def draft(
        self, share: float | None, job: Job, without: Container[bytes] = ()
    ) -> SuiteDraft | NoSuite:
        """Draft a suite over the rows that a run with this `evaluation_share` holds out.

        Rows with a key in `without` are trained on, and not asked.
        """
        held_out = self._held_out(1.0 if share is None else share)
        held_out = {key: row for key, row in held_out.items() if key not in without}
        rows = _smallest_keys(held_out).values()
        if job.name == "text":
            return _draft_passages([row.text for row in rows if row.text.strip()])
        if job.name == "chat":
            return _draft_turns(list(rows))
        found = [turn for turn in map(_read_turn, rows) if turn is not None]
        if rows and not found:
            return NoSuite("the rows are not single questions with an answer")
        turns = _of_commonest_system(found)
        if len(turns) < FEWEST_ITEMS:
            held = "" if share is None else " are held out"
            return NoSuite(f"too few rows{held}: {len(turns)}, and {FEWEST_ITEMS} are needed")
        return SuiteDraft(
            items=tuple({"prompt": turn.prompt, "answer": turn.answer} for turn in turns),
            system=turns[0].system,
            choices=tuple(sorted({*job.labels, *(turn.answer for turn in turns)}))
            if job.name == "classify"
            else (),
            longest_answer=max(len(turn.answer) for turn in turns),
            is_json=job.name == "extract",
            is_plain=all(row.kind == "plain" for row in rows),
        )

    def prompts(self) -> list[str]:
        """Return what the kept rows ask, those of one question."""
        turns = map(_read_turn, self._kept.values())
        return [turn.prompt for turn in turns if turn is not None]

    def _held_out(self, share: float) -> dict[bytes, Conversation]:
        return {key: row for key, row in self._kept.items() if held_out_draw(key) < share}


def render_items(draft: SuiteDraft) -> str:
    """Return the suite's items as JSONL."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in draft.items)


def _draft_passages(texts: Sequence[str]) -> SuiteDraft | NoSuite:
    """Draft a suite over passages of documents, all of a document in one group."""
    items: list[dict[str, str]] = []
    for length in PASSAGE_CHARACTERS:
        cut = [list(_cut(text, length)) for text in texts]
        items = items if len(items) >= 2 * FEWEST_ITEMS else [
            {"document": f"document-{number}", "text": passage}
            for number, passages in enumerate(cut, 1)
            for passage in _spread(passages, PASSAGES_A_DOCUMENT)
        ]  # fmt: skip
    items = items[:MOST_ITEMS]
    if len(items) < FEWEST_ITEMS or len(texts) < FEWEST_GROUPS:
        return NoSuite(
            f"too few documents are held out: {len(texts)} with {len(items)} passages, and "
            f"{FEWEST_GROUPS} with {FEWEST_ITEMS} are needed; cut long files, such as by chapter"
        )
    is_cut = len({item["document"] for item in items}) < len(items)
    if not is_cut:
        items = [{"text": item["text"]} for item in items]
    return SuiteDraft(tuple(items), asks=False, is_cut=is_cut)


def _cut(text: str, length: int) -> Iterator[str]:
    """Cut a document into passages, at the end of a line or a word if one is near."""
    while len(text) > length:
        breaks = (text.rfind(mark, length // 2, length) for mark in ("\n", ". ", " "))
        place = next((place + 1 for place in breaks if place > 0), length)
        if text[:place].strip():
            yield text[:place]
        text = text[place:]
    if text.strip():
        yield text


def _spread(passages: Sequence[str], most: int) -> list[str]:
    """Return at most so many passages, evenly over the document."""
    if len(passages) <= most:
        return list(passages)
    return [passages[place * len(passages) // most] for place in range(most)]


def _draft_turns(rows: Sequence[Conversation]) -> SuiteDraft | NoSuite:
    """Draft a suite over the answers in chats, all of a chat in one group."""
    items: list[dict[str, Any]] = []
    num_chats = 0
    for row in rows:
        turns = _turns(row)[:TURNS_A_CHAT]
        num_chats += bool(turns)
        name = f"chat-{num_chats}"
        items += [{"conversation": name, "messages": before, "answer": answer}
                  for before, answer in turns]  # fmt: skip
    if rows and not items:
        return NoSuite("the rows are not chats of plain turns")
    if len(items) < FEWEST_ITEMS or num_chats < FEWEST_GROUPS:
        return NoSuite(
            f"too few chats are held out: {num_chats} with {len(items)} answers, and "
            f"{FEWEST_GROUPS} with {FEWEST_ITEMS} are needed"
        )
    items = items[:MOST_ITEMS]
    longest = max(len(item["answer"]) for item in items)
    return SuiteDraft(tuple(items), longest_answer=longest, has_turns=True)


def _turns(row: Conversation) -> list[tuple[list[dict[str, str]], str]]:
    """Return each trained answer of a chat with what comes before it; none if there are tools."""
    is_plain = row.kind == "chat" and not row.tools and all(_is_plain(m) for m in row.messages)
    if not is_plain:
        return []
    plain = [{"role": m["role"], "content": m["content"]} for m in row.messages]
    return [
        (plain[:place], plain[place]["content"])
        for place in trained_places(row)
        if place > 0 and plain[place - 1]["role"] == "user"
    ]


def _is_plain(message: dict[str, Any]) -> bool:
    return (
        isinstance(message["content"], str)
        and message["role"] in ("system", "user", "assistant")
        and not message.get("tool_calls")
        and not message.get("reasoning_content")
    )


def _read_turn(conversation: Conversation) -> _Turn | None:
    """Return the row's one question and answer; None if it is something else."""
    if conversation.kind == "plain":
        return _Turn(conversation.prompt, conversation.text.strip(), None)
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


def _smallest_keys(held_out: dict[bytes, Conversation]) -> dict[bytes, Conversation]:
    """Keep the rows whose hashes are smallest: a choice that no order of the file decides."""
    kept = set(sorted(held_out)[:MOST_ITEMS])
    return {key: row for key, row in held_out.items() if key in kept}


def _of_commonest_system(turns: Iterable[_Turn]) -> list[_Turn]:
    """Return the turns under the commonest system prompt: a suite has one, or none."""
    found = list(turns)
    if not found:
        return []
    system = Counter(turn.system for turn in found).most_common(1)[0][0]
    return [turn for turn in found if turn.system == system]
