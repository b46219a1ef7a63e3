"""Answers to a file of prompts, written as they come, in the order of the file at the end."""

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llmtune.data.conversation import Conversation
from llmtune.data.files import json_line
from llmtune.data.problems import RowError, RowProblem
from llmtune.data.prompts import (
    PromptChoice,
    PromptRow,
    iter_prompt_file,
    prompt_like_training,
    prompts_error,
    read_prompt_rows,
)
from llmtune.errors import LlmtuneError
from llmtune.evaluation.endpoint import Endpoint, EndpointConfig
from llmtune.evaluation.labels import label_prompts, label_rows
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import JsonValue, hash_json
from llmtune.io.partial_lines import partial_lines
from llmtune.io.run_dir import atomic_write_text
from llmtune.models.resolve import Loadable
from llmtune.scoring.live import load_target
from llmtune.serving.answerers import Answerer, Asker, Labeller, LongRows, Writer

log = logging.getLogger("llmtune")

TABLES = {".csv": ",", ".tsv": "\t"}
"""Outputs that are tables, and what separates their columns; any other is JSONL."""

NOT_WRITTEN = frozenset(
    {".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".feather", ".yaml", ".yml", ".gz", ".zip"}
)
"""Ends of names that promise a format that is not written here."""


@dataclass(frozen=True)
class PredictSettings:
    """What to answer and how; `arm` None takes the target's first."""

    input_path: Path
    output_path: Path
    arm: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    choice: PromptChoice = field(default_factory=PromptChoice)
    answer_column: str = "answer"
    too_long: Literal["error", "skip"] = "error"
    """What happens to a row that leaves the model no position for an answer."""
    labels: tuple[str, ...] = ()
    """Answers that there may be; empty: the model writes."""
    suite: str | None = None
    """A suite whose prompt and labels are used."""

    @property
    def columns(self) -> tuple[str, str, str]:
        """The columns of the answer, of what is known of it, and of why there is none."""
        name = self.answer_column
        lead = "" if name == "answer" else f"{name}_"
        is_labelled = bool(self.labels or self.suite)
        return name, f"{lead}{'probabilities' if is_labelled else 'stopped'}", f"{lead}skipped"


@dataclass(frozen=True)
class Predicted:
    """How many rows were answered by whom, how many answers ended by themselves, and where."""

    rows: int
    arm: str
    stopped: int | None
    """None for labels, and if an endpoint does not say it."""
    output: str
    skipped: int = 0


def run_predict(target: Loadable, settings: PredictSettings) -> Predicted:
    """Answer every row; the output appears whole at the end.

    Until then the answers are in a partial file beside it, each written when it is there, and the
    same command continues from them. A row is read as training reads it, without its answer. The
    output row is the input row with the columns of `settings.columns`.

    Raises:
        LlmtuneError: rows that cannot be asked (all of them by file and line), or an output that
            exists already.
    """
    rows, suite = _read(settings)
    _check_places(rows, settings)
    live = load_target(target, settings.arm)
    arm = settings.arm or live.arms[0]
    long = LongRows(settings.input_path, settings.too_long == "error")
    if suite is not None:
        return _predict(rows, Labeller(live, arm, rows, suite, long), settings)
    how = (settings.max_new_tokens, settings.temperature)
    return _predict(rows, Writer(live, arm, rows, how, long), settings)


def ask_server(url: str, model: str, key_env: str | None, settings: PredictSettings) -> Predicted:
    """Let an OpenAI-compatible endpoint answer every row, as `run_predict` does.

    Raises:
        LlmtuneError: as `run_predict`, or the endpoint cannot be asked.
    """
    config = EndpointConfig(url=url, model=model, key_env=key_env)
    if settings.temperature:
        extra = {"temperature": settings.temperature}
        config = config.model_copy(update={"extra": extra})
    endpoint = Endpoint("--server", config, names=("--server", "--api-key-env"))
    rows, _ = _read(settings)
    _check_places(rows, settings)
    is_strict = settings.too_long == "error"
    asker = Asker(endpoint, rows, settings.input_path, settings.max_new_tokens, is_strict)
    return _predict(rows, asker, settings)


def _read(settings: PredictSettings) -> tuple[list[PromptRow], Suite | None]:
    """Return the rows, and what asks them if they are labeled."""
    path = settings.input_path
    if settings.suite is None:
        rows = read_prompt_rows(path, settings.choice)
        return rows, label_prompts(settings.labels, rows, path) if settings.labels else None
    if replace(settings.choice, like=None) != PromptChoice():
        raise LlmtuneError("--suite: its prompt names the columns; take out --format and --columns")
    found = list(iter_prompt_file(path))
    problems = [each for each in found if isinstance(each, RowProblem)]
    if problems:
        raise prompts_error(problems)
    pairs = [each for each in found if not isinstance(each, RowProblem)]
    if not pairs:
        raise LlmtuneError(f"{path}: holds no rows; expected at least one")
    asked = []
    for line, row in pairs:
        try:
            prompt = prompt_like_training(row, settings.choice.like)
            asked.append((line, row if prompt is None else {**row, "prompt": prompt}))
        except RowError as error:
            problems.append(RowProblem(str(path), line, str(error), error.kind))
    if problems:
        raise prompts_error(problems)
    suite = label_rows(settings.suite, asked, path)
    return [PromptRow(line, row, Conversation("chat")) for line, row in pairs], suite


def _predict(rows: Sequence[PromptRow], answerer: Answerer, settings: PredictSettings) -> Predicted:
    """Write down what is answered, and at the end the output."""
    facts = dict(answerer.describe())
    asked = [facts["input"], [json_line(row.row) for row in rows]]
    header = {**facts, "input": hash_json(asked), "columns": list(settings.columns)}
    with partial_lines(settings.output_path, header) as partial:
        answers: dict[int, list[Any]] = {place: values for place, *values in partial.found}
        if answers:
            count = len(rows) - len(answerer.skipped)
            log.info("%d of %d answers are there already", len(answers), count)
        for place, values in answerer.answer(answers.keys()):
            partial.append([place, *values])
            answers[place] = values
        done = [
            {**row.row, **_added(settings, answers.get(place), answerer.skipped.get(place))}
            for place, row in enumerate(rows)
        ]
        atomic_write_text(settings.output_path, _render(done, settings))
        partial.remove()
    ended = [values[1] for values in answers.values()]
    stopped = sum(ended) if all(isinstance(each, bool) for each in ended) else None
    output = str(settings.output_path)
    return Predicted(len(rows), answerer.name, stopped, output, len(answerer.skipped))


def _check_places(rows: Sequence[PromptRow], settings: PredictSettings) -> None:
    """Refuse to replace a file, or a column of the input."""
    out, path = settings.output_path, settings.input_path
    if out.suffix.lower() in NOT_WRITTEN:
        raise LlmtuneError(
            f"{out}: {out.suffix} files are not written; end its name in .jsonl, .csv or .tsv"
        )
    if out.exists():
        raise LlmtuneError(f"{out}: exists already; remove it or choose a different output")
    if not out.absolute().parent.is_dir():
        raise LlmtuneError(f"{out}: its directory does not exist; make it first")
    problems = [
        RowProblem(
            str(path),
            row.line,
            f"has a column {column!r} already, which the answers would replace; name theirs with "
            "--answer-column",
        )
        for row in rows
        for column in settings.columns
        if column in row.row
    ]
    if problems:
        raise prompts_error(problems)


def _added(
    settings: PredictSettings, answer: Sequence[Any] | None, why: str | None
) -> dict[str, JsonValue]:
    """Return what is added to a row: its answer, or why there is none."""
    text, known, skipped = settings.columns
    if answer is None:
        return {text: None, known: None, skipped: why}
    return {text: answer[0], known: answer[1]}


def _render(rows: Sequence[Mapping[str, Any]], settings: PredictSettings) -> str:
    """Return the output: JSON lines, or a table in which each label has a column."""
    separator = TABLES.get(settings.output_path.suffix.lower())
    if separator is None:
        return "\n".join(map(json_line, rows)) + "\n"
    known = settings.columns[1]
    flat = []
    for row in rows:
        shares = row.get(known)
        if isinstance(shares, dict):
            row = {name: value for name, value in row.items() if name != known}
            row |= {f"{known}: {label}": share for label, share in shares.items()}
        flat.append({name: _to_cell(value) for name, value in row.items()})
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(text, columns, delimiter=separator, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _to_cell(value: Any) -> Any:
    """Return a value as a table holds it: texts and numbers as they are, what is nested as JSON."""
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else value
