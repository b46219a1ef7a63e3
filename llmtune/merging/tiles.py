"""The arithmetic of a merge: a few rows of one tensor at a time, in float32, rounded once.

Shapes: out and in are the linear layer's widths; a tensor is seen as a table [rows, columns].
"""

import os
import threading
from collections.abc import Iterator

import torch

from llmtune.errors import LlmtuneError
from llmtune.merging.changes import Block, LowRankDelta, PlannedTensor
from llmtune.safetensors_io import DTYPE_BITS, TensorEntry

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}

# 2 Mi numbers: 8 MiB in float32, so that a thread holds about 25 MiB whatever the model's size.
TILE_ELEMENTS = 1 << 21

# A matrix product's rows come out bit-equal to those of the whole product as long as a tile begins
# at a multiple of the BLAS kernel's height and no tile is thinner than it (16 rows on every x86
# kernel of MKL that was tried; a tile of 1 to 15 rows takes another kernel and differs).
ROW_ALIGNMENT = 64

_scratch = threading.local()


def iter_tiles(tensor: PlannedTensor) -> Iterator[tuple[Block, int, int]]:
    """Yield (block, first row, number of rows) over the table; the last tile of a block is longest.

    A block is one stretch of rows that share a delta; a tensor without one is a single block.
    """
    height = max(1, TILE_ELEMENTS // max(1, tensor.num_columns) // ROW_ALIGNMENT) * ROW_ALIGNMENT
    for block in tensor.blocks or (Block(0, tensor.num_rows),):
        num_tiles = max(1, block.num_rows // height)
        for index in range(num_tiles):
            first = index * height
            last = block.num_rows if index == num_tiles - 1 else first + height
            yield block, block.first_row + first, last - first


class AdapterTensors:
    """Loads the adapter's tensors in float32 and keeps the latest: experts share a stack."""

    NUM_KEPT = 6

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def load(self, entry: TensorEntry) -> torch.Tensor:
        """Return one tensor in float32, in its own shape."""
        tensor = self._kept.pop(entry.name, None)
        if tensor is None:
            raw = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
            _read_into(entry, raw.view(-1), entry.start)
            tensor = raw.float()
        self._kept[entry.name] = tensor  # last in the order: the latest used
        if len(self._kept) > self.NUM_KEPT:
            del self._kept[next(iter(self._kept))]
        return tensor


class TensorMerger:
    """Computes the tiles of one changed tensor; holds the adapter's part of it in float32."""

    def __init__(self, tensor: PlannedTensor, adapter: AdapterTensors, strength: float) -> None:
        self.tensor = tensor
        self.strength = strength
        self._loaded = {entry.name: adapter.load(entry) for entry in self._adapter_entries()}
        self._column_norms = self._dora_column_norms() if self._needs_column_norms() else None

    def merge_tile(self, block: Block, first_row: int, num_rows: int) -> memoryview:
        """Return the merged bytes of some rows; they are valid until the thread's next tile.

        Raises:
            LlmtuneError: a merged number is not finite, or not in the dtype's range.
        """
        weight = self._source_tile(self.tensor.source, first_row, num_rows, slot="weight")
        merged = self._merge(weight, block, first_row, num_rows)
        dtype = TORCH_DTYPES[self.tensor.dtype]
        self._check_finite(merged, dtype, first_row)
        rounded = _buffer("rounded", num_rows * self.tensor.num_columns, dtype).view_as(merged)
        rounded.copy_(merged)
        return memoryview(rounded.reshape(-1).view(torch.uint8).numpy())

    def _merge(
        self, weight: torch.Tensor, block: Block, first_row: int, num_rows: int
    ) -> torch.Tensor:
        tensor = self.tensor
        if tensor.blend_base is not None:
            base = self._source_tile(tensor.blend_base, first_row, num_rows, slot="delta")
            return base + self.strength * (weight - base)
        if tensor.token_rows is not None:
            self._set_token_rows(weight, first_row, num_rows)
        if tensor.added_bias is not None:
            weight += self._loaded[tensor.added_bias.name] * tensor.bias_scaling
        if block.delta is None:
            return weight
        base = weight.clone() if tensor.magnitude is not None and self.strength != 1 else None
        weight += self._delta_tile(block, first_row, num_rows)
        if tensor.magnitude is not None:
            self._set_magnitude(weight, tensor.magnitude, first_row)
        if base is not None:
            return base + self.strength * (weight - base)
        return weight

    def _delta_tile(self, block: Block, first_row: int, num_rows: int) -> torch.Tensor:
        """Return scaling * B @ A (or its transpose) for some rows, [num_rows, columns]."""
        assert block.delta is not None
        delta = block.delta
        left_OR, right_RI = self._factors(delta)
        start = first_row - block.first_row
        if delta.is_transposed:
            right_RI = right_RI[:, start : start + num_rows]
        else:
            left_OR = left_OR[start : start + num_rows]
        shape = (left_OR.shape[0], right_RI.shape[1])
        product = _buffer("delta", shape[0] * shape[1], torch.float32).view(shape)
        torch.mm(left_OR, right_RI, out=product)
        product *= delta.scaling
        return product.t() if delta.is_transposed else product

    def _factors(self, delta: LowRankDelta) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self._loaded[delta.a.name], self._loaded[delta.b.name]
        if delta.num_experts > 1:
            # PEFT stacks A as [experts, rank] and B as [rank, experts] (lora.layer.ParamWrapper).
            a = a.view(delta.num_experts, -1, a.shape[1])[delta.expert]
            b = b.view(b.shape[0], -1, delta.num_experts)[:, :, delta.expert]
        b = b[delta.first_out : delta.first_out + delta.num_out]
        return b.contiguous(), a

    def _set_magnitude(self, weight: torch.Tensor, magnitude: TensorEntry, first_row: int) -> None:
        """Give every output's weights the norm that DoRA learned (arXiv 2402.09353, eq. 5)."""
        learned = self._loaded[magnitude.name]
        if self._column_norms is not None:
            weight *= learned / self._column_norms
        else:
            learned = learned[first_row : first_row + weight.shape[0]]
            weight *= (learned / torch.linalg.norm(weight, dim=1))[:, None]

    def _needs_column_norms(self) -> bool:
        delta = self.tensor.blocks[0].delta if self.tensor.blocks else None
        return self.tensor.magnitude is not None and delta is not None and delta.is_transposed

    def _dora_column_norms(self) -> torch.Tensor:
        """Return the norms of W + delta along the stored rows, where outputs are columns: [out]."""
        squares = torch.zeros(self.tensor.num_columns, dtype=torch.float64)
        for block, first_row, num_rows in iter_tiles(self.tensor):
            weight = self._source_tile(self.tensor.source, first_row, num_rows, slot="weight")
            weight += self._delta_tile(block, first_row, num_rows)
            squares += weight.double().square().sum(dim=0)
        return squares.sqrt().float()

    def _set_token_rows(self, weight: torch.Tensor, first_row: int, num_rows: int) -> None:
        assert self.tensor.token_rows is not None
        trained = self._loaded[self.tensor.token_rows.name]
        for position, token in enumerate(self.tensor.token_indices):
            if first_row <= token < first_row + num_rows:
                row = weight[token - first_row]
                row.copy_(_blend(row, trained[position], self.strength))

    def _source_tile(
        self, entry: TensorEntry, first_row: int, num_rows: int, *, slot: str
    ) -> torch.Tensor:
        columns = self.tensor.num_columns
        size = num_rows * columns
        raw = _buffer("raw", size, TORCH_DTYPES[entry.dtype])
        row_bytes = columns * DTYPE_BITS[entry.dtype] // 8
        _read_into(entry, raw, entry.start + first_row * row_bytes)
        tile = _buffer(slot, size, torch.float32)
        tile.copy_(raw)
        return tile.view(num_rows, columns)

    def _check_finite(self, merged: torch.Tensor, dtype: torch.dtype, first_row: int) -> None:
        if not merged.numel():
            return
        extremes = torch.stack(torch.aminmax(merged)).to(dtype)  # a NaN anywhere is in both
        if not torch.isfinite(extremes).all():
            raise LlmtuneError(
                f"merging {self.tensor.name!r} gives a number that is not finite in "
                f"{str(dtype).removeprefix('torch.')} (rows {first_row} and on): the base or the "
                "adapter is broken"
            )

    def _adapter_entries(self) -> set[TensorEntry]:
        tensor = self.tensor
        deltas = [block.delta for block in tensor.blocks if block.delta is not None]
        entries = [tensor.magnitude, tensor.added_bias, tensor.token_rows]
        entries += [entry for delta in deltas for entry in (delta.a, delta.b)]
        return {entry for entry in entries if entry is not None}


def _blend(base: torch.Tensor, trained: torch.Tensor, strength: float) -> torch.Tensor:
    return trained if strength == 1 else base + strength * (trained - base)


def _buffer(slot: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return `size` numbers of the calling thread's own memory, kept from tile to tile."""
    needed = size * dtype.itemsize
    held = getattr(_scratch, slot, None)
    if held is None or held.numel() < needed:
        held = torch.empty(needed, dtype=torch.uint8)
        setattr(_scratch, slot, held)
    return held[:needed].view(dtype)


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
