"""What makes a usable row look wrong: style findings that warn and never stop a run."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from llmtune.data.conversation import Conversation, Message
from llmtune.data.problems import shorten

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff\ufff9-\ufffb]")
BROKEN = re.compile(r"\ufffd|Ã[\x80-\xbf©¨¼¶¤]|â€[™œ\x9d“”¦]|Â[\xa0°§]")
PLACEHOLDER = re.compile(
    r"\{\{\s*\w+\s*\}\}|\{(?:input|instruction|question|name|text)\}|<\w+_HERE>"
)
HTML_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5});")
REFUSAL = re.compile(
    r"\bas an ai (?:language )?model\b|\bi(?:'m| am) sorry, but i can(?:no|')t\b", re.I
)
MISSING = frozenset(
    {"nan", "na", "n/a", "#n/a", "<na>", "none", "null", "nil", "nat", "undefined", "[null]"}
)
"""What tables write in the place of a value that is not there, in lower case."""
SAME_SIGN = re.compile(r"(\S)\1{60,}")
LOOP_WORD = re.compile(r"[\w']+[.,;!?]*|[^\w\s']+")
LOOP_BLOCK = re.compile(r"[\w' ]{2,40}[.,;!?]*")
"""What may repeat: a few words, without signs between them."""
LOOP_WORDS = 20
"""The most words of a repeating block."""
LOOP_TIMES = 8
MAX_LOOP_RATIO = 0.4

SCRIPTS = (
    (0x0041, "latin"),
    (0x0370, "greek"),
    (0x0400, "cyrillic"),
    (0x0530, "armenian"),
    (0x0590, "hebrew"),
    (0x0600, "arabic"),
    (0x0900, "indic"),
    (0x0E00, "thai"),
    (0x0E80, "other"),
    (0x1100, "hangul"),
    (0x1200, "other"),
    (0x1E00, "latin"),
    (0x1F00, "greek"),
    (0x2000, ""),
    (0x2E80, "han"),
    (0x3000, ""),
    (0x3040, "kana"),
    (0x3100, "han"),
    (0x3130, "hangul"),
    (0x3190, "han"),
    (0xAC00, "hangul"),
    (0xD800, ""),
    (0xF900, "han"),
    (0xFB00, "other"),
    (0xFE00, ""),
    (0x20000, "han"),
    (0x30000, ""),
)
COUNTED_CHARACTERS = 1 << 18
"""Letters whose scripts are looked up at once; each takes 20 bytes meanwhile."""
_STARTS = np.array([start for start, _ in SCRIPTS], dtype=np.uint32)
_NAMES = ("", *(name for _, name in SCRIPTS))


SUSPICION_WORDS = {
    "control-character": "invisible control characters",
    "encoding": "text decoded with the wrong encoding",
    "placeholder": "unfilled placeholders",
    "html": "HTML entities",
    "spaces": "answers with spaces around them",
    "missing-value": "texts that are a table's word for no value (nan, NA, None)",
    "refusal": "answers that refuse or speak of being an AI",
    "no-answer": "turns of reasoning that no answer follows",
    "loop": "answers that repeat themselves",
    "turn-order": "turns in an odd order",
    "unanswered": "chats whose last turn is never answered",
    "tool-balance": "tool calls and tool answers that do not match",
    "unknown-tool": "calls of tools that are not declared",
}


def find_suspicions(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yield `(kind, what was found)` for everything odd about one row."""
    texts = [(f"message {i} ({m['role']})", m) for i, m in enumerate(conversation.messages, 1)]
    if conversation.kind == "plain":
        yield from _look_for_value(conversation.text, "completion")
    for where, message in texts:
        if message["role"] != "tool":
            yield from _look_for_value(message["content"], where)
        yield from _look_at_text(message["content"], where)
        if message["role"] == "assistant":
            yield from _look_at_answer(message["content"], where)
            if not message["content"].strip() and "tool_calls" not in message:
                yield "no-answer", f"{where}: reasoning alone; the model learns to end after it"
    for name, text in (("prompt", conversation.prompt), ("text", conversation.text)):
        yield from _look_at_text(text, name)
    yield from _look_at_turns(conversation.messages)
    yield from _look_at_calls(conversation)


def main_script(text: str) -> str:
    """Return the script of most of the text's letters (`latin`, `cyrillic`, ...), or ``."""
    if text.isascii():
        return "latin" if any(map(str.isalpha, text)) else ""
    slots = np.zeros(len(_NAMES), dtype=np.int64)
    for start in range(0, len(text), COUNTED_CHARACTERS):
        piece = text[start : start + COUNTED_CHARACTERS]
        points = np.frombuffer(piece.encode("utf-32-le"), dtype=np.uint32)
        found = np.searchsorted(_STARTS, points, side="right")
        slots += np.bincount(found, minlength=len(slots))
    counts: dict[str, int] = {}
    for slot, count in enumerate(slots):
        name = _NAMES[slot]
        if name and count:
            counts[name] = counts.get(name, 0) + int(count)
    return max(counts, key=lambda name: counts[name]) if counts else ""


def _look_at_text(text: str, where: str) -> Iterator[tuple[str, str]]:
    found = CONTROL.search(text)
    if found:
        yield "control-character", f"{where}: invisible character U+{ord(found.group()):04X}"
    if not text.isascii():
        found = BROKEN.search(text)
        if found:
            yield (
                "encoding",
                f"{where}: text decoded with the wrong encoding: {_around(text, found)}",
            )
    if "{" in text or "_HERE>" in text:
        found = PLACEHOLDER.search(text)
        if found:
            yield "placeholder", f"{where}: unfilled placeholder {shorten(found.group())}"
    if "&" in text:
        found = HTML_ENTITY.search(text)
        if found:
            yield "html", f"{where}: HTML entity {shorten(found.group())}"


def _look_for_value(text: str, where: str) -> Iterator[tuple[str, str]]:
    if len(text) < 16 and text.strip().lower() in MISSING:
        yield "missing-value", f"{where}: is {shorten(text)}, as a table writes a missing value"


def _look_at_answer(text: str, where: str) -> Iterator[tuple[str, str]]:
    if text != text.strip():
        yield "spaces", f"{where}: the answer begins or ends with spaces or line breaks"
    if REFUSAL.search(text):
        yield "refusal", f"{where}: a refusal or self-description: {shorten(text)}"
    if len(text) > 60 and _is_dense(text) and has_loop(text):
        yield "loop", f"{where}: the same words over and over"


def has_loop(text: str) -> bool:
    """Whether a few words stand eight times in a row, or one sign more than sixty times."""
    if SAME_SIGN.search(text):
        return True
    words = LOOP_WORD.findall(text)
    return any(
        LOOP_BLOCK.fullmatch(" ".join(words[start : start + size]))
        for start, size in find_repeats(words, LOOP_WORDS, LOOP_TIMES)
    )


def find_repeats(items: Sequence[object], longest: int, times: int) -> Iterator[tuple[int, int]]:
    """Yield `(start, size)` of every block that is there `times` times in a row.

    Each item is compared with the one a block before it: `longest` comparisons an item.
    """
    for size in range(1, longest + 1):
        equal = 0
        for index in range(size, len(items)):
            equal = equal + 1 if items[index] == items[index - size] else 0
            if equal == size * (times - 1):
                yield index + 1 - size, size


def _is_dense(text: str) -> bool:
    """Say whether the text compresses as only a repeating one does; spares the slower look."""
    return len(zlib.compress(text.encode(), 1)) < MAX_LOOP_RATIO * len(text)


def _look_at_turns(messages: list[Message]) -> Iterator[tuple[str, str]]:
    roles = [message["role"] for message in messages]
    for index, (role, following) in enumerate(pairwise(roles), 1):
        if role == following and role in ("user", "assistant"):
            yield "turn-order", f"messages {index} and {index + 1} are both {role}"
            break
    spoken = [role for role in roles if role not in ("system", "developer")]
    if spoken and spoken[0] == "assistant":
        yield "turn-order", "the first turn is the assistant's: nothing was asked"
    if spoken and spoken[-1] in ("user", "tool"):
        yield "unanswered", f"the last turn is the {spoken[-1]}'s: it is never answered"
    if any(role in ("system", "developer") for role in roles[1:]):
        yield "turn-order", "a system message is after the first turn"


def _look_at_calls(conversation: Conversation) -> Iterator[tuple[str, str]]:
    names = {tool.get("function", tool)["name"] for tool in conversation.tools or []}
    open_calls = 0
    for index, message in enumerate(conversation.messages, 1):
        if message["role"] == "tool":
            open_calls -= 1
            if open_calls < 0:
                yield "tool-balance", f"message {index}: a tool's answer that no call asked for"
                return
            continue
        if open_calls > 0:
            yield (
                "tool-balance",
                f"message {index}: {open_calls} tool calls before it have no answer",
            )
            return
        calls = message.get("tool_calls", [])
        open_calls = len(calls)
        unknown = [c["function"]["name"] for c in calls if c["function"]["name"] not in names]
        if unknown:
            listed = ", ".join(sorted(names)) or "nothing"
            yield "unknown-tool", f"message {index}: calls {unknown[0]!r}; tools holds {listed}"


def _around(text: str, found: re.Match[str]) -> str:
    return shorten(text[max(0, found.start() - 15) : found.end() + 15])
