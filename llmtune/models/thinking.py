"""The block of thinking that a generation prompt may open or close before the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

CLOSINGS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought": "<channel|>",
    "<seed:think>": "</seed:think>",
}
"""What opens a block of thinking in published templates -> what closes it."""

_OPENING = "|".join(map(re.escape, CLOSINGS))
_CLOSING = "|".join(map(re.escape, CLOSINGS.values()))
THINKING = re.compile(f"{_OPENING}|{_CLOSING}")
_LAST = re.compile(rf"(?:({_OPENING})|({_CLOSING}))(\s*)\Z")
_BLOCK = re.compile(rf"\s*(?:(?:{_OPENING})\s*)?(?:{_CLOSING})\s*")
_WRITTEN = re.compile(rf"\s*({_OPENING})(.*?)({_CLOSING})(.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Thinking:
    """How a prompt leaves the block of thinking: `open`, `closed`, or there is `none`."""

    state: Literal["open", "closed", "none"]
    closing: str = ""
    """What closes an open block, with the spaces that go with those of its opening."""

    def without_block(self, body: str) -> str:
        """Return a turn's text without an empty block of thinking at its beginning."""
        block = _BLOCK.match(body)
        return body[block.end() :] if block else body

    def find_closing(self, body: str) -> int | None:
        """Return where the closing of an empty block at the beginning of a turn's text is."""
        block = _BLOCK.match(body)
        return re.compile(_CLOSING).search(body).start() if block else None  # type: ignore[union-attr]


def read_thinking(prompt: str) -> Thinking:
    """Return how `prompt`, which ends where generation begins, leaves the block of thinking."""
    last = _LAST.search(prompt)
    if last is None:
        return Thinking("none")
    opening, closed, spaces = last.groups()
    if closed:
        return Thinking("closed")
    closing = CLOSINGS[opening]
    return Thinking("open", f"\n{closing}\n\n" if "\n" in spaces else closing)


def split_thinking(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose content begins with a block of thinking with that block apart."""
    found = _WRITTEN.match(message["content"])
    if message.get("reasoning_content") or not found:
        return dict(message)
    return {
        **message,
        "reasoning_content": found.group(2).strip(),
        "content": found.group(4).strip(),
    }


def lead_behind(prompt: str, written: str) -> str:
    """Return what an answer follows behind `prompt` if the template itself writes `written`."""
    thinking = read_thinking(prompt)
    if thinking.state == "none":
        return written
    closing = thinking.find_closing(written)
    if thinking.state == "open" and closing is not None:
        return written[closing:]
    rest = thinking.without_block(written)
    return thinking.closing + rest if thinking.state == "open" else rest
