"""What a source holds beside its format's columns: metadata is named, the rest refused."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llmtune.data.config import SourceConfig
from llmtune.data.formats.base import LABELS, DatasetFormat, Row
from llmtune.data.training_marks import MARKS, looks_like_mark

MEDIA = frozenset({"image", "images", "audio", "audios", "video", "videos"})
PREFERENCES = frozenset({"chosen", "rejected", "chosen_response", "rejected_response"})
SPEAKERS = frozenset({"role", "from", "speaker", "author"})
CHOICES = frozenset(
    {"choices", "options", "endings", "candidates"}
    | {f"{stem}{mark}" for stem in ("option_", "option", "choice_") for mark in "abcde12345"}
    | {f"ending{mark}" for mark in "0123"}
)
"""What the choices of a question are called; single letters count where there are several."""
LETTERS = frozenset("abcde")
LIKELY = {
    "system": ("system_prompt", "system_message", "sys_prompt"),
    "tools": ("functions", "available_tools", "function_list", "apis"),
    "weight": ("loss_weight", "sample_weight", "row_weight"),
    "input": ("context", "passage"),
    "history": ("chat_history",),
}
"""A format's optional column -> what others call it."""

_LIKELY = {other: name for name, others in LIKELY.items() for other in others}
KNOWN_MESSAGE_KEYS = frozenset(
    {"role", "content", "from", "value", "name", "tool_calls", "tool_call_id"}
    | {"reasoning_content", "reasoning", "thinking"}
    | set(MARKS)
)


class UnreadColumns:
    """Says of each row whether a column that is not read could change what the row means."""

    def __init__(
        self, source: SourceConfig, format: DatasetFormat, *, is_prompt: bool = False
    ) -> None:
        """Look at whole rows, or (`is_prompt`) only at what changes what a row asks."""
        self._format = format
        self._is_prompt = is_prompt
        self._expected = frozenset(format.columns) | frozenset(source.ignore)
        self._source = source
        self._known: dict[tuple[str, ...], tuple[tuple[str, str], ...]] = {}

    def fault(self, row: Row) -> str | None:
        """Return why `row` (its columns renamed) may not be read so; None if it may."""
        shape = tuple(row)
        if shape not in self._known:
            self._known[shape] = tuple(self._suspicious(shape))
        for column, reason in self._known[shape]:
            if not is_empty(row[column]) and self._matters(column, row):
                return f"the column {column!r} is not read: {reason}"
        return None

    def _suspicious(self, columns: Collection[Any]) -> list[tuple[str, str]]:
        found = []
        for column in columns:
            if column in self._expected or not isinstance(column, str):
                continue
            reason = self._reason(column.lower())
            if reason is None and self._holds_choices(column, columns):
                reason = (
                    "it seems to hold the choices of the question. Write them into the question, "
                    "as the model is to be asked"
                )
            if reason is not None:
                ignore = f"--ignore {column}" if self._is_prompt else f"ignore: [{column}]"
                found.append((column, f"{reason}, or {ignore} to leave it out"))
        return found

    def _reason(self, column: str) -> str | None:
        """Say what a column seems to hold, and the setting that reads it; None for metadata."""
        if column in MEDIA:
            return "llmtune reads text alone. Take these rows out"
        if self._is_prompt:
            return self._reason_of_context(column)
        if column in PREFERENCES:
            return (
                "these are preference pairs, and llmtune trains on answers alone. Name the one to "
                "train on, as in columns: {completion: chosen}"
            )
        if column in LABELS:
            return self._format.label_advice(column)
        if column in SPEAKERS and not self._format.has_answers:
            return (
                "each row seems to be one message of a chat. Write a chat as one row with a list: "
                '{"messages": [{"role": ..., "content": ...}, ...]}'
            )
        if context := self._reason_of_context(column):
            return context
        if column in MARKS or looks_like_mark(column):
            return (
                "it may say what is trained. Write it into the messages, or set columns: "
                f"{{weight: {column}}}"
            )
        return None

    def _reason_of_context(self, column: str) -> str | None:
        likely = _LIKELY.get(column)
        if likely not in self._format.columns or likely in self._source.columns:
            return None
        seems = f"it seems to be what {self._format.name} calls {likely}"
        if self._is_prompt:
            return f"{seems}. Give --columns {likely}={column}"
        return f"{seems}. Set columns: {{{likely}: {column}}}"

    def _holds_choices(self, column: str, columns: Collection[Any]) -> bool:
        """Whether a column beside a question and its answer is what the question offers."""
        if self._is_prompt or not {"instruction", "prompt"} & set(self._format.columns):
            return False
        letters = LETTERS & {str(each).lower() for each in columns}
        return column.lower() in CHOICES or (column.lower() in letters and len(letters) > 1)

    def _matters(self, column: str, row: Row) -> bool:
        """A label beside a chat is metadata, unless it is a mark of right and wrong.

        So are choices that stand in the question.
        """
        value = row[column]
        if self._holds_choices(column, row):
            offered = value if isinstance(value, list | tuple) else [value]
            asked = {"instruction", "input", "prompt"} & set(self._format.columns)
            others = " ".join(str(row[key]) for key in sorted(asked) if key in row)
            return not all(str(each) in others for each in offered)
        if column.lower() in LABELS and self._format.has_answers:
            return isinstance(value, bool)
        return True


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or (isinstance(value, str | Mapping | Sequence) and len(value) == 0)


def unread_message_keys(rows: Sequence[Row], format: DatasetFormat) -> list[str]:
    """Return the keys of the messages in rows of a format that nothing reads, sorted."""
    keys = set()
    for row in rows:
        for column in format.turn_columns:
            turns = row.get(column)
            for turn in turns if isinstance(turns, list) else ():
                if isinstance(turn, Mapping):
                    keys |= {str(key) for key, value in turn.items() if not is_empty(value)}
    return sorted(keys - KNOWN_MESSAGE_KEYS)
