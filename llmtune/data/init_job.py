"""What a file of rows is there to teach: labels, JSON, a chat, answers, or text as such."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from llmtune.data.conversation import Conversation, trained_turns
from llmtune.data.problems import RowError
from llmtune.data.row_values import parse_json
from llmtune.errors import LlmtuneError

JobName = Literal["classify", "extract", "chat", "instruct", "text"]
JOBS: tuple[JobName, ...] = get_args(JobName)

MOST_LABELS = 500
FEW_LABELS = 20
"""So many at most may be numbers or be rare; with more, the answers must clearly be labels."""
ROWS_A_LABEL = 5
"""Answers of fewer rows each, or on average, are not labels."""
LONGEST_LABEL = 80
"""Characters."""
MOST_JSON = 0.95
"""The share of answers that must be JSON."""
MOST_TURNS = 0.2
"""The share of rows with several answers from which on the rows are chats."""
LISTED_CHARACTERS = 800
"""Labels that take more are not written into every prompt: about 250 tokens."""
SHOWN_LABELS = 8


@dataclass(frozen=True)
class Job:
    """What is taught, with what is needed to ask for it."""

    name: JobName
    labels: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    """Of the JSON objects, the commonest first."""
    turns: float = 1.0
    """Answers a row, on average."""

    def describe(self) -> str:
        """Say what was understood, in a few words."""
        if self.name == "classify":
            shown = ", ".join(self.labels[:SHOWN_LABELS])
            more = ", ..." if len(self.labels) > SHOWN_LABELS else ""
            return f"classification into {len(self.labels)} labels ({shown}{more})"
        if self.name == "extract":
            fields = f" with the fields {', '.join(self.fields)}" if self.fields else ""
            return f"extraction to JSON{fields}"
        if self.name == "chat":
            return f"chats with {self.turns:.1f} answers each"
        return {"instruct": "questions with written answers", "text": "raw text"}[self.name]

    def instruction(self) -> str | None:
        """Return what a bare text needs before it, so that it can be answered; None if nothing.

        Labels are listed if they are short enough to be in every prompt.
        """
        if self.name == "classify":
            listed = ", ".join(self.labels)
            if len(listed) > LISTED_CHARACTERS:
                return "Classify this text. Answer with its label alone."
            return f"Classify this text. Answer with one of these labels: {listed}."
        if self.name == "extract" and self.fields:
            return f"Answer with JSON that has the fields {', '.join(self.fields)}."
        return "Answer with JSON." if self.name == "extract" else None


class JobSurvey:
    """Looks at conversations one by one, and says what they teach."""

    def __init__(self) -> None:
        self._rows = self._texts = self._chats = self._answers = self._json = self._repeated = 0
        self._labels: Counter[str] = Counter()
        self._fields: Counter[str] = Counter()
        self._may_be_labels = True

    def add(self, conversation: Conversation) -> None:
        """Count one row."""
        self._rows += 1
        if conversation.kind == "text":
            self._texts += 1
            return
        answers = answers_of(conversation)
        self._answers += len(answers)
        if len(answers) != 1:
            self._chats += 1
            return
        self._add_answer(answers[0])

    def job(self, asked: JobName | None = None) -> Job:
        """Return what the rows teach.

        Args:
            asked: what the user says it is.

        Raises:
            LlmtuneError: the rows cannot be what the user says.
        """
        name = asked or self._guess()
        if (name == "text") != (self._rows == self._texts):
            found = "documents" if self._rows == self._texts else "questions with answers"
            raise LlmtuneError(f"--task {name}: the rows are {found}; say which columns with "
                               "--columns prompt=NAME,completion=NAME (or text=NAME)")  # fmt: skip
        if name == "classify" and not (self._may_be_labels and len(self._labels) > 1):
            raise LlmtuneError(
                f"--task classify: the answers are not labels: expected 2 to {MOST_LABELS} "
                f"different ones of at most {LONGEST_LABEL} characters"
            )
        if name == "extract" and not self._json:
            raise LlmtuneError("--task extract: none of the answers is a JSON object or list")
        return Job(
            name,
            labels=tuple(sorted(self._labels)) if name == "classify" else (),
            fields=tuple(dict(self._fields.most_common(20))) if name == "extract" else (),
            turns=self._answers / max(self._rows, 1),
        )

    def _add_answer(self, answer: str) -> None:
        if answer.lstrip()[:1] in ("{", "["):
            try:
                value = parse_json(answer)
            except (ValueError, RecursionError):
                value = None
            self._json += isinstance(value, dict | list)
            self._fields.update(map(str, value) if isinstance(value, dict) else ())
        if self._may_be_labels:
            self._labels[answer] += 1
            is_label = len(answer) <= LONGEST_LABEL and len(self._labels) <= MOST_LABELS
            if not is_label:
                self._may_be_labels = False
                self._labels.clear()

    def _guess(self) -> JobName:
        asked = self._rows - self._texts
        if not asked:
            return "text"
        if self._chats / asked > MOST_TURNS:
            return "chat"
        if self._json / asked >= MOST_JSON:
            return "extract"
        return "classify" if self._are_labels() else "instruct"

    def _are_labels(self) -> bool:
        if not self._may_be_labels or len(self._labels) < 2:
            return False
        counts = list(self._labels.values())
        if len(counts) <= FEW_LABELS:
            return min(counts) >= ROWS_A_LABEL
        are_numbers = all(label.strip().lstrip("-").isdecimal() for label in self._labels)
        rare = sum(count == 1 for count in counts)
        is_many = sum(counts) >= ROWS_A_LABEL * len(counts)
        return is_many and not are_numbers and rare <= len(counts) / 10


def answers_of(conversation: Conversation) -> list[str]:
    """Return the written answers of a row that are trained."""
    if conversation.kind == "plain":
        return [conversation.text.strip()]
    return [conversation.messages[place]["content"] for place in trained_places(conversation)]


def trained_places(conversation: Conversation) -> list[int]:
    """Return which messages of a chat are answers that are trained."""
    try:
        return [place for place, _ in trained_turns(conversation, "assistant")]
    except RowError:
        return []


def have_own_instruction(prompts: list[str]) -> bool:
    """Say whether prompts begin (or end) alike, as those do that say themselves what to do."""
    if len(prompts) < 2:
        return False
    backwards = [prompt[::-1] for prompt in prompts]
    alike = max(len(os.path.commonprefix(prompts)), len(os.path.commonprefix(backwards)))
    return alike >= 12  # characters; "Classify: " and a quote
