"""Memory that a thread of the merge keeps from tile to tile, and reading files into it."""

import os
import threading

import torch

from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import DTYPE_BITS, TensorEntry

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "U8": torch.uint8,
}

CPU = torch.device("cpu")

_scratch = threading.local()


def buffer(slot: str, size: int, dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """Return `size` numbers of the calling thread's own memory, kept from tile to tile."""
    needed = size * dtype.itemsize
    key = f"{slot}@{device}"
    held = getattr(_scratch, key, None)
    if held is None or held.numel() < needed:
        held = torch.empty(needed, dtype=torch.uint8, device=device)
        setattr(_scratch, key, held)
    return held[:needed].view(dtype)


def read_rows(entry: TensorEntry, first_row: int, num_rows: int, columns: int) -> torch.Tensor:
    """Return some rows of a stored tensor, [num_rows, columns], in its own dtype.

    They are valid until the thread reads again.

    Raises:
        LlmtuneError: the file was cut short since its header was read.
    """
    raw = buffer("raw", num_rows * columns, TORCH_DTYPES[entry.dtype])
    row_bytes = columns * DTYPE_BITS[entry.dtype] // 8
    _read_into(entry, raw, entry.start + first_row * row_bytes)
    return raw.view(num_rows, columns)


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Return a whole stored tensor in its own shape and dtype.

    Raises:
        LlmtuneError: as `read_rows`.
    """
    raw = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    _read_into(entry, raw.view(-1), entry.start)
    return raw


def _read_into(entry: TensorEntry, raw: torch.Tensor, offset: int) -> None:
    view = memoryview(raw.view(torch.uint8).numpy())
    descriptor = os.open(entry.path, os.O_RDONLY)
    try:
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise LlmtuneError(f"{entry.path} was cut short while it was being read")
            view, offset = view[count:], offset + count
    finally:
        os.close(descriptor)
