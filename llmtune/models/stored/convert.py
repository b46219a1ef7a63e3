"""A quantized checkpoint written out as a dense one, tensor by tensor."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import FETCH_AGAIN
from llmtune.io.progress import ProgressBar, progress_bar
from llmtune.io.run_dir import atomic_write_json
from llmtune.io.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorEntry,
    build_preamble,
)
from llmtune.models.build import StoredTensor
from llmtune.models.stored.base import StoredWeight
from llmtune.models.stored.dense import DenseTensor, small_files

SHARD_BYTES = 4 << 30
COPY_BYTES = 16 << 20
CHECKED_ELEMENTS = 1 << 24
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def write_dense(source: Path, tensors: tuple[DenseTensor, ...], directory: Path) -> None:
    """Write the dense checkpoint of `source` into `directory`, with all small files beside it.

    Holds one weight in memory at a time.

    Raises:
        LlmtuneError: the numbers of a weight cannot be read, or are not finite.
        OSError: `directory` cannot be written.
    """
    shards = list(_shards(tensors))
    weight_map: dict[str, str] = {}
    with progress_bar("dequantize", len(tensors), unit="tensors") as bar:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            name = SINGLE_FILE if len(shards) == 1 else name
            _write_shard(directory / name, shard, bar)
            weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        found = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic_write_json(directory / INDEX_FILE, found)
    for path in small_files(source):
        shutil.copyfile(path, directory / path.name)


def _shards(tensors: tuple[DenseTensor, ...]) -> Iterator[list[DenseTensor]]:
    shard: list[DenseTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.num_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    yield shard


def _write_shard(path: Path, shard: list[DenseTensor], bar: ProgressBar) -> None:
    header = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]
    with path.open("wb") as file:
        file.write(build_preamble(header, {"format": "pt"}))
        for tensor in shard:
            if isinstance(tensor.source, TensorEntry):
                _copy(tensor.source, file)
            else:
                dense = _dequantize(tensor.source, DTYPES[tensor.dtype])
                file.write(memoryview(dense.view(torch.uint8).numpy()))
            bar.advance()
        file.flush()
        os.fsync(file.fileno())


def _dequantize(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """Return the dense weight, contiguous and flat."""
    first = next(iter(weight.parts.values()))
    parts = {end: StoredTensor(entry)[...] for end, entry in weight.parts.items()}
    try:
        dense = weight.dequantize(parts, dtype)
    except (ValueError, IndexError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise LlmtuneError(
            f"{first.path}: {weight.name} cannot be dequantized ({reason}); {FETCH_AGAIN}"
        ) from error
    flat = dense.contiguous().view(-1)
    if tuple(dense.shape) != weight.shape or not all(
        bool(part.isfinite().all()) for part in flat.split(CHECKED_ELEMENTS)
    ):
        state = "is not finite" if tuple(dense.shape) == weight.shape else "has a wrong shape"
        raise LlmtuneError(f"{first.path}: {weight.name} {state} in {dtype}; {FETCH_AGAIN}")
    return flat


def _copy(entry: TensorEntry, file: BinaryIO) -> None:
    with entry.path.open("rb") as source:
        source.seek(entry.start)
        left = entry.num_bytes
        while left:
            block = source.read(min(left, COPY_BYTES))
            if not block:
                raise LlmtuneError(f"{entry.path} is cut short; {FETCH_AGAIN}")
            file.write(block)
            left -= len(block)
