"""What every dataset format is: the columns it reads, how it is recognised, and its conversion."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from llmtune.data.conversation import Conversation

Row = Mapping[str, Any]


class DatasetFormat(Protocol):
    """One dataset format. A new one is a file in this folder and an entry in `FORMATS`."""

    name: ClassVar[str]
    columns: ClassVar[dict[str, str]]
    """Every column it reads, with what it holds (for messages and the docs)."""
    required: ClassVar[tuple[str, ...]]

    def recognises(self, row: Row) -> bool:
        """Say whether `row`, its columns already renamed, looks like this format."""
        ...

    def to_conversation(self, row: Row) -> Conversation:
        """Convert one row.

        Raises:
            RowError: what was found in the row and what was expected.
        """
        ...


def row_weight(row: Row) -> Any:
    """Return a row's weight as it stands there; 1 where it has none (an empty cell of a CSV).

    True and false, as in a column that marks right answers, count as 1 and 0.
    """
    weight = row.get("weight")
    if isinstance(weight, bool):
        return float(weight)
    return 1.0 if weight is None or weight == "" else weight
