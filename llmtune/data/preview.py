"""What the model will see: each token of a row, trained or not, for eyes and for scripts."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from string import Template
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.rule import Rule
from rich.text import Text

from llmtune.data.collect import Split, choose_sources, is_selected
from llmtune.data.config import DataConfig
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.masks import LabelledRow, Labeller
from llmtune.data.pieces import HALF_CHARACTER
from llmtune.data.problems import RowError, RowProblem
from llmtune.data.rows import LoadedRow, open_source
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAINED_STYLE = "bold black on green"
CONTEXT_STYLE = "dim"
LINE_BREAK = "⏎"
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]"
)


@dataclass(frozen=True)
class PreviewToken:
    """One token, or a few that only together are whole characters (then `ids` has several)."""

    text: str
    ids: tuple[int, ...]
    is_trained: bool


@dataclass(frozen=True)
class RowPreview:
    """One example of a row as it is trained on."""

    source: str
    line: int
    input_ids: list[int]
    labels: list[int]
    tokens: tuple[PreviewToken, ...]
    notes: tuple[str, ...]
    max_length: int | None

    @property
    def text(self) -> str:
        """Return the text of all tokens."""
        return "".join(token.text for token in self.tokens)

    @property
    def num_trained(self) -> int:
        """Return how many of the tokens are trained."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def title(self) -> str:
        """Where the row is and how much of it is trained, in one line."""
        length = len(self.input_ids)
        title = f"{self.source}:{self.line}: {length} tokens, {self.num_trained} trained"
        if self.max_length is not None and length > self.max_length:
            title += f" (longer than max_length {self.max_length})"
        return title

    def to_json(self) -> JsonObject:
        """Return what scripts read: `input_ids`, `labels`, `text`, `source`, `line`."""
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "text": self.text,
            "source": self.source,
            "line": self.line,
        }


def preview_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    split: Split = "train",
    row: int | None = None,
    limit: int = 3,
) -> list[RowPreview]:
    """Return the first `limit` rows' examples, or those of row number `row` (from 1) alone.

    Rows are counted over the split's sources, bad ones included; lengths are not cut.

    Raises:
        LlmtuneError: the row asked for, or every row, cannot be used (and why), or there are fewer
            rows.
    """
    labeller = Labeller(tokenizer, config.loss_on)
    previews: list[RowPreview] = []
    first_problem: RowProblem | None = None
    shown = number = 0
    for number, (found, is_chosen) in enumerate(_iter_rows(config, split), 1):
        if number != row if row is not None else not is_chosen:
            continue
        if not is_chosen:
            raise LlmtuneError(
                f"row {row} ({found.source}:{found.line}) is not in {split}: "
                f"data.evaluation_share={config.evaluation_share} puts it into the other split"
            )
        labelled = _label(labeller, found)
        if isinstance(labelled, RowProblem):
            if row is not None:
                raise LlmtuneError(f"row {row} cannot be used: {labelled}")
            first_problem = first_problem or labelled
            continue
        for sequence in labelled.sequences:
            labels = [IGNORE_INDEX] * len(sequence.input_ids)
            for start, end in sequence.spans:
                labels[start:end] = sequence.input_ids[start:end]
            previews.append(
                RowPreview(
                    source=found.source,
                    line=found.line,
                    input_ids=sequence.input_ids,
                    labels=labels,
                    tokens=tuple(split_tokens(tokenizer, sequence.input_ids, labels)),
                    notes=labelled.notes,
                    max_length=config.max_length,
                )
            )
        shown += 1
        if row is not None or shown >= limit:
            return previews
    if row is not None:
        raise LlmtuneError(f"there is no row {row} in {split}: it has {number} rows")
    if first_problem is not None and not previews:
        raise LlmtuneError(f"no row of {split} can be used; the first: {first_problem}")
    return previews


def _label(labeller: Labeller, row: LoadedRow | RowProblem) -> LabelledRow | RowProblem:
    if isinstance(row, RowProblem):
        return row
    (labelled,) = labeller.label([row.conversation])
    if isinstance(labelled, RowError):
        return RowProblem(row.source, row.line, str(labelled), labelled.kind)
    return labelled


def split_tokens(
    tokenizer: PreTrainedTokenizerFast, input_ids: list[int], labels: list[int]
) -> Iterator[PreviewToken]:
    """Yield the tokens with their text; tokens that share a character come as one.

    A token's text is what it adds to the text of the one before: decoded alone, a SentencePiece
    token loses the space that it begins with.
    """

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    start, before = 0, list[int]()
    for end in range(1, len(input_ids) + 1):
        ids = input_ids[start:end]
        known, both = decode(before), decode([*before, *ids])
        text = both.removeprefix(known) if both.startswith(known) else decode(ids)
        is_last = end == len(input_ids)
        # wait for the rest of the character
        if text.endswith(HALF_CHARACTER) and end - start < 8 and not is_last:
            continue
        yield PreviewToken(text, tuple(ids), labels[start] != IGNORE_INDEX)
        start, before = end, ids


def render_terminal(previews: Iterable[RowPreview]) -> Group:
    """Return the previews for the terminal: trained tokens on green, each line break shown."""
    parts: list[Any] = []
    for preview in previews:
        parts.append(Rule(Text(preview.title), align="left"))
        body = Text(overflow="fold")
        for token in preview.tokens:
            style = TRAINED_STYLE if token.is_trained else CONTEXT_STYLE
            text = show_hidden(token.text)
            shown = text.replace("\n", f"{LINE_BREAK}\n") if token.is_trained else text
            body.append(shown, style=style)
        parts.append(body)
        parts += [Text(f"note: {note}", style="yellow") for note in preview.notes]
    legend = Text.assemble(("trained", TRAINED_STYLE), " ", ("not trained", CONTEXT_STYLE))
    return Group(*parts, legend)


def show_hidden(text: str) -> str:
    """Return `text` with control and invisible characters made visible, line breaks and tabs kept.

    A row must not move the cursor or color the terminal it is shown in.
    """
    return HIDDEN.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    point = ord(found.group())
    return chr(0x2400 + point) if point < 0x20 else f"<U+{point:04X}>"


def render_page(previews: Iterable[RowPreview], *, title: str = "Training data") -> str:
    """Return a self-contained HTML page; hovering a token shows its ids."""
    rows = "\n".join(_row_html(preview) for preview in previews)
    return Template(PAGE).substitute(title=html.escape(title), rows=rows)


def _row_html(preview: RowPreview) -> str:
    spans = []
    for token in preview.tokens:
        shown = html.escape(show_hidden(token.text)).replace(
            "\n", f'<i class="br">{LINE_BREAK}</i>\n'
        )
        ids = " ".join(map(str, token.ids))
        state = "trained" if token.is_trained else "not trained"
        name = "t" if token.is_trained else "c"
        spans.append(f'<span class="{name}" title="{ids} ({state})">{shown}</span>')
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in preview.notes)
    return f"<h2>{html.escape(preview.title)}</h2>{notes}<pre>{''.join(spans)}</pre>"


def _iter_rows(config: DataConfig, split: Split) -> Iterator[tuple[LoadedRow | RowProblem, bool]]:
    """Yield every row of the split's sources, and whether it belongs to the split."""
    for source, selection in zip(*choose_sources(config, split), strict=True):
        for row in open_source(source).rows:
            yield row, isinstance(row, RowProblem) or is_selected(row, selection, config)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --quiet: #6b6b6b; --on: #b7e4c1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eaeaea; --paper: #161616; --quiet: #9a9a9a; --on: #1f5c30; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: 2rem 0 .5rem; font-weight: 600 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--quiet);
  border-radius: 6px; padding: .8rem; line-height: 1.7 }
.t { background: var(--on); border-radius: 3px } .c { color: var(--quiet) }
.t, .c { border-right: 1px dotted transparent } span:hover { outline: 1px solid var(--ink) }
.br { font-style: normal; opacity: .5 }
</style></head><body>
<h1>$title</h1>
<p><span class="t">trained</span> <span class="c">not trained</span>; hover over a token for its
id.</p>
$rows
</body></html>
"""
