"""What a model is asked: rows without their answers, read, checked and rendered as in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.config import SourceConfig
from llmtune.data.context import ContextGuard
from llmtune.data.conversation import Conversation
from llmtune.data.files import TEXT_KINDS, file_kind, iter_file, sniff_reading
from llmtune.data.formats import FORMATS, name_columns, rename_columns
from llmtune.data.masks import refuse_control_text
from llmtune.data.problems import Parsed, RowError, RowProblem, did_you_mean, list_first
from llmtune.data.render import encode_plain, render_text
from llmtune.data.unread import UnreadColumns
from llmtune.errors import LlmtuneError
from llmtune.models.turns import control_pattern, require_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PromptChoice:
    """How a file of prompts is read; None and empty take what the rows say themselves."""

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """Format's name of a column -> the file's."""
    ignore: tuple[str, ...] = ()
    like: SourceConfig | None = None
    """Training rows: a file that has their columns is asked as they are, behind the same
    instruction; None if the user says how the file is read."""


@dataclass(frozen=True)
class PromptRow:
    """One row of a file: as it is there, and what it asks."""

    line: int
    row: Mapping[str, Any]
    question: Conversation


class PromptEncoder:
    """Renders questions with one tokenizer, refusing what training refuses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._guard = ContextGuard(tokenizer)
        self._controls = control_pattern(tokenizer) if tokenizer.chat_template else None

    def encode(self, question: Conversation) -> list[int]:
        """Return the ids that a model is to continue.

        Without a chat template one message of a user is continued as plain text.

        Raises:
            RowError: a text holds a control token, or the template refuses the chat or leaves a
                part of it out.
            LlmtuneError: it is a chat, and there is no chat template.
        """
        tokenizer, messages = self._tokenizer, question.messages
        if question.kind != "chat":
            return encode_plain(tokenizer, question.prompt)
        if self._controls is None:
            if [message["role"] for message in messages] != ["user"] or question.tools:
                require_chat_template(tokenizer)
            return encode_plain(tokenizer, messages[0]["content"])
        refuse_control_text(question, self._controls)
        text = render_text(tokenizer, messages, tools=question.tools, add_generation_prompt=True)
        self._guard.check_prompt(text, question, len(messages))
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def encode_questions(
    tokenizer: PreTrainedTokenizerFast, questions: Iterable[tuple[str, int, Conversation]]
) -> list[list[int]]:
    """Return the ids of each question; with it come its file and its line.

    Raises:
        LlmtuneError: names the questions that training would refuse, by file and line.
    """
    encoder = PromptEncoder(tokenizer)
    prompts, problems = [], []
    for source, line, question in questions:
        try:
            prompts.append(encoder.encode(question))
        except RowError as error:
            problems.append(RowProblem(source, line, str(error), error.kind))
    if problems:
        raise prompts_error(problems)
    return prompts


def read_prompt_rows(path: Path, choice: PromptChoice) -> list[PromptRow]:
    """Read a file of prompts with the formats that training reads, without their answers.

    Raises:
        LlmtuneError: the file cannot be read or is empty, or rows are not prompts: each by file
            and line.
    """
    rows: list[PromptRow] = []
    problems: list[RowProblem] = []
    names = _choose_formats(choice)
    source = SourceConfig(path=str(path), columns=dict(choice.columns), ignore=choice.ignore)
    watches = {
        name: UnreadColumns(source, FORMATS[name].of(source), is_prompt=True) for name in names
    }
    for parsed in iter_prompt_file(path):
        if isinstance(parsed, RowProblem):
            problems.append(parsed)
            continue
        line, given = parsed
        try:
            question = _read_like(given, choice.like) or _read_question(
                rename_columns(given, source.columns), source, watches
            )
        except RowError as error:
            problems.append(RowProblem(str(path), line, str(error), error.kind))
        else:
            rows.append(PromptRow(line, given, question))
    if problems:
        raise prompts_error(problems)
    if not rows:
        raise LlmtuneError(f"{path}: holds no rows; expected at least one prompt")
    return rows


def prompt_like_training(row: Mapping[str, Any], like: SourceConfig | None) -> str | None:
    """Return what a row asks, if it has the columns of training rows and no `prompt` of its own.

    Raises:
        RowError: it has the columns, and they cannot be asked.
    """
    question = None if "prompt" in row else _read_like(row, like)
    if question is None:
        return None
    return str(question.messages[-1]["content"]) if question.kind == "chat" else question.prompt


def iter_prompt_file(path: Path) -> Iterator[Parsed]:
    """Yield the rows of a file with their lines, or why one cannot be read.

    Raises:
        LlmtuneError: it is not there, or not a file of rows.
    """
    if not path.exists():
        raise LlmtuneError(f"{path}: no such file; expected a file of prompts, such as a JSONL")
    if path.is_dir():
        raise LlmtuneError(f"{path}: cannot be read: it is a directory; expected a file")
    if file_kind(path) in TEXT_KINDS:
        raise LlmtuneError(
            f"{path}: a text file is one document; expected a row for each prompt, such as "
            '{"prompt": ...} on each line of a .jsonl'
        )
    yield from iter_file(path, str(path), sniff_reading(path))


def _choose_formats(choice: PromptChoice) -> list[str]:
    """Return the formats that a row may have, as far as the user says."""
    asking = [name for name, format in FORMATS.items() if format.asked]
    names = [name for name in asking if choice.format in (None, name)]
    if not names:
        raise LlmtuneError(
            f"--format {choice.format}: expected one of {', '.join(asking)}"
            f"{did_you_mean(choice.format, asking)}"
        )
    known = list(dict.fromkeys(column for name in names for column in FORMATS[name].columns))
    for column in choice.columns:
        if column not in known:
            raise LlmtuneError(
                f"--columns {column}={choice.columns[column]}: there is no column {column!r}"
                f"{did_you_mean(column, known)}; expected one of {', '.join(known)}"
            )
    return names


def prompts_error(problems: Sequence[RowProblem]) -> LlmtuneError:
    """Return the error that names the first problems and counts the rest."""
    return LlmtuneError("\n".join(list_first(problems)))


def _read_like(given: Mapping[str, Any], like: SourceConfig | None) -> Conversation | None:
    """Return what a row asks, read as training rows are; None if it lacks their column."""
    if like is None or like.format not in FORMATS:
        return None
    member = FORMATS[like.format]
    if not all(given.get(like.columns.get(key, key)) is not None for key in member.asked):
        return None
    try:
        return member.of(like).to_prompt(rename_columns(given, like.columns))
    except RowError as error:
        raise name_columns(error, like.columns) from None


def _read_question(
    row: Mapping[str, Any], source: SourceConfig, watches: Mapping[str, UnreadColumns]
) -> Conversation:
    names = [
        name for name in watches if all(row.get(key) is not None for key in FORMATS[name].asked)
    ]
    if not names:
        wanted = [", ".join(FORMATS[name].asked) for name in watches]
        found = [str(key) for key in row]
        raise RowError(
            f"expected a column {' or '.join(wanted)}, found {', '.join(found) or 'none'}"
            f"{did_you_mean(wanted[-1], found)}; say which it is with --columns NAME=COLUMN",
            "column",
        )
    asking = [name for name in names if name != "text"] or names
    if len(asking) > 1 and asking[0] != "messages":
        raise RowError(
            f"the row fits more than one format: {', '.join(asking)}; say which with --format",
            "column",
        )
    name = asking[0]
    fault = watches[name].fault(row)
    if fault is not None:
        raise RowError(fault, "column")
    try:
        return FORMATS[name].of(source).to_prompt(row)
    except RowError as error:
        raise name_columns(error, source.columns) from None
