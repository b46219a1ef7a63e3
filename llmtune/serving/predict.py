"""Answers to a file of prompts, in batches, in the order of the file."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.data.render import render_messages, render_question
from llmtune.errors import LlmtuneError
from llmtune.io.run_dir import atomic_write_text
from llmtune.models.config import Loadable
from llmtune.models.live import LiveModel
from llmtune.models.turns import require_chat_template
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.scoring.live import as_arm
from llmtune.serving.live import load_target

log = logging.getLogger("llmtune")

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class PredictSettings:
    """What to answer and how; `arm` None takes the target's first."""

    input_path: Path
    output_path: Path
    arm: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclass(frozen=True)
class Predicted:
    """How many rows were answered by whom, how many answers ended by themselves, and where."""

    rows: int
    arm: str
    stopped: int
    output: str


def run_predict(target: Loadable, settings: PredictSettings) -> Predicted:
    """Answer every row and write the output whole at the end.

    A row holds `messages` (a list), or `prompt` (text: one user message, or raw text for a model
    without a chat template). The output row is the input row with `answer` and `stopped`.

    Raises:
        LlmtuneError: rows that are not prompts (all of them by file and line), or an output that
            exists already.
    """
    rows = read_prompts(settings.input_path)
    if settings.output_path.exists():
        raise LlmtuneError(f"{settings.output_path}: exists already; remove it or choose another")
    if not settings.output_path.absolute().parent.is_dir():
        raise LlmtuneError(f"{settings.output_path}: its directory does not exist; make it first")
    live = load_target(target, settings.arm)
    arm = settings.arm or live.arms[0]
    prompts = [_render(live, row) for row in rows]
    decoding = Decoding(
        settings.max_new_tokens, live.stop_token_ids, temperature=settings.temperature
    )
    with as_arm(live, arm):
        generations = generate_texts(
            live.model,
            live.tokenizer,
            prompts,
            decoding,
            token_budget=choose_token_budget(live.model),
            on_progress=lambda done: log.info("%d of %d answered", done, len(rows)),
        )
    lines = [
        json.dumps({**row, "answer": each.text, "stopped": each.stopped}, ensure_ascii=False)
        for row, each in zip(rows, generations, strict=True)
    ]
    atomic_write_text(settings.output_path, "\n".join(lines) + "\n")
    stopped = sum(each.stopped for each in generations)
    return Predicted(len(rows), arm, stopped, str(settings.output_path))


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL of prompts, with or without a byte order mark.

    Raises:
        LlmtuneError: the file cannot be read or is empty, or rows are not prompts: each by file
            and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # U+2028 may be in a string
    except FileNotFoundError:
        raise LlmtuneError(f"{path}: no such file; expected a JSONL of prompts") from None
    except UnicodeDecodeError as error:
        raise LlmtuneError(f"{path}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise LlmtuneError(f"{path}: cannot be read: {error.strerror}") from None
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not JSON: {error.msg}")
            continue
        if problem := _problem(row):
            problems.append(f"{path}:{number}: {problem}")
        rows.append(row)
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        tail = [f"and {more} more rows"] if more > 0 else []
        raise LlmtuneError("\n".join(problems[:SHOWN_PROBLEMS] + tail))
    if not rows:
        raise LlmtuneError(f"{path}: holds no rows; expected one JSON object a line")
    return rows


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    messages = row.get("messages")
    if messages is not None:
        is_list = isinstance(messages, list) and bool(messages)
        if is_list and all(map(_is_message, messages)) and messages[-1]["role"] != "assistant":
            return None
        return (
            "`messages` must be a list of objects with role and content, the last not by the "
            "assistant"
        )
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return None
    return f"expected `prompt` (text) or `messages` (a list), found keys {sorted(row)}"


def _is_message(value: Any) -> bool:
    is_text = isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )
    return is_text and bool(value["role"])


def _render(live: LiveModel, row: dict[str, Any]) -> list[int]:
    tokenizer = live.tokenizer
    if row.get("messages") is not None:
        require_chat_template(tokenizer)
        return render_messages(tokenizer, row["messages"], add_generation_prompt=True)
    return render_question(tokenizer, row["prompt"])
