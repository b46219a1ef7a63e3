"""One pass over a split's sources: read, check, render, mask and fit; count everything."""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmtune.data.align import LabelledSequence
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.example import ExampleTable, ExampleTableBuilder
from llmtune.data.length import LengthCount, LengthRule, fit_row
from llmtune.data.masks import LabelledRow, Labeller, PendingRows
from llmtune.data.overlap import is_held_out
from llmtune.data.problems import RowError, RowProblem
from llmtune.data.report import MAX_KEPT_PROBLEMS, DataReport, SourceReport
from llmtune.data.rows import LoadedRow, open_source
from llmtune.io.progress import ProgressBar, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 1 << 22
"""A chunk of long documents has fewer rows, so that memory does not grow with their length."""
SCANNED_TOKENS = 1 << 22
CHUNKS_AHEAD = 2
"""Chunks that are being tokenized while the next one is read and rendered."""
MAX_COLLECTED_PROBLEMS = 100_000

Split = Literal["train", "evaluation"]
RowObserver = Callable[[LoadedRow, Sequence[LabelledSequence]], None]


@dataclass(frozen=True)
class SharedRow:
    """A row that is in both splits."""

    place: str
    other: str


def choose_sources(config: DataConfig, split: Split) -> tuple[list[SourceConfig], list[str]]:
    """Return the sources of a split, and which rows of each: all, the kept or the held-out ones."""
    has_share = config.evaluation_share > 0
    if split == "train":
        # Replay rows are never held out, but one of them may say what a held-out row says.
        return list(config.train), ["kept" if has_share else "all"] * len(config.train)
    held_out = [source for source in config.train if has_share and not source.replay]
    kinds = ["all"] * len(config.evaluation) + ["held-out"] * len(held_out)
    return [*config.evaluation, *held_out], kinds


def is_selected(row: LoadedRow, selection: str, config: DataConfig) -> bool:
    """Say whether a row is one of those that `choose_sources` takes of its source."""
    if selection == "all":
        return True
    held_out = is_held_out(row.key, config.evaluation_share)
    return held_out == (selection == "held-out")


def read_evaluation_keys(config: DataConfig) -> dict[bytes, str]:
    """Return the key and place of every row of the evaluation sources."""
    keys: dict[bytes, str] = {}
    for source in config.evaluation:
        for row in open_source(source).rows:
            if isinstance(row, LoadedRow):
                keys.setdefault(row.key, f"{row.source}:{row.line}")
    return keys


@dataclass
class SplitCollector:
    """What accumulates while the sources of one split are read. Nothing is refused here."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerFast
    split: Split
    other_keys: Mapping[bytes, str] = field(default_factory=dict)
    """Rows of the other split, with their places."""
    observe: RowObserver | None = None
    """Sees every usable row with its sequences, before the length rule."""
    problems: list[RowProblem] = field(default_factory=list, init=False)
    num_bad: int = field(default=0, init=False)
    shared: list[SharedRow] = field(default_factory=list, init=False)
    count: LengthCount = field(default_factory=LengthCount, init=False)

    def __post_init__(self) -> None:
        self.labeller = Labeller(self.tokenizer, self.config.loss_on)
        self.sources, self._selections = choose_sources(self.config, self.split)
        self._stop_rows = 0
        self._notes: Counter[str] = Counter()
        self._tallies: list[Counter[str]] = []
        self._formats: list[str] = []

    @property
    def rows_read(self) -> int:
        """Return the rows read so far, from all sources."""
        return sum(tally["read"] for tally in self._tallies)

    def read(self, directory: Path | None = None) -> ExampleTable:
        """Read every source of the split and return its examples in the order of the files.

        Their tokens are written to `directory`, or to files without a name.
        """
        self._builder = ExampleTableBuilder(directory)
        rule = LengthRule(
            self.config.max_length, self.config.length_policy, self.labeller.added_ids
        )
        with _no_full_collections(), progress_bar(f"{self.split} data", unit="rows") as bar:
            for index, selection in enumerate(self._selections):
                self._read_source(index, selection, rule, bar)
        return self._builder.build()

    def _read_source(self, index: int, selection: str, rule: LengthRule, bar: ProgressBar) -> None:
        opened = open_source(self.sources[index])
        self._formats.append(opened.format.reason)
        tally: Counter[str] = Counter()
        self._tallies.append(tally)
        waiting: deque[tuple[list[LoadedRow | RowProblem], PendingRows]] = deque()
        for chunk in iter_chunks(opened.rows):
            tally["read"] += len(chunk)
            chosen = [row for row in chunk if self._is_chosen(row, selection, tally)]
            rows = [row.conversation for row in chosen if isinstance(row, LoadedRow)]
            waiting.append((chosen, self.labeller.start(rows)))
            if len(waiting) > CHUNKS_AHEAD:
                self._add_rows(*waiting.popleft(), index, rule)
            gc.collect(1)
            bar.advance(len(chunk))
        for started in waiting:
            self._add_rows(*started, index, rule)

    def _add_rows(
        self,
        rows: list[LoadedRow | RowProblem],
        pending: PendingRows,
        index: int,
        rule: LengthRule,
    ) -> None:
        labelled = iter(self.labeller.finish(pending))
        for row in rows:
            if isinstance(row, RowProblem):
                self._add_problem(row, index)
                continue
            result = next(labelled)
            if isinstance(result, RowError):
                problem = RowProblem(row.source, row.line, str(result), result.kind)
                self._add_problem(problem, index)
            else:
                self._add_row(row, result, index, rule)

    def _is_chosen(self, row: LoadedRow | RowProblem, selection: str, tally: Counter[str]) -> bool:
        if isinstance(row, RowProblem) or (selection == "all" and not self.other_keys):
            return True
        if not is_selected(row, selection, self.config):
            tally["held-out"] += 1
            return False
        if self.other_keys and row.key in self.other_keys:
            self.shared.append(SharedRow(f"{row.source}:{row.line}", self.other_keys[row.key]))
        return True

    def _add_problem(self, problem: RowProblem, index: int) -> None:
        self._tallies[index]["bad"] += 1
        self.num_bad += 1
        if len(self.problems) < MAX_COLLECTED_PROBLEMS:
            self.problems.append(problem)

    def _add_row(self, row: LoadedRow, labelled: LabelledRow, index: int, rule: LengthRule) -> None:
        if self.observe is not None:
            self.observe(row, labelled.sequences)
        place = f"{row.source}:{row.line}"
        is_text = row.conversation.kind == "text"
        sequences = fit_row(labelled, place, self.count, rule, is_text=is_text)
        self._notes.update(set(labelled.notes))
        tally = self._tallies[index]
        for sequence in sequences:
            self._builder.add(
                sequence.input_ids,
                sequence.spans,
                origin=(row.source, row.line),
                weight=sequence.weight,
                source_index=index,
            )
            tally["examples"] += 1
            tally["trained"] += sequence.num_trained
        tally["kept"] += bool(sequences)
        self._stop_rows += any(_trains_stop(one, self.labeller.stop_ids) for one in sequences)

    def report(self, mixed: ExampleTable, taken: Sequence[tuple[int, float]]) -> DataReport:
        """Return the counts.

        `mixed` is what an epoch holds, `taken` what each source gives to it and would give
        without a repeat limit.
        """
        sources = tuple(
            SourceReport(
                path=source.path,
                format=decided,
                rows_read=tally["read"],
                rows_bad=tally["bad"],
                rows_held_out=tally["held-out"],
                rows_kept=tally["kept"],
                examples=tally["examples"],
                examples_per_epoch=epoch[0],
                wanted_per_epoch=epoch[1],
                trained_tokens=tally["trained"],
            )
            for source, decided, tally, epoch in zip(
                self.sources, self._formats, self._tallies, taken, strict=True
            )
        )
        count, rows_kept = self.count, sum(tally["kept"] for tally in self._tallies)
        return DataReport(
            split=self.split,
            sources=sources,
            num_examples=len(mixed),
            num_tokens=mixed.num_tokens,
            num_trained_tokens=mixed.num_trained,
            max_length=self.config.max_length,
            length_p50=count.percentile(0.5),
            length_p95=count.percentile(0.95),
            length_max=max(count.lengths, default=0),
            rows_too_long=count.rows_too_long,
            rows_dropped_for_length=count.rows_dropped,
            rows_truncated=count.rows_truncated,
            rows_split=count.rows_split,
            trained_tokens_lost=count.trained_tokens_lost,
            stop_row_ratio=self._stop_rows / rows_kept if rows_kept else 1.0,
            num_bad_rows=self.num_bad,
            bad_rows=tuple(self.problems[:MAX_KEPT_PROBLEMS]),
            notes=tuple(sorted(self._notes.items())),
        )


def _trains_stop(sequence: LabelledSequence, stop_ids: frozenset[int]) -> bool:
    ids = sequence.input_ids
    return any(
        ids[end - 1] in stop_ids or not stop_ids.isdisjoint(ids[start:end])
        for start, end in sequence.spans
    )


def stop_row_ratio(table: ExampleTable, stop_ids: frozenset[int]) -> float:
    """Return the share of rows with an example whose trained tokens hold one of `stop_ids`."""
    tokens, trained = table.stored.tokens, table.stored.trained
    found = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(tokens), SCANNED_TOKENS):
        place = slice(start, start + SCANNED_TOKENS)
        found.append(
            np.flatnonzero(trained[place] & np.isin(tokens[place], list(stop_ids))) + start
        )
    places = np.concatenate(found)
    starts, ends = table.columns["starts"], table.columns["starts"] + table.columns["lengths"]
    stops = np.searchsorted(places, ends) > np.searchsorted(places, starts)
    keys = table.columns["files"].astype(np.int64) << 40 | table.columns["lines"]
    _, row_of = np.unique(keys, return_inverse=True)
    has_stop = np.zeros(row_of.max() + 1, dtype=bool)
    np.logical_or.at(has_stop, row_of, stops)
    return float(has_stop.mean())


def iter_chunks(rows: Iterator[LoadedRow | RowProblem]) -> Iterator[list[LoadedRow | RowProblem]]:
    """Yield the rows in lists of at most 512, of long documents fewer."""
    chunk: list[LoadedRow | RowProblem] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.conversation.num_characters if isinstance(row, LoadedRow) else 0
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def _no_full_collections() -> Iterator[None]:
    """Keep the garbage collector from walking everything that is imported, again and again.

    Rows are millions of small objects, which it takes as a reason to look at all of them: a
    quarter of the time. New objects are still collected, chunk by chunk.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
