"""What every dataset format is: the columns it reads, how it is recognized, and its conversion."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from llmtune.data.conversation import Conversation

if TYPE_CHECKING:
    from llmtune.data.config import SourceConfig

Row = Mapping[str, Any]

LABELS = frozenset({"label", "labels", "class", "category", "target", "intent", "sentiment"})
"""Columns that say what a text is an example of."""
TEXTS = ("text", "sentence", "utterance", "review", "content", "document", "body", "article")
"""What a column of texts is called, the likeliest first."""
SYSTEM = ("system", "system_prompt", "system_message")
"""What a column of system messages is called."""


class DatasetFormat(Protocol):
    """One dataset format. A new one is a file in this folder and an entry in `FORMATS`."""

    name: ClassVar[str]
    columns: ClassVar[dict[str, str]]
    """Every column it reads, with what it holds (for messages and the docs)."""
    required: ClassVar[tuple[str, ...]]
    aliases: ClassVar[dict[str, tuple[str, ...]]]
    """Column -> what files call it, the likeliest first; `llmtune init` guesses by these."""
    asked: ClassVar[tuple[str, ...]] = ()
    """The columns that a row without its answer needs, to be answered by a model; none: it has no
    such form."""
    has_plain_form: ClassVar[bool] = False
    """Whether its texts can also stand as they are, without the chat template."""

    takes_instruction: ClassVar[bool] = False
    """Whether a source can put an instruction before its prompts and names in place of numbers."""

    has_answers: ClassVar[bool] = True
    """Whether its rows hold answers; a row without one is a document, trained whole."""

    turn_columns: ClassVar[tuple[str, ...]] = ()
    """Columns that may hold a list of turns."""

    @classmethod
    def of(cls, source: "SourceConfig") -> Self:
        """Return the format as the source's other knobs ask for it."""
        return cls()

    def recognizes(self, row: Row) -> bool:
        """Say whether `row`, its columns already renamed, looks like this format."""
        ...

    def to_conversation(self, row: Row) -> Conversation:
        """Convert one row.

        Raises:
            RowError: what was found in the row and what was expected.
        """
        ...

    def to_prompt(self, row: Row) -> Conversation:
        """Convert what a row asks, read as `to_conversation` reads it; an answer is not looked at.

        Raises:
            RowError: what was found in the row and what was expected.
        """
        raise NotImplementedError

    @classmethod
    def label_advice(cls, column: str) -> str:
        """Say what to do with a column that is called like a label and is not read."""
        return (
            "it seems to say which rows are right. Set columns: "
            f"{{weight: {column}}} to train only rows where it is true"
        )


def row_weight(row: Row) -> Any:
    """Return a row's weight as it is there; 1 if it has none (an empty cell of a CSV).

    True and false, as in a column that marks right answers, count as 1 and 0.
    """
    weight = row.get("weight")
    if isinstance(weight, bool):
        return float(weight)
    return 1.0 if weight is None or weight == "" else weight
