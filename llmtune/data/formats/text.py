"""The `text` format: documents for continued pretraining, every token trained."""

from typing import ClassVar

from llmtune.data.conversation import Conversation
from llmtune.data.formats.base import TEXTS, DatasetFormat, Row, row_weight
from llmtune.data.formats.completion import CompletionFormat
from llmtune.data.problems import RowError
from llmtune.data.row_values import check_text, read_weight


class TextFormat(DatasetFormat):
    """`{"text": ...}`: no template; the tokenizer's own start and end of text are added."""

    name: ClassVar[str] = "text"
    columns: ClassVar[dict[str, str]] = {
        "text": "one document",
        "weight": "what the row's loss is multiplied by",
    }
    required: ClassVar[tuple[str, ...]] = ("text",)
    asked: ClassVar[tuple[str, ...]] = ("text",)
    aliases: ClassVar[dict[str, tuple[str, ...]]] = {"text": (*TEXTS, "passage")}
    has_answers: ClassVar[bool] = False

    @classmethod
    def label_advice(cls, column: str) -> str:
        """A text with its label is a question with its answer."""
        return (
            "the rows seem to be labeled texts. Train the label as the answer with format: "
            f"{CompletionFormat.name} and columns: {{prompt: text, completion: {column}}}"
        )

    def recognizes(self, row: Row) -> bool:
        """Say whether a row has a text."""
        return isinstance(row.get("text"), str)

    def to_conversation(self, row: Row) -> Conversation:
        """Return the text as a document that is trained whole."""
        return Conversation(kind="text", text=_read(row), weight=read_weight(row_weight(row)))

    def to_prompt(self, row: Row) -> Conversation:
        """Return the text as the beginning of a document."""
        return Conversation(kind="plain", prompt=_read(row))


def _read(row: Row) -> str:
    text = check_text(row["text"], "text")
    if not text or text.isspace():
        raise RowError("text is empty; expected a document", "empty")
    return text
