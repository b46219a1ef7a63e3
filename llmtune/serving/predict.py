"""Answers to a file of prompts, written as they come, in the order of the file at the end."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmtune.data.conversation import SURROGATES
from llmtune.data.problems import RowProblem
from llmtune.data.prompts import (
    PromptChoice,
    PromptRow,
    encode_questions,
    prompts_error,
    read_prompt_rows,
)
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_json
from llmtune.io.partial_lines import PartialLines, partial_lines
from llmtune.io.run_dir import atomic_write_text
from llmtune.models.live import LiveModel
from llmtune.models.resolve import Loadable
from llmtune.scoring.batches import choose_token_budget, position_limit
from llmtune.scoring.generate import Decoding, iter_texts
from llmtune.scoring.live import as_arm, load_target

log = logging.getLogger("llmtune")


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

    @property
    def columns(self) -> tuple[str, str, str]:
        """The columns of the answer, whether it ended by itself, and why there is none."""
        name = self.answer_column
        lead = "" if name == "answer" else f"{name}_"
        return name, f"{lead}stopped", f"{lead}skipped"


@dataclass(frozen=True)
class Predicted:
    """How many rows were answered by whom, how many answers ended by themselves, and where."""

    rows: int
    arm: str
    stopped: int
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
    rows = read_prompt_rows(settings.input_path, settings.choice)
    _check_places(rows, settings)
    live = load_target(target, settings.arm)
    arm = settings.arm or live.arms[0]
    source = str(settings.input_path)
    prompts = encode_questions(live.tokenizer, [(source, row.line, row.question) for row in rows])
    skipped = _find_long(live, rows, prompts, settings)
    asked = {place: ids for place, ids in enumerate(prompts) if place not in skipped}
    header = {
        "input": hash_json([prompts, [_to_line(row.row) for row in rows]]),
        "model": live.identity_as(arm).as_dict(),
        "length or temperature": [settings.max_new_tokens, settings.temperature],
        "columns": list(settings.columns),
    }
    with partial_lines(settings.output_path, header) as partial:
        answers = {place: (text, stopped) for place, text, stopped in partial.found}
        if answers:
            log.info("%d of %d answers are there already", len(answers), len(asked))
        with as_arm(live, arm):
            _answer(live, asked, answers, settings, partial)
        lines = [
            _to_line({**row.row, **_added(settings, answers.get(place), skipped.get(place))})
            for place, row in enumerate(rows)
        ]
        atomic_write_text(settings.output_path, "\n".join(lines) + "\n")
        partial.remove()
    stopped = sum(ended for _, ended in answers.values())
    return Predicted(len(rows), arm, stopped, str(settings.output_path), len(skipped))


def _check_places(rows: Sequence[PromptRow], settings: PredictSettings) -> None:
    """Refuse to replace a file, or a column of the input."""
    out, path = settings.output_path, settings.input_path
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


def _find_long(
    live: LiveModel,
    rows: Sequence[PromptRow],
    prompts: Sequence[Sequence[int]],
    settings: PredictSettings,
) -> dict[int, str]:
    """Return the places of the rows that no answer fits behind, with why.

    Raises:
        LlmtuneError: there are some, and they are not to be skipped.
    """
    limit = position_limit(live.model)
    if limit is None:
        return {}
    long = {
        place: f"takes {len(ids):,} tokens, and the model has {limit:,} positions"
        for place, ids in enumerate(prompts)
        if len(ids) >= limit
    }
    problems = [
        RowProblem(
            str(settings.input_path),
            rows[place].line,
            f"{why}; shorten it, or give --too-long skip to leave such rows unanswered",
        )
        for place, why in long.items()
    ]
    if problems and settings.too_long == "error":
        raise prompts_error(problems)
    for place, why in long.items():
        log.warning("%s:%d: skipped: %s", settings.input_path, rows[place].line, why)
    return long


def _answer(
    live: LiveModel,
    asked: Mapping[int, Sequence[int]],
    answers: dict[int, tuple[str, bool]],
    settings: PredictSettings,
    partial: PartialLines,
) -> None:
    """Write the answers that are missing, each as it ends."""
    places = list(asked)
    written = iter_texts(
        live.model,
        live.tokenizer,
        list(asked.values()),
        Decoding(settings.max_new_tokens, live.stop_token_ids, temperature=settings.temperature),
        token_budget=choose_token_budget(live.model),
        done={index for index, place in enumerate(places) if place in answers},
    )
    for index, answer, is_batch_end in written:
        place = places[index]
        if place not in answers:
            partial.append([place, answer.text, answer.stopped])
            answers[place] = (answer.text, answer.stopped)
        if is_batch_end:
            log.info("%d of %d answered", len(answers), len(places))


def _added(
    settings: PredictSettings, answer: tuple[str, bool] | None, why: str | None
) -> dict[str, str | bool | None]:
    """Return what is added to a row: its answer, or why there is none."""
    text, stopped, skipped = settings.columns
    if answer is None:
        return {text: None, stopped: None, skipped: why}
    return {text: answer[0], stopped: answer[1]}


def _to_line(row: Mapping[str, Any]) -> str:
    """Return a row as JSON; half of a character pair, which UTF-8 cannot hold, stays escaped."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    return json.dumps(row, default=str) if SURROGATES.search(line) else line
