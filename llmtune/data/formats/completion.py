"""The `completion` format: a prompt and the completion that is trained."""

from typing import ClassVar

from llmtune.data.conversation import Conversation, chat, check_text, read_messages, read_weight
from llmtune.data.formats.base import Row
from llmtune.data.problems import RowError


class CompletionFormat:
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

    def __init__(self, *, is_plain: bool = False) -> None:
        self.is_plain = is_plain

    def recognises(self, row: Row) -> bool:
        return "prompt" in row and "completion" in row

    def to_conversation(self, row: Row) -> Conversation:
        prompt, completion = row["prompt"], row["completion"]
        given = row.get("weight")
        weight = read_weight(1.0 if given in (None, "") else given)
        if isinstance(prompt, list):
            context = read_messages(prompt)
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            answer = read_messages(completion)
            return chat(
                context + answer, row.get("tools"), trained_from=len(context), weight=weight
            )
        prompt = check_text(prompt, "prompt")
        completion = check_text(completion, "completion")
        if not prompt.strip():
            raise RowError(
                "prompt is empty; expected text (rows without prompts: format: text)", "empty"
            )
        if not completion.strip():
            raise RowError("completion is empty; expected the text to train on", "empty")
        if self.is_plain:
            return Conversation(kind="plain", prompt=prompt, text=completion, weight=weight)
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        if row.get("system"):
            messages.insert(0, {"role": "system", "content": row["system"]})
        return chat(messages, row.get("tools"), trained_from=len(messages) - 1, weight=weight)
