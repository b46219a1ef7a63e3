"""A first config from a user's own file: its format, columns, split and length."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.config import SourceConfig
from llmtune.data.formats import FORMATS, choose_format, rename_columns
from llmtune.data.hub import is_hub_id
from llmtune.data.init_suite import (
    CHARACTERS_PER_TOKEN,
    NoSuite,
    SuiteDraft,
    draft_suite,
    share_to_hold_out,
)
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.problems import RowProblem
from llmtune.data.rows import LoadedRow, find_files, iter_raw_rows, open_source
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LOOKED_AT_ROWS = 1000
LENGTH_STEP = 64
FEW_ROWS = 200
DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages", "conversation", "chat", "dialog", "dialogue")},
    "sharegpt": {"conversations": ("conversations", "items")},
    "completion": {
        "prompt": ("prompt", "context", "source"),
        "completion": ("completion", "response", "chosen", "target", "output"),
    },
    "instruction": {
        "instruction": ("instruction", "question", "query", "user", "task", "input"),
        "output": ("output", "answer", "response", "reply", "assistant", "target", "completion"),
        "input": ("input", "context"),
    },
    "text": {"text": ("text", "content", "document", "body", "article", "passage")},
}
"""Other names that columns go by, the likeliest first."""

EVALUATION_NAME = re.compile(r"(?:^|[._-])(?:valid(?:ation)?|dev|eval(?:uation)?)(?:[._-]|$)", re.I)
TEST_NAME = re.compile(r"(?:^|[._-])test(?:[._-]|$)", re.I)


@dataclass(frozen=True)
class DataDescription:
    """What a look at the user's data showed."""

    train_path: str
    evaluation_path: str | None
    left_out: tuple[str, ...]
    """Files of a directory that look like test sets."""
    format: str
    reason: str
    columns: dict[str, str]
    render: str
    num_rows: int
    """Of a hub id, those that were looked at."""
    bad_rows: int
    longest: int
    is_measured: bool
    """True where the lengths were counted with the base model's tokenizer."""
    suite: SuiteDraft | NoSuite
    """What asks whether the tuning worked, over the rows that the config holds out."""

    @property
    def evaluation_share(self) -> float | None:
        """The share of the train rows to hold out; None where another file holds them."""
        return None if self.evaluation_path else share_to_hold_out(self.num_rows)

    @property
    def max_length(self) -> int:
        """The longest row seen, rounded up to a multiple of 64 tokens."""
        return max(LENGTH_STEP, math.ceil(self.longest / LENGTH_STEP) * LENGTH_STEP)


def describe_data(
    path: str, *, tokenizer: PreTrainedTokenizerFast | None = None
) -> DataDescription:
    """Look at the first thousand rows of the user's data.

    Raises:
        LlmtuneError: nothing is there, or no format fits its columns.
    """
    train_path, evaluation_path, left_out = _split_files(path)
    source = _guess_source(train_path, tokenizer)
    opened = open_source(source)
    rows = list(itertools.islice(opened.rows, LOOKED_AT_ROWS))
    usable = [row for row in rows if isinstance(row, LoadedRow)]
    if not usable:
        problem = next(row for row in rows if isinstance(row, RowProblem))
        raise LlmtuneError(f"{path}: no row can be used; the first: {problem}")
    # A hub set may be huge: it is not read to its end for a count.
    is_hub = is_hub_id(train_path)
    num_rows = len(rows) + (0 if is_hub else sum(1 for _ in opened.rows))
    held_out = source.model_copy(update={"path": evaluation_path or train_path})
    suite = draft_suite(
        open_source(held_out).rows,
        share=None if evaluation_path else share_to_hold_out(num_rows),
        most_rows=LOOKED_AT_ROWS if is_hub else None,
    )
    return DataDescription(
        train_path=train_path,
        evaluation_path=evaluation_path,
        left_out=left_out,
        format=opened.format.format.name,
        reason=_explain(source, opened.format.reason),
        columns=source.columns,
        render=source.render,
        num_rows=num_rows,
        bad_rows=len(rows) - len(usable),
        longest=_longest(usable, tokenizer),
        is_measured=tokenizer is not None,
        suite=suite,
    )


def render_config(
    found: DataDescription, *, base: str | None = None, suite: str | None = None
) -> str:
    """Return a commented YAML config for the data, ready for `llmtune run`.

    `suite` is where the drafted suite is written; None where there is none.
    """
    name = re.sub(r"[^\w-]+", "-", Path(found.train_path).name.split(".")[0]).strip("-") or "run"
    measured = "counted with the base's tokenizer" if found.is_measured else "guessed from the text"
    lines = [
        f"# Written by llmtune init from {found.train_path}: {found.num_rows:,} rows, "
        f"{found.reason}.",
        "# Look at what is trained with: llmtune data show THIS_FILE",
        f"run_dir: {_yaml(f'runs/{name}')}",
        "seed: 0",
        "",
        "model:",
        f"  base: {_yaml(base or DEFAULT_BASE)}   # a directory, a .gguf file or a hub id",
        "  quantization: {method: nf4}   # the frozen base in 4 bits; null keeps 16",
        "",
        "adapter: {method: lora, rank: 16, alpha: 32, target_modules: all-linear}",
        "",
        "data:",
        "  train:",
        f"    - {_source_yaml(found, found.train_path)}",
    ]
    if found.evaluation_path is not None:
        lines += ["  evaluation:", f"    - {_source_yaml(found, found.evaluation_path)}"]
    else:
        share = found.evaluation_share
        lines.append(f"  evaluation_share: {share}   # held out by a hash of each row")
    lines += [f"  # left out, it looks like a test set: {name}" for name in found.left_out]
    lines += [
        f"  max_length: {found.max_length}   # tokens; the longest row has {found.longest:,} "
        f"({measured})",
        f"  loss_on: {'all' if found.format == 'text' else 'assistant'}",
    ]
    if found.bad_rows:
        lines.append(
            f"  on_bad_row: error   # {found.bad_rows} of the first rows cannot be used; see "
            "llmtune data check, or set drop"
        )
    epochs = 3 if found.num_rows < FEW_ROWS * 10 else 1
    lines += [
        "",
        "train:",
        "  learning_rate: 2.0e-4",
        f"  num_epochs: {epochs}",
        f"  batch_size: {8 if found.num_rows < FEW_ROWS else 16}",
        "",
        "evaluate:",
        "  suites:",
        *_suite_lines(found.suite, suite),
        "    - general   # general knowledge that ships with llmtune: what was forgotten?",
    ]
    return "\n".join(lines) + "\n"


def _suite_lines(draft: SuiteDraft | NoSuite, path: str | None) -> list[str]:
    if isinstance(draft, NoSuite) or path is None:
        reason = f" ({draft.reason})" if isinstance(draft, NoSuite) else ""
        return [
            f"    # your own task's suite is missing{reason}: without one there is no verdict;",
            "    # a suite is a short YAML file, see docs/evaluation.md",
        ]
    return [f"    - {_yaml(path)}   # {len(draft.items)} held-out rows: did it learn the task?"]


def _split_files(path: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the train path, an evaluation file lying beside it, and test files to leave out."""
    here = Path(path).expanduser()
    if is_hub_id(path) or not (here.is_dir() or here.is_file()):
        if not is_hub_id(path):
            find_files(path)  # raises where nothing is there
        return path, None, ()
    if here.is_file():
        return path, None, ()
    files = find_files(path)
    evaluation = [file for file in files if EVALUATION_NAME.search(file.stem)]
    tests = [file for file in files if TEST_NAME.search(file.stem)]
    train = [file for file in files if file not in evaluation and file not in tests]
    if len(train) == len(files):
        return path, None, ()
    if len(train) != 1:
        listed = ", ".join(str(file) for file in files)
        raise LlmtuneError(
            f"{path}: which of its files to train on is not clear ({listed}); name one, or a glob"
        )
    left_out = tuple(str(file) for file in [*tests, *evaluation[1:]])
    return str(train[0]), str(evaluation[0]) if evaluation else None, left_out


def _guess_source(path: str, tokenizer: PreTrainedTokenizerFast | None) -> SourceConfig:
    """Return a source with its columns mapped where they have other names."""
    source = SourceConfig(path=path)
    first = [
        parsed[1]
        for _, parsed in itertools.islice(iter_raw_rows(source), 100)
        if not isinstance(parsed, RowProblem)
    ]
    if first and not any(_fits(name, row) for row in first[:10] for name in FORMATS):
        for name, wanted in ALIASES.items():
            columns = _match_columns(first[0], name, wanted)
            if columns is not None:
                source = SourceConfig(path=path, format=name, columns=columns)
                break
    has_template = tokenizer is None or bool(tokenizer.chat_template)
    if not has_template and first:
        choice = choose_format(source, first)
        if choice.format.name == "completion":
            return source.model_copy(update={"format": "completion", "render": "plain"})
    return source


def _explain(source: SourceConfig, reason: str) -> str:
    """Say how the columns were recognised, where it was not by the format's own names."""
    if not source.columns:
        return reason
    names = ", ".join(f"{column} as {name}" for name, column in source.columns.items())
    return reason.replace("set in the config", f"guessed from the columns: {names}")


def _fits(name: str, row: Mapping[str, Any]) -> bool:
    return FORMATS[name]().recognises(row)


def _match_columns(
    row: Mapping[str, Any], name: str, wanted: Mapping[str, tuple[str, ...]]
) -> dict[str, str] | None:
    """Return `format's name: row's name` for every required column, or None."""
    given = {str(key).lower(): str(key) for key in row}
    columns: dict[str, str] = {}
    for column, names in wanted.items():
        free = (given[n] for n in names if n in given and given[n] not in columns.values())
        match = next(free, None)
        if match is not None:
            columns[column] = match
        elif column in FORMATS[name].required:
            return None
    renamed = rename_columns(row, columns)
    needed = {column: key for column, key in columns.items() if column != key}
    return needed if _fits(name, renamed) else None


def _longest(rows: list[LoadedRow], tokenizer: PreTrainedTokenizerFast | None) -> int:
    if tokenizer is None:
        texts = (
            sum(len(m["content"]) + 16 for m in row.conversation.messages)
            + len(row.conversation.prompt)
            + len(row.conversation.text)
            for row in rows
        )
        return math.ceil(max(texts) / CHARACTERS_PER_TOKEN)
    labelled = Labeller(tokenizer, "assistant").label([row.conversation for row in rows])
    lengths = [
        len(sequence.input_ids)
        for row in labelled
        if isinstance(row, LabelledRow)
        for sequence in row.sequences
    ]
    if not lengths:
        raise LlmtuneError(f"no row can be rendered with this base; the first: {labelled[0]}")
    return max(lengths)


def _source_yaml(found: DataDescription, path: str) -> str:
    parts = [f"path: {_yaml(path)}", f"format: {found.format}"]
    if found.columns:
        mapping = ", ".join(f"{name}: {_yaml(key)}" for name, key in found.columns.items())
        parts.append(f"columns: {{{mapping}}}")
    if found.render != "chat":
        parts.append(f"render: {found.render}")
    return "{" + ", ".join(parts) + "}"


def _yaml(text: str) -> str:
    """Return `text` as a YAML scalar: bare where that is safe, else quoted (JSON is YAML)."""
    is_bare = re.fullmatch(r"[A-Za-z./_][\w./ -]*", text) and not text.endswith(" ")
    return text if is_bare and text.lower() not in YAML_WORDS else json.dumps(text)


YAML_WORDS = {"yes", "no", "on", "off", "true", "false", "null", "y", "n", "~"}
