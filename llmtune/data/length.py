"""What happens to a sequence that is longer than `max_length`, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from llmtune.data.align import LabelledSequence
from llmtune.data.example import ExampleTable
from llmtune.data.masks import LabelledRow
from llmtune.data.problems import list_first
from llmtune.errors import LlmtuneError

MAX_LOST_RATIO = 0.01
LISTED_ROWS = 10
KEPT_ENDS = 16
"""Tokens kept at each end of a prompt text that is cut."""


@dataclass
class LengthCount:
    """Counts over all rows; filled while rows pass through `fit_row`."""

    lengths: Counter[int] = field(default_factory=Counter)
    """How many sequences have each length, before the rule."""
    rows: int = 0
    rows_too_long: int = 0
    rows_dropped: int = 0
    rows_truncated: int = 0
    rows_split: int = 0
    trained_tokens: int = 0
    trained_tokens_lost: int = 0
    longest: list[tuple[int, str]] = field(default_factory=list)
    """Length and place of the first rows that are too long."""

    def percentile(self, share: float) -> int:
        """Return the length that `share` (0..1) of the sequences do not exceed."""
        if not self.lengths:
            return 0
        lengths = np.array(sorted(self.lengths))
        ends = np.cumsum([self.lengths[length] for length in lengths.tolist()])
        return int(lengths[np.searchsorted(ends, np.ceil((ends[-1] - 1) * share), side="right")])


@dataclass(frozen=True)
class LengthRule:
    """What to do with a sequence over `max_length`; `special_ids` bound the runs of text."""

    max_length: int | None
    policy: str
    special_ids: Collection[int]


def fit_row(
    row: LabelledRow, place: str, count: LengthCount, rule: LengthRule, *, is_text: bool
) -> list[LabelledSequence]:
    """Return the row's sequences with the rule applied to those that are too long; count them."""
    kept: list[LabelledSequence] = []
    is_long = False
    count.rows += 1
    for sequence in row.sequences:
        length = len(sequence.input_ids)
        count.lengths[length] += 1
        count.trained_tokens += sequence.num_trained
        if rule.max_length is None or length <= rule.max_length:
            kept.append(sequence)
            continue
        if not is_long and len(count.longest) < LISTED_ROWS:
            count.longest.append((length, place))
        is_long = True
        fitted = _fit(sequence, rule.max_length, rule, is_text=is_text)
        if fitted is None:
            count.trained_tokens_lost += sequence.num_trained
        else:
            kept += fitted
            count.rows_split += len(fitted) > 1
            count.rows_truncated += len(fitted) == 1
    count.rows_too_long += is_long
    count.rows_dropped += is_long and not kept
    return kept


def refuse_loss(count: LengthCount, max_length: int | None, policy: str, name: str) -> None:
    """Stop where too much of the training signal would be lost to `max_length`.

    Raises:
        LlmtuneError: no row fits, or more than 1 % of the trained tokens would be lost with any
            policy but `drop` (what `truncate-prompt` and `split` can save is not lost). It names
            the lengths, the rows and the setting to change.
    """
    if max_length is None or not count.rows_too_long:
        return
    longest = [f"{place} ({length} tokens)" for length, place in count.longest]
    rows = "\n".join(list_first(longest, len(longest), count=count.rows_too_long, indent="  "))
    sizes = (
        f"lengths: p50 {count.percentile(0.5)}, p95 {count.percentile(0.95)}, "
        f"max {max(count.lengths)} tokens"
    )
    advice = (
        f"Set data.max_length={max(count.lengths)} to keep every row, or choose "
        "data.length_policy=drop or truncate-prompt (text rows: split)."
    )
    if count.trained_tokens_lost == count.trained_tokens:
        raise LlmtuneError(
            f"{name}: every row is longer than data.max_length={max_length}, so nothing is left "
            f"({sizes}).\n{rows}\n{advice}"
        )
    lost = count.trained_tokens_lost / count.trained_tokens
    if policy != "drop" and lost > MAX_LOST_RATIO:
        raise LlmtuneError(
            f"{name}: {count.rows_too_long} of {count.rows} rows are longer than "
            f"data.max_length={max_length}; leaving them out would lose {lost:.1%} of the trained "
            f"tokens, more than {MAX_LOST_RATIO:.0%} ({sizes}).\n{rows}\n{advice}"
        )


def refuse_positions(examples: ExampleTable, positions: int | None, name: str) -> None:
    """Stop where examples are longer than the model has positions for.

    Raises:
        LlmtuneError: it names the rows by file and line, and the settings to change.
    """
    found = find_beyond(examples, positions)
    if not found:
        return
    rows = [f"{source}:{line} ({length} tokens)" for source, line, length in found]
    rows = list_first(rows, LISTED_ROWS, indent="  ")
    raise LlmtuneError(
        "\n".join(
            [
                f"{name}: {len(found)} rows are longer than the model's {positions} positions "
                "(config.json); what it reads beyond them is noise, or an error:",
                *rows,
                f"Set data.max_length={positions} or less; data.length_policy says what becomes of "
                "longer rows.",
            ]
        )
    )


def find_beyond(examples: ExampleTable, positions: int | None) -> list[tuple[str, int, int]]:
    """Return file, line and length of each row whose longest example is beyond `positions`."""
    if positions is None:
        return []
    columns = examples.columns
    places = np.flatnonzero(columns["lengths"] > positions)
    longest: dict[tuple[str, int], int] = {}
    for place in places.tolist():
        row = examples.file_names[columns["files"][place]], int(columns["lines"][place])
        longest[row] = max(longest.get(row, 0), int(columns["lengths"][place]))
    return sorted((file, line, length) for (file, line), length in longest.items())


def _fit(
    sequence: LabelledSequence, max_length: int, rule: LengthRule, *, is_text: bool
) -> list[LabelledSequence] | None:
    if rule.policy == "split" and is_text:
        return _split(sequence, max_length)
    if rule.policy == "truncate-prompt" and not is_text:
        shorter = truncate_prompt(sequence, max_length, rule.special_ids)
        return None if shorter is None else [shorter]
    return None


def _split(sequence: LabelledSequence, max_length: int) -> list[LabelledSequence]:
    """Return pieces that hold every token; none is one token, behind which nothing is predicted."""
    length = len(sequence.input_ids)
    edges = [*range(0, length, max_length), length]
    if edges[-1] - edges[-2] == 1 and max_length > 2:
        edges[-2] -= 1
    pieces = []
    for start, end in pairwise(edges):
        ids = sequence.input_ids[start:end]
        pieces.append(LabelledSequence(ids, [(0, len(ids))], sequence.weight))
    return pieces


def truncate_prompt(
    sequence: LabelledSequence, max_length: int, special_ids: Collection[int]
) -> LabelledSequence | None:
    """Take the middle out of the longest untrained runs of text until the sequence fits.

    A run is between control tokens, so the turns keep their form, and both its ends stay
    (what was asked is at either end). None if that is not enough.
    """
    ids = sequence.input_ids
    excess = len(ids) - max_length
    removed: list[tuple[int, int]] = []
    for start, end in sorted(_prompt_runs(sequence, special_ids), key=lambda r: r[0] - r[1]):
        if excess <= 0:
            break
        cut = min(excess, end - start - 2 * KEPT_ENDS)
        if cut <= 0:
            continue
        middle = start + (end - start - cut) // 2
        removed.append((middle, middle + cut))
        excess -= cut
    if excess > 0:
        return None
    removed.sort()
    kept_ids: list[int] = []
    position = 0
    for start, end in [*removed, (len(ids), len(ids))]:
        kept_ids += ids[position:start]
        position = end

    def moved(edge: int) -> int:
        return edge - sum(end - start for start, end in removed if end <= edge)

    spans = [(moved(start), moved(end)) for start, end in sequence.spans]
    return LabelledSequence(kept_ids, spans, sequence.weight)


def _prompt_runs(
    sequence: LabelledSequence, special_ids: Collection[int]
) -> Sequence[tuple[int, int]]:
    """Return the untrained runs between control tokens."""
    trained = [False] * len(sequence.input_ids)
    for start, end in sequence.spans:
        trained[start:end] = [True] * (end - start)
    runs: list[tuple[int, int]] = []
    begin = 0
    for index, token in enumerate([*sequence.input_ids, None]):
        if token is None or trained[index] or token in special_ids:
            if index > begin:
                runs.append((begin, index))
            begin = index + 1
    return runs
