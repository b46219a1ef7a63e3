"""The `completion` format: a prompt and the completion that is trained."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmtune.data.conversation import Conversation, ask, chat, put_system_first, read_messages
from llmtune.data.formats.base import LABELS, SYSTEM, TEXTS, DatasetFormat, Row, row_weight
from llmtune.data.problems import RowError, shorten
from llmtune.data.row_values import check_text, parse_json_text, read_weight, write_answer

if TYPE_CHECKING:
    from llmtune.data.config import SourceConfig


class CompletionFormat(DatasetFormat):
    """`{"prompt": ..., "completion": ...}`: two texts, or two lists of messages.

    Two texts become one user and one assistant turn, or with `render: plain` stay as they are.
    """

    name: ClassVar[str] = "completion"
    columns: ClassVar[dict[str, str]] = {
        "prompt": "the text (or messages) before",
        "completion": "the text (or messages) that is trained",
        "system": "the system message",
        "tools": "a list of tool schemas",
        "weight": "what the row's loss is multiplied by",
    }
    required: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    asked: ClassVar[tuple[str, ...]] = ("prompt",)
    turn_columns: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {
        "prompt": ("prompt", *TEXTS),
        "completion": ("completion", "response", "target", "output", *sorted(LABELS)),
        "system": SYSTEM,
    }
    has_plain_form: ClassVar[bool] = True
    takes_instruction: ClassVar[bool] = True

    def __init__(
        self, *, is_plain: bool = False, instruction: str = "", labels: Sequence[str] = ()
    ) -> None:
        self.is_plain = is_plain
        self.instruction = instruction
        self.labels = labels

    @classmethod
    def of(cls, source: "SourceConfig") -> Self:
        """Return the format: two turns of a chat, or two texts as they are."""
        return cls(
            is_plain=source.render == "plain",
            instruction=source.instruction or "",
            labels=source.labels,
        )

    def recognizes(self, row: Row) -> bool:
        """Say whether a row has a prompt and a completion."""
        return "prompt" in row and "completion" in row

    def to_conversation(self, row: Row) -> Conversation:
        """Return the prompt and completion as a chat, or as plain text."""
        prompt = self._read_prompt(row)
        completion = _read_side(self._name_label(row["completion"]))
        weight = read_weight(row_weight(row))
        if self.is_plain:
            _refuse_chat_columns(row, prompt, completion)
        if isinstance(prompt, list):
            context = read_messages(put_system_first(prompt, row.get("system")))
            if not _are_turns(completion):
                completion = write_answer(completion, "completion")
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            answer = read_messages(completion)
            return chat(
                context + answer, row.get("tools"), trained_from=len(context), weight=weight
            )
        prompt = _require_prompt(prompt)
        completion = write_answer(completion, "completion")
        if not completion.strip():
            raise RowError("completion is empty; expected the text to train on", "empty")
        if self.is_plain:
            text = f" {completion}" if self.instruction else completion
            return Conversation(kind="plain", prompt=prompt, text=text, weight=weight)
        messages = put_system_first(
            [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": completion},
            ],
            row.get("system"),
        )
        return chat(messages, row.get("tools"), trained_from=len(messages) - 1, weight=weight)

    def to_prompt(self, row: Row) -> Conversation:
        """Return the prompt as a chat that waits for an answer."""
        prompt = self._read_prompt(row)
        if not isinstance(prompt, list):
            prompt = [{"role": "user", "content": _require_prompt(prompt)}]
        return ask(put_system_first(prompt, row.get("system")), row.get("tools"))

    def _read_prompt(self, row: Row) -> Any:
        """Return the prompt behind the source's instruction, unless it begins with it already."""
        prompt = _read_side(row["prompt"])
        if not self.instruction:
            return prompt
        if isinstance(prompt, list):
            raise RowError("prompt is messages; instruction is for prompts that are text")
        asked = _require_prompt(prompt)
        if not asked.startswith(f"{self.instruction}\n\n"):
            asked = f"{self.instruction}\n\n{asked}"
        return f"{asked}\nAnswer:" if self.is_plain and not asked.endswith("\nAnswer:") else asked

    def _name_label(self, value: Any) -> Any:
        """Return the name of a whole-number label."""
        if not self.labels:
            return value
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if isinstance(number, bool) or not isinstance(number, int):
            raise RowError(
                f"completion is {shorten(value)}; expected a number, as labels has names"
            )
        if not 0 <= number < len(self.labels):
            raise RowError(
                f"completion is {number}; labels names 0 to {len(self.labels) - 1} only", "label"
            )
        return self.labels[number]


def _require_prompt(value: Any) -> str:
    prompt = check_text(value, "prompt")
    if not prompt.strip():
        raise RowError(
            "prompt is empty; expected text (rows without prompts: format: text)", "empty"
        )
    return prompt


def _read_side(value: Any) -> Any:
    """Return messages where the text is a JSON list of them, as CSV cells hold it."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and '"role"' in value:
        with contextlib.suppress(RowError):
            parsed = parse_json_text(value, "prompt")
            if _are_turns(parsed):
                return parsed
    return value


def _are_turns(value: Any) -> bool:
    """Say whether a value is a list of messages; any other list is an answer in JSON."""
    if not isinstance(value, list):
        return False
    return not value or all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def _refuse_chat_columns(row: Row, prompt: Any, completion: Any) -> None:
    used = [name for name in ("system", "tools") if row.get(name)]
    if used:
        raise RowError(
            f"render: plain has no place for the column {used[0]}; leave it out, or use "
            "render: chat"
        )
    if isinstance(prompt, list) or _are_turns(completion):
        raise RowError("render: plain joins two texts; found messages, which need render: chat")
