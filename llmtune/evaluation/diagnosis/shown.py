"""What a report shows of a diagnosis, as plain data, and what a section may say beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol


class Writer(Protocol):
    """How a report writes numbers."""

    def count(self, value: float | None) -> str:
        """Write a whole number."""

    def nats(self, value: float | None) -> str:
        """Write a loss."""

    def share(self, value: float | None) -> str:
        """Write a share as percent."""

    def p(self, value: float | None) -> str:
        """Write a p-value."""

    def number(self, value: float | None, digits: int = 4) -> str:
        """Write any number."""


@dataclass(frozen=True)
class CleanScore:
    """A suite's scores without the items that were found among the rows, as text."""

    before: str
    after: str
    change: str
    interval: str


@dataclass(frozen=True)
class Facts:
    """What a section may say beside its own numbers: facts of the rest of the report.

    `clean` are suites compared without leaked items; `contaminated_share` is the share of such
    items that blocks a verdict; `example_stops` counts the shown answers, and how many ended by
    themselves under base and tuned.
    """

    write: Writer
    clean: Mapping[str, CleanScore]
    contaminated_share: float
    example_stops: tuple[int, int, int]


@dataclass(frozen=True)
class Paragraph:
    """One or more sentences; a note is set smaller."""

    text: str
    is_note: bool = False
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Cell:
    """A table's cell with an addition that is set back."""

    text: str
    quiet: str


@dataclass(frozen=True)
class Table:
    """Rows of text; with a `summary` the table is folded away under it."""

    rows: tuple[tuple[str | Cell, ...], ...]
    head: tuple[str, ...] = ()
    summary: str = ""
    has_row_names: bool = True
    is_narrow: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Plot:
    """Points over a number of rows, a fitted line, and forecasts as (x, y, low, high)."""

    name: str
    label: str
    caption: str
    axes: tuple[str, str]
    points: tuple[tuple[float, float], ...]
    line: tuple[tuple[float, float], ...] = ()
    forecasts: tuple[tuple[float, float, float, float], ...] = ()
    kind: ClassVar[str] = "plot"


Block = Paragraph | Table | Plot


@dataclass(frozen=True)
class Section:
    """What a report shows of a diagnosis, as plain data."""

    title: str
    blocks: tuple[Block, ...]
