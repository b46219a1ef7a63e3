"""Items of one suite that are the same, or nearly: they are one observation, so one cluster."""

from collections.abc import Sequence
from dataclasses import replace

from llmtune.data.duplicates import find_near_duplicates
from llmtune.evaluation.diagnosis.rows import find_frame
from llmtune.evaluation.tasks.base import SuiteItem


def group_copies(items: Sequence[SuiteItem]) -> tuple[SuiteItem, ...]:
    """Return the items, with copies of each other in one cluster; unchanged if there are none.

    Copies have the same question (and choices) but for case and spaces, or nearly the same words
    outside the frame that all items share (Jaccard index of 9-byte pieces of 0.8 or more). Clusters
    that the suite declares are joined if a copy links them.
    """
    texts = [" ".join((item.prompt or item.text).split()).casefold() for item in items]
    asked = [(text, item.choices) for text, item in zip(texts, items, strict=True)]
    frame = find_frame(texts)
    groups = _Groups(len(items))
    first: dict[object, int] = {}
    for place, item in enumerate(items):
        groups.join(place, first.setdefault(asked[place], place))
        if item.cluster is not None:
            groups.join(place, first.setdefault(item.cluster, place))
    declared = len({item.cluster or item.id for item in items})
    for pair in find_near_duplicates([frame.own_words(text) for text in texts]):
        if items[pair.first].choices == items[pair.second].choices:
            groups.join(pair.first, pair.second)
    if groups.count == declared:
        return tuple(items)
    return tuple(
        replace(item, cluster=_name_of(items[groups.find(place)]))
        for place, item in enumerate(items)
    )


def _name_of(item: SuiteItem) -> str:
    return item.id if item.cluster is None else item.cluster


class _Groups:
    """Disjoint sets of places, each called by its smallest."""

    def __init__(self, count: int) -> None:
        self.parents = list(range(count))
        self.count = count

    def find(self, place: int) -> int:
        """Return the smallest place of a place's set."""
        while self.parents[place] != place:
            self.parents[place] = self.parents[self.parents[place]]
            place = self.parents[place]
        return place

    def join(self, one: int, other: int) -> None:
        """Make one set of two."""
        first, second = sorted((self.find(one), self.find(other)))
        if first != second:
            self.parents[second] = first
            self.count -= 1
