"""JSON files in the cache directory that later runs take over: whole, undamaged, not too many."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonValue, hash_json
from llmtune.io.json_files import read_json
from llmtune.io.run_dir import atomic_write_json

log = logging.getLogger("llmtune")

FOLDER_BYTES = 512 << 20
"""What the files of one folder may take together; those that were not used for longest go."""


def read_kept(path: Path) -> Any | None:
    """Return what was kept or sealed, and count the file as used; None if it is gone or damaged."""
    try:
        found = read_json(path)
        if not isinstance(found, dict) or found.get("seal") != hash_json(found.get("kept")):
            return None
    except (LlmtuneError, ValueError):  # not there, not JSON, or with a number that JSON has not
        return None
    with suppress(OSError):  # of a different user, or on a read-only disk
        os.utime(path)
    return found["kept"]


def write_kept(path: Path, value: JsonValue | Mapping[str, object], what: str) -> None:
    """Keep a value, and remove what was not used for longest from a folder that has grown too far.

    Where the cache cannot be written one line says so: no run needs it.

    Args:
        path: in a folder of the cache directory.
        value: what `read_kept` returns later.
        what: the value, with its verb: "the base's scores are".

    Raises:
        ValueError: the value holds a NaN or an infinity.
    """
    try:
        write_sealed(path, value)
        _drop_unused(path)
    except OSError as error:
        log.warning("%s not kept in %s: %s", what, path.parent, error)


def write_sealed(path: Path, value: JsonValue | Mapping[str, object]) -> None:
    """Write a value for `read_kept`, and remove nothing.

    Raises:
        OSError: the file cannot be written.
        ValueError: the value holds a NaN or an infinity.
    """
    atomic_write_json(path, {"seal": hash_json(value), "kept": value})


def _drop_unused(newest: Path) -> None:
    files = []
    for each in newest.parent.glob("*.json"):
        with suppress(FileNotFoundError):  # another process was faster
            about = each.stat()
            files.append((about.st_mtime_ns, about.st_size, each))
    total = 0
    for _, size, each in sorted(files, reverse=True):
        total += size
        if total > FOLDER_BYTES and each != newest:
            each.unlink(missing_ok=True)
