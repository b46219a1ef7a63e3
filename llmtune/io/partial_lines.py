"""JSON lines written as they come, beside the file that they will be; a killed writer continues."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.unfinished import NO_SPACE

SUFFIX = ".partial"


class PartialLines:
    """An open partial file: `found` are the values that an earlier process left, whole ones only.

    A line is appended by one write, so a process that ends at any moment leaves whole lines and at
    most one broken one at the end, which is cut off when the file is opened again.
    """

    def __init__(self, descriptor: int, path: Path, header: Mapping[str, Any], out: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self.is_empty = True
        """Whether it holds the header alone."""
        self.found = self._read(dict(header), out)
        self.is_empty = not self.found

    def append(self, value: Any) -> None:
        """Write one value.

        Raises:
            LlmtuneError: the disk is full; what was written before stays.
        """
        data = (json.dumps(value) + "\n").encode()
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise LlmtuneError(
                f"{self._path}: the disk ran full ({os.strerror(error.errno or errno.ENOSPC)}); "
                "what was written is kept: free some space and give the same command again"
            ) from error
        self.is_empty = False

    def remove(self) -> None:
        """Take the file away: its values are in their place."""
        self._path.unlink()

    def _read(self, header: dict[str, Any], out: Path) -> list[Any]:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.ftruncate(self._descriptor, len(whole))
        if not whole:
            self.append(header)
            return []
        try:
            known, *values = map(json.loads, whole.splitlines())
        except ValueError:
            known, values = None, []
        wanted = json.loads(json.dumps(header))
        if known != wanted and isinstance(known, dict) and not values:  # killed before any value
            os.ftruncate(self._descriptor, 0)
            self.append(header)
            return []
        if known != wanted:
            has_keys = isinstance(known, dict) and known.keys() == wanted.keys()
            other = [key for key in wanted if has_keys and known[key] != wanted[key]]
            raise LlmtuneError(
                f"{self._path}: was begun with {'a different ' if other else 'something different'}"
                f"{' and '.join(other)}, so it cannot be continued; remove it, or choose an "
                f"output other than {out.name}"
            )
        return values


@contextmanager
def partial_lines(out: Path, header: Mapping[str, Any]) -> Iterator[PartialLines]:
    """Open the partial file beside `out`, whose first line is `header`, and hold it.

    One that no value was written to is taken away again.

    Raises:
        LlmtuneError: another process is writing it, or it was begun under a different header.
    """
    path = out.with_name(out.name + SUFFIX)
    descriptor = _open_locked(path)
    try:
        partial = PartialLines(descriptor, path, header, out)
        try:
            yield partial
        finally:
            if partial.is_empty:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise LlmtuneError(
                f"{path}: a different process is writing it; wait for it, or choose a different "
                "output"
            ) from None
        os.close(descriptor)  # whoever held it has finished and removed it
