"""Reading rows of the base: as they are on disk, or as a quantized copy computes with them."""

from collections.abc import Iterator

import torch

from llmtune.io.json_files import blamed_on
from llmtune.io.safetensors import TensorEntry
from llmtune.merging.changes import PackedFourBit, PlannedTensor, Requantized, RoundTrip
from llmtune.merging.scratch import buffer, read_rows, read_tensor
from llmtune.ops.nf4 import FourBitWeight, dequantize_rows, read_four_bit_weight


class BaseRows:
    """The rows of one base tensor in float32; `for_tensor` chooses how they are read."""

    def __init__(self, tensor: PlannedTensor, device: torch.device) -> None:
        self.entry = tensor.blend_base or tensor.source
        self.columns = tensor.num_columns
        self.device = device

    @staticmethod
    def for_tensor(
        tensor: PlannedTensor, round_trip: RoundTrip | None, device: torch.device
    ) -> "BaseRows":
        """Return the reader for a planned tensor."""
        if isinstance(tensor.dequantized, PackedFourBit):
            return _PackedRows(tensor, tensor.dequantized, device)
        if isinstance(tensor.dequantized, Requantized):
            assert round_trip is not None
            if tensor.dequantized.is_transposed:
                return _TransposedRows(tensor, round_trip, device)
            return _RequantizedRows(tensor, round_trip, device)
        return BaseRows(tensor, device)

    def read(self, first_row: int, num_rows: int, *, slot: str) -> torch.Tensor:
        """Return some rows, [num_rows, columns] in float32, in the thread's buffer `slot`."""
        return self._widen(read_rows(self.entry, first_row, num_rows, self.columns), slot)

    def _widen(self, rows: torch.Tensor, slot: str) -> torch.Tensor:
        tile = buffer(slot, rows.numel(), torch.float32, self.device)
        tile.copy_(rows.reshape(-1))
        return tile.view(rows.shape)


class _RequantizedRows(BaseRows):
    """Rows that were quantized and dequantized again; holds one scale for 64 weights."""

    def __init__(self, tensor: PlannedTensor, round_trip: RoundTrip, device: torch.device) -> None:
        super().__init__(tensor, device)
        self.round_trip = round_trip
        self.scales = round_trip.measure(self._stored_tiles(tensor))

    def _stored_tiles(self, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
        for _, first_row, num_rows in tensor.tiles():
            yield read_rows(self.entry, first_row, num_rows, self.columns)

    def read(self, first_row: int, num_rows: int, *, slot: str) -> torch.Tensor:
        stored = read_rows(self.entry, first_row, num_rows, self.columns)
        part = None
        if self.scales is not None:
            size = self.round_trip.block_size
            start = first_row * self.columns // size
            part = self.scales[start : start - (-stored.numel() // size)]
        return self._widen(self.round_trip.apply(stored, part), slot)


class _TransposedRows(BaseRows):
    """A Conv1D weight: its blocks run across the stored rows, so it is held whole, in 16 bits."""

    def __init__(self, tensor: PlannedTensor, round_trip: RoundTrip, device: torch.device) -> None:
        super().__init__(tensor, device)
        quantized_as = read_tensor(self.entry).t().contiguous()
        scales = round_trip.measure([quantized_as])
        self.whole = round_trip.apply(quantized_as, scales).t()

    def read(self, first_row: int, num_rows: int, *, slot: str) -> torch.Tensor:
        return self._widen(self.whole[first_row : first_row + num_rows], slot)


class _PackedRows(BaseRows):
    """A weight that the base's files hold in 4 bits; they are held whole, half a byte each."""

    def __init__(self, tensor: PlannedTensor, packed: PackedFourBit, device: torch.device) -> None:
        super().__init__(tensor, device)
        with blamed_on(self.entry.path, f"the 4-bit reader of {self.entry.name!r}"):
            state = {suffix: read_tensor(entry) for suffix, entry in packed.state}
            self.weight: FourBitWeight = read_four_bit_weight(read_tensor(self.entry), state)

    def read(self, first_row: int, num_rows: int, *, slot: str) -> torch.Tensor:
        return self._widen(dequantize_rows(self.weight, first_row, first_row + num_rows), slot)


class AdapterTensors:
    """Loads the adapters' tensors in float32 and keeps the latest: experts share a stack."""

    NUM_KEPT = 6

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[TensorEntry, torch.Tensor] = {}

    def load(self, entry: TensorEntry) -> torch.Tensor:
        """Return one tensor in float32, in its own shape."""
        tensor = self._kept.pop(entry, None)
        if tensor is None:
            tensor = read_tensor(entry).to(self.device).float()
        self._kept[entry] = tensor  # last in the order: the latest used
        if len(self._kept) > self.NUM_KEPT:
            del self._kept[next(iter(self._kept))]
        return tensor
