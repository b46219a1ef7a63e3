"""The texts of a run's rows without any template: what is compared with suites and general text."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmtune.data.collect import Split, choose_sources
from llmtune.data.config import DataConfig
from llmtune.data.conversation import Conversation
from llmtune.data.overlap import is_held_out
from llmtune.data.rows import LoadedRow, open_source

FRAME_SAMPLE = 200
MIN_OWN_WORDS = 5
"""Texts whose own words are fewer say too little to be called the same by them alone."""


@dataclass(frozen=True)
class RowTexts:
    """One row: where it is, and its texts.

    `passages` are its messages but the system's, or prompt and completion, or the document;
    `own` are the same without the words that every such passage of the source begins and ends
    with ("Sentence: ... Sentiment:").
    """

    place: str
    key: bytes
    source_index: int
    passages: tuple[str, ...]
    own: tuple[str, ...] = ()

    @property
    def content(self) -> str:
        """What the row says, as one text."""
        return "\n".join(self.passages)


@dataclass(frozen=True)
class Frame:
    """The words that every text of a set begins and ends with."""

    head: int
    tail: int

    def own_words(self, text: str) -> str:
        """Return the text's own words."""
        words = text.split()
        return " ".join(words[self.head : len(words) - self.tail])


def read_row_texts(config: DataConfig, split: Split) -> list[RowTexts]:
    """Read every usable row of a split once, in the order of the files.

    Rows that cannot be used are left out: `data check` and training name them.

    Raises:
        LlmtuneError: a source cannot be read at all.
    """
    found: list[RowTexts] = []
    sources, selections = choose_sources(config, split)
    for index, (source, selection) in enumerate(zip(sources, selections, strict=True)):
        rows = list(_iter_source(open_source(source).rows, index, selection, config))
        found += _without_frames(rows)
    return found


def iter_row_texts(config: DataConfig, split: Split) -> Iterator[RowTexts]:
    """Yield every usable row of a split as it is read, without looking for frames.

    Raises:
        LlmtuneError: a source cannot be read at all.
    """
    sources, selections = choose_sources(config, split)
    for index, (source, selection) in enumerate(zip(sources, selections, strict=True)):
        yield from _iter_source(open_source(source).rows, index, selection, config)


def find_frame(texts: Sequence[str]) -> Frame:
    """Return the leading and trailing words that all of `texts` share; none for fewer than two.

    At most 200 texts spread over all are looked at; a text that is nothing but the frame is no
    sign of one.
    """
    sample = [text.split() for text in texts[:: max(1, len(texts) // FRAME_SAMPLE)]]
    if len(sample) < 2:
        return Frame(0, 0)
    head = len(os.path.commonprefix(sample))
    tail = len(os.path.commonprefix([words[head:][::-1] for words in sample]))
    return Frame(head, tail) if min(map(len, sample)) > head + tail else Frame(0, 0)


def _iter_source(
    rows: Iterable[object], index: int, selection: str, config: DataConfig
) -> Iterator[RowTexts]:
    for row in rows:
        if not isinstance(row, LoadedRow):
            continue
        key = row.key
        if selection != "all":
            is_wanted = selection == "held-out"
            if is_held_out(key, config.evaluation_share) != is_wanted:
                continue
        passages = tuple(filter(str.strip, _passages(row.conversation)))
        yield RowTexts(f"{row.source}:{row.line}", key, index, passages)


def _passages(conversation: Conversation) -> list[str]:
    if conversation.kind == "chat":
        return [m["content"] for m in conversation.messages if m["role"] != "system"]
    return [conversation.prompt, conversation.text]


def _without_frames(rows: Sequence[RowTexts]) -> list[RowTexts]:
    """Fill in `own`: frames are looked for by a passage's place in its row."""
    columns = list(itertools.zip_longest(*(row.passages for row in rows)))
    frames = [find_frame([text for text in column if text is not None]) for column in columns]
    return [
        replace(row, own=tuple(f.own_words(t) for f, t in zip(frames, row.passages, strict=False)))
        for row in rows
    ]
