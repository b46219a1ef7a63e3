"""Comparing two stored tensors piece by piece, without torch and without holding either whole."""

import os
from collections.abc import Iterator

import numpy as np

from llmtune.io.safetensors import DTYPE_BITS, TensorEntry

PIECE_ELEMENTS = 1 << 20

# The coarsest of the 16-bit formats keeps 8 bits of a number: what a cast to it may change.
CAST_TOLERANCE = 2.0**-8


def have_same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


def agree(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of one shape hold the same numbers, but for a cast to 16 bits."""
    if one.dtype == other.dtype:
        return have_same_bytes(one, other)
    return all(
        np.allclose(_floats(a, one.dtype), _floats(b, other.dtype), rtol=CAST_TOLERANCE, atol=1e-30)
        for a, b in zip(_pieces(one), _pieces(other), strict=True)
    )


def _pieces(entry: TensorEntry) -> Iterator[bytes]:
    piece_bytes = PIECE_ELEMENTS * DTYPE_BITS[entry.dtype] // 8
    with entry.path.open("rb") as file:
        for start in range(entry.start, entry.stop, piece_bytes):
            yield os.pread(file.fileno(), min(piece_bytes, entry.stop - start), start)


def _floats(piece: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(piece, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(piece, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
