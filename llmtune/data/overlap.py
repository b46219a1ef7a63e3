"""Rows that train and evaluation share, and the split by hash that keeps them apart."""

from __future__ import annotations

import hashlib
import unicodedata

from llmtune.data.conversation import Conversation

HELD_OUT_SALT = "llmtune-held-out-1"


def normalized_text(conversation: Conversation) -> str:
    """Return what a row says, so that case, spaces and Unicode forms make no difference."""
    parts = [conversation.prompt, conversation.text]
    for message in conversation.messages:
        parts.append(f"{message['role']} {message['content']}")
        parts += [str(call["function"]) for call in message.get("tool_calls", [])]
    text = unicodedata.normalize("NFKC", "\n".join(parts)).casefold()
    return " ".join(text.split())


def conversation_key(conversation: Conversation) -> bytes:
    """Return 16 bytes that two rows share exactly when their normalized texts are equal."""
    return hashlib.blake2b(normalized_text(conversation).encode(), digest_size=16).digest()


def is_held_out(key: bytes, share: float) -> bool:
    """Say whether the row with this key belongs to the evaluation share (0..1).

    A row's place depends on its own text alone: adding rows moves none, and equal rows stay
    together.
    """
    drawn = hashlib.blake2b(key, digest_size=8, key=HELD_OUT_SALT.encode()).digest()
    return int.from_bytes(drawn, "big") < share * 2.0**64
