"""The arithmetic of a merge: a few rows of one tensor at a time, in float32, rounded once.

Shapes: out and in are the linear layer's widths; a tensor is seen as a table [rows, columns].
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from llmtune.adapters.update import AdditiveUpdate
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import TensorEntry
from llmtune.merging.changes import Block, PlannedTensor, RoundTrip
from llmtune.merging.combine import combine_deltas
from llmtune.merging.config import Combination
from llmtune.merging.scratch import CPU, TORCH_DTYPES, buffer
from llmtune.merging.source import AdapterTensors, BaseRows


@dataclass(frozen=True)
class MergeArithmetic:
    """What all tensors of a merge share: the device, and how base and deltas are read."""

    adapters: AdapterTensors
    device: torch.device = CPU
    round_trip: RoundTrip | None = None
    combination: Combination | None = None


class TensorMerger:
    """Computes the tiles of one changed tensor; holds the adapters' part of it in float32."""

    def __init__(self, tensor: PlannedTensor, shared: MergeArithmetic) -> None:
        self.tensor = tensor
        self.device = shared.device
        self._loaded = {entry: shared.adapters.load(entry) for entry in self._adapter_entries()}
        self._base = BaseRows.for_tensor(tensor, shared.round_trip, shared.device)
        self._combined = self._combine(shared.combination)
        self._surveyed = self._survey()

    def merge_tile(self, block: Block, first_row: int, num_rows: int) -> memoryview:
        """Return the merged bytes of some rows; they are valid until the thread's next tile.

        Raises:
            LlmtuneError: a merged number is not finite, or not in the dtype's range.
        """
        weight = self._base.read(first_row, num_rows, slot="weight")
        merged = self._merge(weight, block, first_row)
        dtype = TORCH_DTYPES[self.tensor.dtype]
        self._check_finite(merged, dtype, first_row)
        if merged.dtype == dtype and merged.is_contiguous():
            rounded = merged
        else:
            rounded = buffer("rounded", merged.numel(), dtype, self.device).view(merged.shape)
            rounded.copy_(merged)
        return memoryview(rounded.reshape(-1).cpu().view(torch.uint8).numpy())

    def load(self, entry: TensorEntry) -> torch.Tensor:
        """Return a whole tensor of an adapter in float32."""
        return self._loaded[entry]

    def scratch(self, num_rows: int, num_columns: int) -> torch.Tensor:
        """Return the thread's memory for a float32 table."""
        size = num_rows * num_columns
        return buffer("delta", size, torch.float32, self.device).view(num_rows, num_columns)

    def _merge(self, weight: torch.Tensor, block: Block, first_row: int) -> torch.Tensor:
        tensor = self.tensor
        if tensor.blend_base is not None:
            whole = BaseRows(replace(tensor, blend_base=None), self.device)
            trained = whole.read(first_row, weight.shape[0], slot="delta")
            return _blend(weight, trained, tensor.strength)
        if tensor.token_rows is not None:
            self._set_token_rows(weight, tensor.token_rows, first_row)
        start = first_row - block.first_row
        if self._combined:
            weight += self._combined[block.first_row][start : start + weight.shape[0]]
            return weight
        for place, update in enumerate(block.updates):
            update.merge(weight, start, self, self._surveyed[block.first_row, place])
        return weight

    def _combine(self, how: Combination | None) -> dict[int, torch.Tensor]:
        """Return the whole combined delta of each block, if the method needs it whole."""
        if how is None or not how.is_dense or not self.tensor.is_additive:
            return {}
        combined = {}
        for block in self.tensor.blocks:
            updates = [one for one in block.updates if isinstance(one, AdditiveUpdate)]
            deltas = [one.delta(0, block.num_rows, self).clone() for one in updates]
            weights = [one.strength for one in updates]
            name = f"{self.tensor.name}/{block.first_row}"
            combined[block.first_row] = combine_deltas(deltas, weights, how, name=name)
        return combined

    def _survey(self) -> dict[tuple[int, int], torch.Tensor | None]:
        """Let every update see its block of the base, if it has to before the first tile."""
        return {
            (block.first_row, place): update.survey(self._base_tiles(block), self)
            for block in self.tensor.blocks
            for place, update in enumerate(block.updates)
        }

    def _base_tiles(self, wanted: Block) -> Iterator[torch.Tensor]:
        for block, first_row, num_rows in self.tensor.tiles():
            if block is wanted:
                yield self._base.read(first_row, num_rows, slot="weight")

    def _set_token_rows(self, weight: torch.Tensor, entry: TensorEntry, first_row: int) -> None:
        trained = self._loaded[entry]
        for position, token in enumerate(self.tensor.token_indices):
            if first_row <= token < first_row + weight.shape[0]:
                row = weight[token - first_row]
                row.copy_(_blend(row, trained[position], self.tensor.strength))

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
        entries = {entry for update in self.tensor.updates for entry in update.entries}
        return entries if self.tensor.token_rows is None else {*entries, self.tensor.token_rows}


def _blend(base: torch.Tensor, trained: torch.Tensor, strength: float) -> torch.Tensor:
    return trained if strength == 1 else base + strength * (trained - base)
