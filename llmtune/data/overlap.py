"""Rows that train and evaluation share, and the split by hash that keeps them apart."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator

from llmtune.data.conversation import Conversation

HELD_OUT_SALT = "llmtune-held-out-1"
PIECE_CHARACTERS = 1 << 18
_CUT = re.compile(r"[ \n\t](?=[A-Za-z0-9])")
_RAISED = re.compile(
    "([\u00aa\u00b2\u00b3\u00b9\u00ba\u00bc-\u00be\u02b0-\u02b8\u02e0-\u02e4"
    "\u1d2c-\u1d6a\u1d78\u1d9b-\u1dbf\u2070-\u209c\u2150-\u215f\u2189\u2c7c\u2c7d])"
)
"""Raised and lowered signs and fractions: NFKC would make 2² the same as 22."""


def normalized_text(conversation: Conversation) -> str:
    """Return what a row says, so that case, spaces and Unicode forms make no difference.

    A chat's tools are part of it: with other tools the same question has a different answer.
    """
    parts = [conversation.prompt, conversation.text]
    for message in conversation.messages:
        parts.append(f"{message['role']} {message['content']}")
        parts += [str(call["function"]) for call in message.get("tool_calls", [])]
    parts += tool_texts(conversation)
    return one_spaced("\n".join(part for part in parts if part), _compatible)


def one_spaced(text: str, change: Callable[[str], str] = str) -> str:
    """Return a text in lower case with one space between words, each piece of it changed before.

    A long text is taken in pieces: its words as a list take ten times its memory.
    """
    if len(text) <= PIECE_CHARACTERS:
        return " ".join(change(text).casefold().split())
    pieces = (" ".join(change(piece).casefold().split()) for piece in _pieces(text))
    return " ".join(piece for piece in pieces if piece)


def _pieces(text: str) -> Iterator[str]:
    """Cut between a space and an ASCII letter or digit, which no Unicode form joins."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        found = _CUT.search(text, start + PIECE_CHARACTERS)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def _compatible(text: str) -> str:
    if text.isascii():
        return text
    pieces = _RAISED.split(text)
    pieces[::2] = [unicodedata.normalize("NFKC", piece) for piece in pieces[::2]]
    return "".join(pieces)


def tool_texts(conversation: Conversation) -> list[str]:
    """Return each tool's schema as text, the order of its keys aside."""
    tools = [tool.get("function", tool) for tool in conversation.tools or []]
    return [json.dumps(tool, sort_keys=True, ensure_ascii=False) for tool in tools]


def conversation_key(conversation: Conversation) -> bytes:
    """Return 16 bytes that two rows share exactly when their normalized texts are equal."""
    return hashlib.blake2b(normalized_text(conversation).encode(), digest_size=16).digest()


def is_held_out(key: bytes, share: float) -> bool:
    """Say whether the row with this key belongs to the evaluation share (0..1).

    A row's place depends on its own text alone: adding rows moves none, and equal rows stay
    together.
    """
    return held_out_draw(key) < share


def held_out_draw(key: bytes) -> float:
    """Return the number in 0..1 that a row with this key has drawn; a smaller share holds it."""
    drawn = hashlib.blake2b(key, digest_size=8, key=HELD_OUT_SALT.encode()).digest()
    return int.from_bytes(drawn, "big") / 2.0**64
