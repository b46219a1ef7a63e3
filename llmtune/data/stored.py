"""Tokens and their mask in two files that are mapped into memory, not read into it."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from llmtune.errors import LlmtuneError

TOKENS_FILE, TRAINED_FILE = "tokens.i32", "trained.u8"
_TYPES = {TOKENS_FILE: np.dtype("<i4"), TRAINED_FILE: np.dtype("?")}


@dataclass(frozen=True)
class StoredTokens:
    """All tokens int32 [T] and whether each is trained bool [T]."""

    tokens: np.ndarray
    trained: np.ndarray
    content_hash: str
    """SHA-256 of the tokens' bytes, then of the mask's."""


class TokenWriter:
    """Appends to the two files, in `directory` or without a name where there is none."""

    def __init__(self, directory: Path | None = None) -> None:
        self.num_tokens = 0
        self._where = tempfile.gettempdir() if directory is None else str(directory)
        self._digests = [hashlib.sha256() for _ in _TYPES]
        try:
            self._files = [_create(directory, name) for name in _TYPES]
        except OSError as error:
            raise self._refuse(error) from error

    def write(self, tokens: np.ndarray, trained: np.ndarray) -> None:
        """Append tokens int32 [T] and their mask bool [T].

        Raises:
            LlmtuneError: the disk is full, or the place cannot be written.
        """
        self.num_tokens += len(tokens)
        arrays = (tokens, trained)
        for file, digest, array in zip(self._files, self._digests, arrays, strict=True):
            data = array.tobytes()
            digest.update(data)
            try:
                file.write(data)
            except OSError as error:
                raise self._refuse(error) from error

    def finish(self) -> StoredTokens:
        """Map what was written; the maps keep the files' bytes, with or without a name."""
        tokens, trained = (_map(*pair) for pair in zip(self._files, _TYPES.values(), strict=True))
        return StoredTokens(tokens, trained, "".join(d.hexdigest() for d in self._digests))

    def _refuse(self, error: OSError) -> LlmtuneError:
        return LlmtuneError(
            f"tokenized data cannot be written to {self._where}: {error}; make room there, or "
            "choose another place with TMPDIR (data.cache=false) or LLMTUNE_CACHE"
        )


def read_stored(directory: Path) -> StoredTokens:
    """Map the files that a `TokenWriter` left in `directory`, and hash them as they are now.

    Raises:
        OSError: a file is not there.
        ValueError: a file is not a whole number of tokens.
    """
    arrays, digests = [], []
    for name, dtype in _TYPES.items():
        with (directory / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
            arrays.append(_map(file, dtype))
    return StoredTokens(arrays[0], arrays[1], "".join(digests))


def _create(directory: Path | None, name: str) -> IO[bytes]:
    if directory is not None:
        return (directory / name).open("w+b")
    return tempfile.TemporaryFile()


def _map(file: IO[bytes], dtype: np.dtype) -> np.ndarray:
    file.flush()
    if not file.seek(0, 2):
        return np.empty(0, dtype)  # nothing cannot be mapped
    return np.asarray(np.memmap(file, dtype=dtype, mode="r"))
