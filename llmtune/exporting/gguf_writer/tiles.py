"""Read stored rows a tile at a time, and turn them into the bytes of a GGUF tensor."""

import math
import os
from collections.abc import Iterator

import numpy as np
from gguf import GGMLQuantizationType, quants

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.tensors import PlannedTensor, Rows
from llmtune.io.safetensors import DTYPE_BITS

TILE_NUMBERS = 1 << 20
"""Numbers in one tile; the work on it takes about 40 bytes each."""


def iter_tensor_bytes(tensor: PlannedTensor) -> Iterator[np.ndarray]:
    """Yield the tensor's bytes in order, a few MiB at a time.

    Raises:
        LlmtuneError: a number is not finite, or too large for float16.
    """
    if tensor.values is not None:
        yield tensor.values
        return
    for rows in tensor.sources:
        descriptor = os.open(rows.entry.path, os.O_RDONLY)
        try:
            for first, count in _tiles(tensor, rows):
                values = _read_rows(descriptor, rows, first, count)
                yield _encode(tensor, _pair_rotary(tensor, values))
        finally:
            os.close(descriptor)


def _tiles(tensor: PlannedTensor, rows: Rows) -> Iterator[tuple[int, int]]:
    """Yield (first row, rows) of tiles that never cut a head that must be reordered."""
    unit = 1
    if tensor.rotary_heads and len(tensor.shape) > 1:
        unit = rows.count // tensor.rotary_heads
    step = max(unit, TILE_NUMBERS // rows.entry.shape[-1] // unit * unit)
    for first in range(rows.first, rows.first + rows.count, step):
        yield first, min(step, rows.first + rows.count - first)


def _read_rows(descriptor: int, rows: Rows, first: int, count: int) -> np.ndarray:
    """Return rows of a stored tensor as float32, [rows, columns]; exact for all three dtypes."""
    entry = rows.entry
    columns = entry.shape[-1]
    row_bytes = columns * DTYPE_BITS[entry.dtype] // 8
    data = os.pread(descriptor, count * row_bytes, entry.start + first * row_bytes)
    assert len(data) == count * row_bytes, entry.path
    if entry.dtype == "BF16":
        widened = np.frombuffer(data, dtype="<u2").astype(np.uint32) << np.uint32(16)
        values = widened.view(np.float32)
    else:
        stored = np.frombuffer(data, dtype="<f4" if entry.dtype == "F32" else "<f2")
        values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        raise LlmtuneError(f"{entry.path}: {entry.name} holds numbers that are not finite")
    return values.reshape(count, columns)


def _pair_rotary(tensor: PlannedTensor, values: np.ndarray) -> np.ndarray:
    """Reorder each head's rows from (first half, second half) to (first, second) pairs."""
    if not tensor.rotary_heads:
        return values
    if len(tensor.shape) == 1:  # a bias: its numbers are the rows
        halves = values.reshape(tensor.rotary_heads, 2, -1)
        return halves.swapaxes(1, 2).reshape(values.shape)
    head_rows = tensor.shape[0] // tensor.rotary_heads
    heads = values.reshape(-1, 2, head_rows // 2, values.shape[-1])
    return heads.swapaxes(1, 2).reshape(values.shape)


def _encode(tensor: PlannedTensor, values: np.ndarray) -> np.ndarray:
    if tensor.factor != 1:
        values = values * np.float32(tensor.factor)
    if tensor.offset:
        values = values + np.float32(tensor.offset)
    if tensor.type == GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise LlmtuneError(
            f"{tensor.name}: {np.abs(values).max():g} is too large for float16; "
            "export with --type bf16"
        )
    encoded: np.ndarray = quants.quantize(np.ascontiguousarray(values), tensor.type)
    assert math.prod(values.shape) == 0 or encoded.size, tensor.name
    return encoded
