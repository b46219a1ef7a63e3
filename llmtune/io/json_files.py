"""The one reader of JSON files, within limits; and one line for what a library says of a file."""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError

MOST_BYTES = 256 << 20
"""A tokenizer.json of the largest vocabularies has about 35 MB."""
MOST_VALUES = 8 << 20
"""The largest vocabularies, with their merges, have about 2 million."""
TYPE_NAMES = {"NoneType": "null", "list": "a list", "str": "a text", "bool": "true or false"}
SHOWN_REASON = 300
FETCH_AGAIN = "it may be damaged: fetch it again"
FILE_NAME = re.compile("[^/\\\\\0\ud800-\udfff]{1,200}")
NOT_THE_FILE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE})


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, *, advice: str = FETCH_AGAIN) -> Any:
    """Return the value that a JSON file holds; time and memory are bounded whatever it holds.

    Raises:
        LlmtuneError: it is missing, beyond the limits, or not JSON; ends with `advice`.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise LlmtuneError(f"{path}: has {size:,} bytes; expected {MOST_BYTES:,} at most")
        content = path.read_bytes()
    except OSError as error:
        raise LlmtuneError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    if content.count(b",") + content.count(b"[") + content.count(b"{") > MOST_VALUES:
        raise LlmtuneError(f"{path}: holds more than {MOST_VALUES:,} values; {advice}")
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise LlmtuneError(f"{path}: is not JSON ({error}); {advice}") from None


def read_json_object(path: Path, *, advice: str = FETCH_AGAIN) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        LlmtuneError: as `read_json`, or it holds something other than an object.
    """
    content = read_json(path, advice=advice)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise LlmtuneError(
            f"{path}: holds {TYPE_NAMES.get(kind, 'a number')}; expected an object; {advice}"
        )
    return content


def read_weight_map(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return an index file's map from tensor names to file names, and its metadata.

    The files are those beside the index: a name that leads elsewhere is refused.

    Raises:
        LlmtuneError: as `read_json_object`, or it is not an index of such files.
    """
    content = read_json_object(path)
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise LlmtuneError(
            f'{path}: is not an index of shards; expected a "weight_map" from tensor names to '
            f"file names; {FETCH_AGAIN}"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise LlmtuneError(
                f"{path}: names the shard {name!r:.100}; expected the name of a file beside it; "
                f"{FETCH_AGAIN}"
            )
    return weight_map, metadata


@contextmanager
def blamed_on(
    path: Path,
    reader: str,
    *,
    advice: str = FETCH_AGAIN,
    passing: type[Exception] | tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn what a library says while it reads a file into one line with the file's name.

    A library raises whatever its parser meets: a KeyError, a TypeError, a bare Exception, a panic
    of Rust code. What is not a complaint about the file passes: a full memory or disk, a Ctrl-C,
    and what is `passing`.

    Raises:
        LlmtuneError: the library, called `reader` in the message, cannot read the file.
    """
    try:
        yield
    except (LlmtuneError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, passing):
            raise
        if "OutOfMemory" in type(error).__name__ or getattr(error, "errno", None) in NOT_THE_FILE:
            raise
        raise LlmtuneError(
            f"{path}: {reader} cannot read it ({type(error).__name__}: {plain_reason(error)}); "
            f"{advice}"
        ) from error


def plain_reason(error: BaseException) -> str:
    """Return an error's message on one line, cut to a readable length."""
    words = " ".join(str(error).split())
    return words if len(words) <= SHOWN_REASON else words[:SHOWN_REASON] + " ..."
