"""What preparing the data did, counted: for the terminal, the manifest and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from llmtune.data.problems import RowProblem, list_first
from llmtune.io.fingerprint import JsonObject

MAX_KEPT_PROBLEMS = 1000


@dataclass(frozen=True)
class SourceReport:
    """One source's rows."""

    path: str
    format: str
    """The format, and how it was decided."""
    rows_read: int
    rows_bad: int
    rows_held_out: int
    rows_kept: int
    examples: int
    examples_per_epoch: int
    """After weights, temperature, repeat limit and replay share."""
    wanted_per_epoch: float
    """The same before the repeat limit."""
    trained_tokens: int


@dataclass(frozen=True)
class DataReport:
    """Every count of one split. Token counts are of one epoch as it is trained."""

    split: str
    sources: tuple[SourceReport, ...]
    num_examples: int
    num_tokens: int
    num_trained_tokens: int
    max_length: int | None
    length_p50: int
    length_p95: int
    length_max: int
    rows_too_long: int
    rows_dropped_for_length: int
    rows_truncated: int
    rows_split: int
    trained_tokens_lost: int
    stop_row_ratio: float
    """Share of the kept rows (not cut into pieces) that train a token which ends generation."""
    num_bad_rows: int
    bad_rows: tuple[RowProblem, ...]
    """The first of the rows left out with `on_bad_row: drop`."""
    notes: tuple[tuple[str, int], ...]
    """What had to be done for some rows, and for how many."""

    @property
    def rows_read(self) -> int:
        """Return the rows read from all sources."""
        return sum(source.rows_read for source in self.sources)

    @property
    def rows_kept(self) -> int:
        """Return the rows kept from all sources."""
        return sum(source.rows_kept for source in self.sources)

    def to_json(self) -> JsonObject:
        """Return the report as JSON values."""
        return asdict(self) | {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "bad_rows": [asdict(problem) for problem in self.bad_rows],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataReport:
        """Read what `to_json` wrote."""
        known = {field.name: value[field.name] for field in fields(cls)}
        return cls(
            **known
            | {
                "sources": tuple(SourceReport(**source) for source in value["sources"]),
                "bad_rows": tuple(RowProblem(**problem) for problem in value["bad_rows"]),
                "notes": tuple((note, count) for note, count in value["notes"]),
            }
        )

    def lines(self) -> list[str]:
        """Return the report as lines for the terminal."""
        return list(self._iter_lines())

    def _iter_lines(self) -> Iterator[str]:
        for source in self.sources:
            yield f"{self.split}: {source.path}: {source.format}"
            parts = [f"{source.rows_read:,} rows read", f"{source.rows_kept:,} kept"]
            parts += [f"{source.rows_bad:,} bad"] if source.rows_bad else []
            if source.rows_held_out:
                parts.append(f"{source.rows_held_out:,} in the other split")
            parts.append(f"{source.examples:,} examples")
            if source.examples_per_epoch != source.examples:
                parts.append(f"{source.examples_per_epoch:,} in an epoch")
            if source.examples_per_epoch < int(source.wanted_per_epoch):
                parts.append(f"{source.wanted_per_epoch:,.0f} wanted (mixture.max_repeats)")
            yield "  " + ", ".join(parts)
        if not self.sources:
            return
        limit = "no limit" if self.max_length is None else f"limit {self.max_length:,}"
        yield (
            f"  lengths p50 {self.length_p50:,}, p95 {self.length_p95:,}, max "
            f"{self.length_max:,} tokens ({limit})"
        )
        share = self.num_trained_tokens / max(self.num_tokens, 1)
        yield (
            f"  {self.num_examples:,} examples, {self.num_tokens:,} tokens, "
            f"{self.num_trained_tokens:,} trained ({share:.1%}); rows that train a stop token: "
            f"{self.stop_row_ratio:.1%}"
        )
        if self.rows_too_long:
            yield (
                f"  {self.rows_too_long:,} rows too long: {self.rows_dropped_for_length:,} left "
                f"out, {self.rows_truncated:,} prompts cut, {self.rows_split:,} split; "
                f"{self.trained_tokens_lost:,} trained tokens lost"
            )
        for note, count in self.notes:
            yield f"  {count:,} rows: {note}"
        left_out = [f"left out: {problem}" for problem in self.bad_rows]
        yield from list_first(left_out, count=self.num_bad_rows, indent="  ")
