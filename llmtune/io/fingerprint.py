"""Content hashes: the same bytes give the same name on every machine."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

from llmtune.io.progress import progress_bar

READ_BYTES = 1 << 20

JsonObject: TypeAlias = Mapping[str, "JsonValue"]
"""What is written as JSON. What is read from it by name is a frozen dataclass or a TypedDict."""
JsonValue: TypeAlias = JsonObject | Sequence["JsonValue"] | str | int | float | bool | None


def hash_text(text: str) -> str:
    """Return the SHA-256 of `text` in UTF-8, as 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_json(value: JsonValue | Mapping[str, object]) -> str:
    """Return the SHA-256 of `value` as canonical JSON: keys sorted, no spaces, no NaN.

    Raises:
        TypeError: `value` holds something JSON cannot hold.
        ValueError: `value` holds a NaN or an infinity.
    """
    return hash_text(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    size = -(-path.stat().st_size // READ_BYTES)
    with path.open("rb") as file, progress_bar(path.name, size, unit="MiB read") as bar:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            bar.advance()
    return digest.hexdigest()


@cache
def code_fingerprint(rooms: tuple[str, ...]) -> str:
    """Return a hash of llmtune's own code in these rooms, for results that are kept."""
    root = Path(__file__).parents[1]
    files = sorted(path for room in rooms for path in (root / room).rglob("*.py"))
    return hash_json({str(path.relative_to(root)): hash_file(path) for path in files})
