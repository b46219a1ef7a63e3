"""Read the head of a GGUF file within limits, so that a damaged or hostile file is refused at once.

The format: a magic, a version, two counts, the key-value pairs, the list of tensors, and after a
padding the tensors' data (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmtune.errors import LlmtuneError

GGUF_SUFFIX = ".gguf"
GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEAD_BYTES = 512 << 20
"""The largest vocabularies, of 262,144 tokens with their merges, take 16 MiB."""
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_TENSOR_DIMENSIONS = 4
MAX_NAME_BYTES = 1 << 16
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Format characters by the number of a value's type."""
TEXT, ARRAY = 8, 9
LENGTH_BYTES = 8
# (weights in a block, bytes of a block) by the number of a tensor's type; ggml's list. The bytes
# of a type that is not listed are not compared with the size of the file.
BLOCKS = {
    **{
        0: (1, 4),
        1: (1, 2),
        24: (1, 1),
        25: (1, 2),
        26: (1, 4),
        27: (1, 8),
        28: (1, 8),
        30: (1, 2),
    },
    **{2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 20: (32, 18)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)},
}

Value = int | float | bool | str


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the head lists it."""

    name: str
    shape: tuple[int, ...]
    """The dimension whose weights are neighbors comes first."""
    type: int
    """ggml's number of its type."""


@dataclass(frozen=True)
class GgufHead:
    """What a GGUF file says of itself."""

    values: Mapping[str, Value]
    """Numbers, flags and texts by key."""
    lengths: Mapping[str, int]
    """The lengths of the arrays by key; their contents are skipped."""
    tensors: tuple[GgufTensor, ...]


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def read_gguf_head(path: Path) -> GgufHead:
    """Read the head of a GGUF file; memory and time are bounded whatever the file says.

    Raises:
        LlmtuneError: it is not a GGUF file, is damaged or cut short, or is beyond the limits.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).read()
    except (_DamagedError, OSError) as error:
        raise LlmtuneError(f"{path}: cannot be read as a GGUF file: {error}") from error


class _DamagedError(Exception):
    """What is wrong with the file, in words."""


class _Reader:
    """A cursor in the head, which never passes the end of the file or the limit."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._end = min(size, MAX_HEAD_BYTES)
        self._place = 0

    def read(self) -> GgufHead:
        """Read everything in order."""
        if self._bytes(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise _DamagedError("its first four bytes are not GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise _DamagedError(f"version {version}, expected 2 or 3, little-endian")
        num_tensors = self._count(MAX_TENSORS, "tensors")
        num_pairs = self._count(MAX_PAIRS, "keys")
        values: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(num_pairs):
            key = self._text(MAX_NAME_BYTES)
            if key in values or key in lengths:
                raise _DamagedError(f"the key {key!r} is there twice")
            type = self._number("I")
            if type == ARRAY:
                lengths[key] = self._skip_array(key)
            else:
                values[key] = self._value(type, key)
        listed = [self._tensor() for _ in range(num_tensors)]
        self._check_data(listed, values.get("general.alignment", DEFAULT_ALIGNMENT))
        return GgufHead(values, lengths, tuple(tensor for tensor, _ in listed))

    def _value(self, type: int, key: str) -> Value:
        if type == TEXT:
            return self._text()
        return self._number(self._format(type, key))

    def _skip_array(self, key: str) -> int:
        """Pass over an array and return its length."""
        type, length = self._number("I"), self._number("Q")
        if type == TEXT:
            self._require(length * LENGTH_BYTES)
            for _ in range(length):
                self._skip(self._number("Q"))
        else:
            self._skip(length * struct.calcsize(self._format(type, key)))
        return length

    def _format(self, type: int, key: str) -> str:
        if type not in SCALARS:
            raise _DamagedError(f"the value of {key!r} has the unknown type {type}")
        return SCALARS[type]

    def _tensor(self) -> tuple[GgufTensor, int]:
        """Read one entry of the list of tensors; return it and where its data begins."""
        name = self._text(MAX_NAME_BYTES)
        num_dimensions = self._number("I")
        if num_dimensions > MAX_TENSOR_DIMENSIONS:
            raise _DamagedError(f"the tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(num_dimensions))
        tensor = GgufTensor(name, shape, self._number("I"))
        return tensor, self._number("Q")

    def _check_data(self, listed: list[tuple[GgufTensor, int]], alignment: Value) -> None:
        """Check that the data of every tensor is within the file."""
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT:
            raise _DamagedError(f"general.alignment is {alignment!r}")
        start = -(-self._place // alignment) * alignment
        for tensor, offset in listed:
            weights, num_bytes = BLOCKS.get(tensor.type, (1, 0))
            needed = math.prod(tensor.shape) // weights * num_bytes
            if start + offset + needed > self._size:
                raise _DamagedError(
                    f"it is cut short: the tensor {tensor.name!r} ends at byte "
                    f"{start + offset + needed:,}, the file at byte {self._size:,}"
                )

    def _count(self, limit: int, what: str) -> int:
        count = self._number("Q")
        if count > limit:
            raise _DamagedError(f"it lists {count:,} {what}, more than {limit:,}")
        return count

    def _text(self, limit: int = MAX_HEAD_BYTES) -> str:
        length = self._number("Q")
        if length > limit:
            raise _DamagedError(f"a text of {length:,} bytes, more than {limit:,}")
        return self._bytes(length).decode(errors="replace")

    def _number(self, format: str) -> int:
        number: int = struct.unpack(f"<{format}", self._bytes(struct.calcsize(format)))[0]
        return number

    def _bytes(self, length: int) -> bytes:
        self._require(length)
        self._place += length
        return self._file.read(length)

    def _skip(self, length: int) -> None:
        self._require(length)
        self._place += length
        self._file.seek(self._place)

    def _require(self, length: int) -> None:
        """Check that so many bytes are there."""
        if self._place + length <= self._end:
            return
        if self._place + length <= self._size:
            raise _DamagedError(f"its head is larger than {MAX_HEAD_BYTES:,} bytes")
        raise _DamagedError(
            f"it is cut short: {length:,} bytes are expected at byte {self._place:,}, the file has "
            f"{self._size:,}"
        )
