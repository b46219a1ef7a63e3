"""Train rows found again among the suites' items: such an item measures memory, not the task."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from llmtune.evaluation.diagnosis.base import (
    Diagnosis,
    Diagnostic,
    Extent,
    Given,
    Leak,
    Planned,
)
from llmtune.evaluation.diagnosis.contamination_search import (
    AskedItem,
    Passage,
    find_exact,
    find_near,
    find_ngrams,
    normalize,
    text_of,
)
from llmtune.evaluation.diagnosis.shown import (
    Block,
    Cell,
    Facts,
    Paragraph,
    Section,
    Table,
)
from llmtune.evaluation.tasks.base import Suite, SuiteItem
from llmtune.io.fingerprint import hash_json

if TYPE_CHECKING:
    from llmtune.data.config import DataConfig
    from llmtune.evaluation.diagnosis.rows import RowTexts

KEPT_EXAMPLES = 20
SHOWN_EXAMPLES = 10


@dataclass(frozen=True)
class ContaminatedItem:
    """A suite item that is in the train rows; `kind` is the strongest sign found.

    `similarity` is the Jaccard index of a near-duplicate; `shared` the words of a shared n-gram.
    """

    item_id: str
    kind: str
    train_row: str
    similarity: float | None = None
    shared: str | None = None


@dataclass(frozen=True)
class SuiteContamination:
    """Items of one suite found in the train rows.

    An item counts once: exact, else near, else ngram; `item_ids` are all of them.
    """

    exact: int
    ngram: int
    near: int
    n: int
    item_ids: tuple[str, ...]
    found: tuple[ContaminatedItem, ...] = ()

    @property
    def exact_share(self) -> float:
        """Return the share of items found word for word."""
        return self.exact / self.n

    @property
    def share(self) -> float:
        """Return the share of items found in any way."""
        return len(self.item_ids) / self.n


@dataclass(frozen=True, kw_only=True)
class ContaminationResult(Diagnostic):
    """Train rows found among the suites' items."""

    FILE_NAME: ClassVar[str] = "contamination.json"
    suites: dict[str, SuiteContamination]
    n_train_rows: int


class Contamination(Diagnosis[ContaminationResult]):
    """Train rows among the suites' items; no model is asked."""

    name = "contamination"
    what = "contamination"
    help = "Train rows among the suites' items"
    guards = "items are among the training rows"
    extent: ClassVar[Extent] = "quick"
    number_names = ("contamination",)
    result = ContaminationResult

    def plan(self, given: Given) -> Planned[ContaminationResult]:
        """Plan to look for every suite item among the train rows."""
        from llmtune.evaluation.diagnosis.rows import read_row_texts

        return plan_contamination(read_row_texts(given.data, "train"), given.suites)

    def foresee(self, data: DataConfig, suites: Sequence[Suite]) -> list[str]:
        """Say which items of the suites are word for word in the training rows."""
        from llmtune.evaluation.diagnosis.rows import iter_row_texts

        if not suites:
            return []
        sizes = {suite.name: len(suite.items) for suite in suites}
        warnings = []
        for name, leaked in find_leaked(iter_row_texts(data, "train"), suites).items():
            item, place = next(iter(leaked.items()))
            warnings.append(
                f"suite {name}: {len(leaked)} of its {sizes[name]} items are word for word in "
                f"the training rows (first: item {item!r} in {place}); its score will show memory. "
                "Take them out of one of the two before training"
            )
        return warnings

    def section(self, found: ContaminationResult, facts: Facts) -> Section | None:
        """Show the suites' items that are in the training rows."""
        write = facts.write
        head = ["Suite", "Items", "Word for word", "Nearly", "Shared words"]
        note = (
            f"Compared with {write.count(found.n_train_rows)} training rows. More than "
            f"{write.share(facts.contaminated_share)} of a target suite's items in any of "
            "these ways block the verdict."
        )
        if facts.clean:
            head += ["Before: all → others", "After: all → others", "Change on others"]
            note += " Others: the items that are not among the training rows in any of these ways."
        rows = []
        for name, suite in found.suites.items():
            row: list[str | Cell] = [name]
            row += map(write.count, (suite.n, suite.exact, suite.near, suite.ngram))
            if clean := facts.clean.get(name):
                row += [clean.before, clean.after, Cell(clean.change, clean.interval)]
            elif facts.clean:
                row += ["–"] * 3
            rows.append(tuple(row))
        blocks: list[Block] = [Table(tuple(rows), tuple(head)), Paragraph(note, is_note=True)]
        for name, suite in found.suites.items():
            if suite.found:
                shown = tuple(map(_shown_item, suite.found[:SHOWN_EXAMPLES]))
                summary = f"{name}: {write.count(len(suite.found))} items"
                blocks.append(Table(shown, summary=summary, is_narrow=True))
        return Section("Did the test leak into the training?", tuple(blocks))

    def leaks(self, found: ContaminationResult) -> dict[str, Leak]:
        """Return the items that are among the training rows in any of the three ways."""
        return {
            name: Leak(
                item_ids=suite.item_ids,
                n=suite.n,
                ways=f"{suite.exact} word for word, {suite.near} nearly, {suite.ngram} with many "
                "words in a row",
                numbers={"exact": suite.exact, "near": suite.near, "ngram": suite.ngram},
            )
            for name, suite in found.suites.items()
        }

    def numbers(self, found: ContaminationResult) -> dict[str, float | None]:
        """Return the largest share of a suite's items that was found word for word."""
        shares = [suite.exact_share for suite in found.suites.values()]
        return {"contamination": max(shares, default=None)}


def _shown_item(item: ContaminatedItem) -> tuple[str, str]:
    shared = f": {item.shared}" if item.shared else ""
    return item.item_id, f"{item.kind}, {item.train_row}{shared}"


def measure_contamination(rows: Sequence[RowTexts], suites: Sequence[Suite]) -> ContaminationResult:
    """Look for every suite item among the train rows.

    An item is `exact` if its text equals a train passage (case, spaces and Unicode forms
    aside), with or without the frame that all items (all rows of a source) share, as long as five
    words are left; `near` where MinHash finds a Jaccard index of 9-byte shingles of at least 0.8;
    `ngram` where 13 words in a row of it (8 for items of 8 to 12 words) stand in a train row.
    Shorter items can only be exact or near. The answer is not compared.

    Args:
        rows: of the train split, as `read_row_texts` gives them.
    """
    started = time.perf_counter()
    passages = [
        Passage(number, text, own)
        for number, row in enumerate(rows)
        for text, own in zip(row.passages, row.own, strict=True)
    ]
    asked = [
        AskedItem(suite.name, item, own) for suite in suites for item, own in _own_texts(suite)
    ]
    own = [each.own for each in asked]
    exact = find_exact(asked, passages)
    near = find_near(own, passages)
    shared = find_ngrams(own, passages, len(rows))
    found: dict[str, list[ContaminatedItem]] = {suite.name: [] for suite in suites}
    for place, each in enumerate(asked):
        if place in exact:
            kind, row, similarity, words = "exact", exact[place], None, None
        elif place in near:
            (row, similarity), kind, words = near[place], "near", None
        elif place in shared:
            (row, words), kind, similarity = shared[place], "ngram", None
        else:
            continue
        entry = ContaminatedItem(each.item.id, kind, rows[row].place, similarity, words)
        found[each.suite].append(entry)
    return ContaminationResult(
        inputs=contamination_inputs(rows, suites),
        seconds=time.perf_counter() - started,
        suites={suite.name: _count(found[suite.name], len(suite.items)) for suite in suites},
        n_train_rows=len(rows),
    )


def plan_contamination(
    rows: Sequence[RowTexts], suites: Sequence[Suite]
) -> Planned[ContaminationResult]:
    """Plan to look for every suite item among the train rows; no model is needed."""
    return Planned(
        ContaminationResult,
        contamination_inputs(rows, suites),
        0,
        partial(measure_contamination, rows, suites),
    )


def find_leaked(rows: Iterable[RowTexts], suites: Sequence[Suite]) -> dict[str, dict[str, str]]:
    """Return by suite which items are word for word a passage of a row, and the first such row.

    What can be said before training, row by row as they are read; `measure_contamination` also
    looks behind frames and for what is nearly the same.
    """
    asked: dict[str, list[tuple[str, str]]] = {}
    for suite in suites:
        for item in suite.items:
            asked.setdefault(normalize(text_of(item)), []).append((suite.name, item.id))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        for passage in row.passages:
            for name, item_id in asked.get(normalize(passage), ()):
                found.setdefault(name, {}).setdefault(item_id, row.place)
    return found


def contamination_inputs(rows: Sequence[RowTexts], suites: Sequence[Suite]) -> dict[str, str]:
    """Return what the result depends on."""
    return {
        "rows": hash_json(sorted(row.key.hex() for row in rows)),
        "items": hash_json({suite.name: suite.items_fingerprint for suite in suites}),
    }


def _own_texts(suite: Suite) -> Iterable[tuple[SuiteItem, str]]:
    from llmtune.evaluation.diagnosis.rows import find_frame

    frame = find_frame([text_of(item) for item in suite.items])
    return ((item, frame.own_words(text_of(item))) for item in suite.items)


def _count(found: Sequence[ContaminatedItem], n: int) -> SuiteContamination:
    kinds = Counter(each.kind for each in found)
    return SuiteContamination(
        exact=kinds["exact"],
        ngram=kinds["ngram"],
        near=kinds["near"],
        n=n,
        item_ids=tuple(each.item_id for each in found),
        found=tuple(found[:KEPT_EXAMPLES]),
    )
