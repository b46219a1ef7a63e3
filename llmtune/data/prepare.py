"""From the config's sources to tokenized examples with exact masks, in one pass."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.example import ExampleTable, ExampleTableBuilder
from llmtune.data.length import LengthCount, LengthRule, fit_row, refuse_loss
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.mixture import hash_order, mix_order, share_sources
from llmtune.data.overlap import conversation_key, is_held_out
from llmtune.data.problems import LISTED_PROBLEMS, RowError, RowProblem, bad_rows_error
from llmtune.data.report import MAX_KEPT_PROBLEMS, DataReport, SourceReport
from llmtune.data.rows import LoadedRow, open_source
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_ROWS = 512

Split = Literal["train", "evaluation"]


@dataclass(frozen=True)
class PreparedData:
    """One split, ready for training."""

    examples: ExampleTable
    """Train: in the order of the seed. Evaluation: in the order of the files."""
    source_names: tuple[str, ...]
    report: DataReport
    fingerprint: str
    """SHA-256 over every token, mask, weight and their order."""
    order_hash: str


def prepare_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, split: Split, seed: int
) -> PreparedData:
    """Read, check, render, mask, fit, mix and order one split of the data.

    With `split="evaluation"` and no evaluation source nor share, the result is empty.

    Raises:
        LlmtuneError: bad rows (the first ten are named), too much lost to `max_length`, a row
            that train and evaluation share, no row left, or a tokenizer that cannot serve.
    """
    sources, selections = choose_sources(config, split)
    pass_ = _Pass(config, Labeller(tokenizer, config.loss_on), _evaluation_keys(config, split))
    for index, (source, selection) in enumerate(zip(sources, selections, strict=True)):
        pass_.read_source(index, source, selection)
    pass_.refuse_problems(split)
    table = pass_.builder.build()
    if sources and not len(table):
        raise LlmtuneError(f"{split}: no row is left to use; see what was left out and why")
    if split == "train":
        available = _count_sources(table, len(sources))
        shares = share_sources(sources, available, config.mixture)
        order = mix_order(table.source_indices, shares, seed)
        taken = [(share.taken, share.wanted) for share in shares]
    else:
        order = np.arange(len(table), dtype=np.int64)
        taken = [(count, float(count)) for count in _count_sources(table, len(sources))]
    mixed = table.take(order)
    order_hash = hash_order(order)
    return PreparedData(
        examples=mixed,
        source_names=tuple(source.path for source in sources),
        report=pass_.report(split, sources, mixed, taken),
        fingerprint=fingerprint_table(mixed),
        order_hash=order_hash,
    )


def choose_sources(config: DataConfig, split: Split) -> tuple[list[SourceConfig], list[str]]:
    """Return the sources of a split, and which rows of each: all, the kept or the held-out ones."""
    has_share = config.evaluation_share > 0
    if split == "train":
        kinds = ["kept" if has_share and not s.replay else "all" for s in config.train]
        return list(config.train), kinds
    held_out = [source for source in config.train if has_share and not source.replay]
    kinds = ["all"] * len(config.evaluation) + ["held-out"] * len(held_out)
    return [*config.evaluation, *held_out], kinds


def fingerprint_table(table: ExampleTable) -> str:
    """Return the SHA-256 over a table's tokens, masks, lengths and weights, in order."""
    digest = hashlib.sha256()
    for name, dtype in (
        ("tokens", "<i4"),
        ("trained", "u1"),
        ("offsets", "<i8"),
        ("weights", "<f4"),
    ):
        digest.update(np.ascontiguousarray(table.arrays[name], dtype=dtype).tobytes())
    return digest.hexdigest()


@dataclass
class _Pass:
    """What accumulates while the sources of one split are read."""

    config: DataConfig
    labeller: Labeller
    other_keys: dict[bytes, str]
    """Rows of the other split, with their places."""
    builder: ExampleTableBuilder = field(default_factory=ExampleTableBuilder)
    count: LengthCount = field(default_factory=LengthCount)
    problems: list[RowProblem] = field(default_factory=list)
    num_bad: int = 0
    shared: list[str] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    tallies: list[Counter] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)

    @property
    def rule(self) -> LengthRule:
        return LengthRule(
            self.config.max_length, self.config.length_policy, self.labeller.added_ids
        )

    def read_source(self, index: int, source: SourceConfig, selection: str) -> None:
        opened = open_source(source)
        self.formats.append(opened.format.reason)
        tally: Counter = Counter()
        self.tallies.append(tally)
        for chunk in _chunks(opened.rows):
            tally["read"] += len(chunk)
            rows = []
            for row in chunk:
                if isinstance(row, RowProblem):
                    self._add_problem(row, tally)
                elif self._is_chosen(row, selection, tally):
                    rows.append(row)
            labelled = self.labeller.label([row.conversation for row in rows])
            for row, result in zip(rows, labelled, strict=True):
                if isinstance(result, RowError):
                    problem = RowProblem(row.source, row.line, str(result), result.kind)
                    self._add_problem(problem, tally)
                else:
                    self._add_row(row, result, index, tally)

    def _is_chosen(self, row: LoadedRow, selection: str, tally: Counter) -> bool:
        if selection == "all" and not self.other_keys:
            return True
        key = conversation_key(row.conversation)
        if selection != "all":
            held_out = is_held_out(key, self.config.evaluation_share)
            if held_out != (selection == "held-out"):
                tally["held-out"] += 1
                return False
        if key in self.other_keys:
            self.shared.append(f"{row.source}:{row.line} is {self.other_keys[key]}")
        return True

    def _add_problem(self, problem: RowProblem, tally: Counter) -> None:
        tally["bad"] += 1
        self.num_bad += 1
        if len(self.problems) < MAX_KEPT_PROBLEMS:
            self.problems.append(problem)

    def _add_row(self, row: LoadedRow, labelled: LabelledRow, index: int, tally: Counter) -> None:
        sequences = fit_row(
            labelled,
            f"{row.source}:{row.line}",
            self.count,
            self.rule,
            is_text=row.conversation.kind == "text",
        )
        self.notes.update(set(labelled.notes))
        for sequence in sequences:
            self.builder.add(
                sequence.input_ids,
                sequence.spans,
                origin=(row.source, row.line),
                weight=sequence.weight,
                source_index=index,
            )
            tally["examples"] += 1
            tally["trained"] += sequence.num_trained
        tally["kept"] += bool(sequences)

    def refuse_problems(self, split: str) -> None:
        if self.num_bad and self.config.on_bad_row == "error":
            read = sum(tally["read"] for tally in self.tallies)
            raise bad_rows_error(self.problems, self.num_bad, read)
        if self.shared:
            listed = "\n".join(f"  {place}" for place in self.shared[:LISTED_PROBLEMS])
            more = len(self.shared) - LISTED_PROBLEMS
            listed += f"\n  ... and {more} more" if more > 0 else ""
            raise LlmtuneError(
                f"{len(self.shared)} train rows are also in the evaluation data (case and spaces "
                f"aside), so its loss would not be held out:\n{listed}\n"
                "Take them out of one of the two, or use data.evaluation_share."
            )
        refuse_loss(self.count, self.config.max_length, self.config.length_policy, split)

    def report(
        self,
        split: str,
        sources: list[SourceConfig],
        mixed: ExampleTable,
        taken: list[tuple[int, float]],
    ) -> DataReport:
        reports = tuple(
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
                sources, self.formats, self.tallies, taken, strict=True
            )
        )
        count = self.count
        return DataReport(
            split=split,
            sources=reports,
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
            stop_row_ratio=stop_row_ratio(mixed, self.labeller.stop_ids),
            num_bad_rows=self.num_bad,
            bad_rows=tuple(self.problems),
            notes=tuple(sorted(self.notes.items())),
        )


def stop_row_ratio(table: ExampleTable, stop_ids: frozenset[int]) -> float:
    """Return the share of rows with an example whose trained tokens hold one of `stop_ids`."""
    if not len(table):
        return 1.0
    stops = table.arrays["trained"] & np.isin(table.arrays["tokens"], list(stop_ids))
    counts = np.add.reduceat(stops, table.arrays["offsets"][:-1])
    rows = np.stack([table.arrays["files"], table.arrays["lines"]])
    _, row_of = np.unique(rows, axis=1, return_inverse=True)
    has_stop = np.zeros(row_of.max() + 1, dtype=bool)
    np.logical_or.at(has_stop, row_of.ravel(), counts > 0)
    return float(has_stop.mean())


def _evaluation_keys(config: DataConfig, split: Split) -> dict[bytes, str]:
    """Return the keys of the evaluation sources' rows, for train to be held against."""
    if split != "train":
        return {}
    keys: dict[bytes, str] = {}
    for source in config.evaluation:
        for row in open_source(source).rows:
            if isinstance(row, LoadedRow):
                keys.setdefault(conversation_key(row.conversation), f"{row.source}:{row.line}")
    return keys


def _count_sources(table: ExampleTable, count: int) -> list[int]:
    return [int((table.source_indices == index).sum()) for index in range(count)]


def _chunks(rows: Iterator) -> Iterator[list]:
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk
