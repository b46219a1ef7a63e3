"""The `instruction` format (alpaca): an instruction, an optional input, and the output."""

from typing import Any, ClassVar

from llmtune.data.conversation import Conversation, ask, chat, put_system_first
from llmtune.data.formats.base import SYSTEM, DatasetFormat, Row, row_weight
from llmtune.data.problems import RowError, shorten
from llmtune.data.row_values import check_text, parse_json_text, write_answer


class InstructionFormat(DatasetFormat):
    """`{"instruction": ..., "input": ..., "output": ...}`, rendered as one user turn.

    The input follows the instruction, after an empty line. Where the instruction is empty, the
    input is the question.
    """

    name: ClassVar[str] = "instruction"
    columns: ClassVar[dict[str, str]] = {
        "instruction": "what to do",
        "input": "what to do it on",
        "output": "the answer that is trained",
        "system": "the system message",
        "history": "earlier turns, a list of [question, answer] pairs; context only",
        "tools": "a list of tool schemas",
        "weight": "what the row's loss is multiplied by",
    }
    required: ClassVar[tuple[str, ...]] = ("instruction", "output")
    asked: ClassVar[tuple[str, ...]] = ("instruction",)
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "instruction": ("instruction", "question", "query", "problem", "user", "task", "input"),
        "output": (
            *("output", "answer", "response", "reply", "solution", "assistant", "target"),
            "completion",
        ),
        "input": ("input", "context"),
        "system": SYSTEM,
    }

    def recognizes(self, row: Row) -> bool:
        """Say whether a row has an instruction and an output."""
        return "instruction" in row and "output" in row

    def to_conversation(self, row: Row) -> Conversation:
        """Return the instruction, with its input and history, and the output as a chat."""
        messages = _read_question(row)
        output = write_answer(row["output"], "output")
        if not output.strip():
            raise RowError("output is empty; expected the answer to train on", "empty")
        answered = [*messages, {"role": "assistant", "content": output}]
        context = len(messages) - 1
        return chat(answered, row.get("tools"), trained_from=context, weight=row_weight(row))

    def to_prompt(self, row: Row) -> Conversation:
        """Return the instruction, with its input and history, as a chat that waits."""
        return ask(_read_question(row), row.get("tools"))


def _read_question(row: Row) -> list[Any]:
    question = check_text(row["instruction"], "instruction")
    extra = row.get("input")
    if extra is not None and check_text(extra, "input").strip():
        question = f"{question}\n\n{extra}" if question.strip() else extra
    if not question.strip():
        raise RowError("instruction is empty, and so is input; expected text", "empty")
    messages = put_system_first([], row.get("system"))
    for pair in _read_history(row.get("history")):
        messages += [
            {"role": "user", "content": pair[0]},
            {"role": "assistant", "content": pair[1]},
        ]
    return [*messages, {"role": "user", "content": question}]


def _read_history(value: Any) -> list[Any]:
    history = parse_json_text(value, "history")
    if history is None or history == "":
        return []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    )
    if not pairs:
        raise RowError(f"history is {shorten(history)}; expected [question, answer] pairs")
    return list(history)
