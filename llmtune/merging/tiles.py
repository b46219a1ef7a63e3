"""The arithmetic of a merge: a few rows of one tensor at a time, in float32, rounded once.

Shapes: out and in are the linear layer's widths; a tensor is seen as a table [rows, columns].
"""

import math
from dataclasses import dataclass, replace

import torch

from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import TensorEntry
from llmtune.merging.changes import Block, LowRankDelta, PlannedTensor
from llmtune.merging.combine import combine_deltas
from llmtune.merging.config import Combination
from llmtune.merging.scratch import CPU, TORCH_DTYPES, buffer
from llmtune.merging.source import AdapterTensors, BaseRows, RoundTrip
from llmtune.merging.tiling import iter_tiles


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
        self._column_norms = self._dora_column_norms() if self._needs_column_norms() else None

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

    def _merge(self, weight: torch.Tensor, block: Block, first_row: int) -> torch.Tensor:
        tensor = self.tensor
        num_rows = weight.shape[0]
        if tensor.blend_base is not None:
            whole = BaseRows(replace(tensor, blend_base=None), self.device)
            trained = whole.read(first_row, num_rows, slot="delta")
            return _blend(weight, trained, tensor.strength)
        if tensor.token_rows is not None:
            self._set_token_rows(weight, first_row)
        if tensor.added_bias is not None:
            weight += self._loaded[tensor.added_bias] * tensor.bias_scaling
        base = weight.clone() if tensor.magnitude is not None and tensor.strength != 1 else None
        self._add_deltas(weight, block, first_row)
        if tensor.magnitude is not None:
            self._set_magnitude(weight, tensor.magnitude, first_row)
        return weight if base is None else _blend(base, weight, tensor.strength)

    def _add_deltas(self, weight: torch.Tensor, block: Block, first_row: int) -> None:
        start = first_row - block.first_row
        if self._combined:
            weight += self._combined[block.first_row][start : start + weight.shape[0]]
            return
        for delta in block.deltas:
            weight += self._delta_rows(
                delta, start, weight.shape[0], factor=delta.scaling * delta.weight
            )

    def _delta_rows(
        self, delta: LowRankDelta, start: int, num_rows: int, *, factor: float
    ) -> torch.Tensor:
        """Return factor * (B @ A), or its transpose, for some rows of a block: [rows, columns]."""
        left_OR, right_RI = self._factors(delta)
        if delta.is_transposed:
            right_RI = right_RI[:, start : start + num_rows]
        else:
            left_OR = left_OR[start : start + num_rows]
        is_exact = math.frexp(factor)[0] == 0.5  # by a power of two: no rounding, in any order
        if is_exact:
            left_OR = left_OR * factor
        shape = (left_OR.shape[0], right_RI.shape[1])
        product = buffer("delta", math.prod(shape), torch.float32, self.device).view(shape)
        torch.mm(left_OR, right_RI, out=product)
        if not is_exact:
            product *= factor
        return product.t() if delta.is_transposed else product

    def _factors(self, delta: LowRankDelta) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self._loaded[delta.a], self._loaded[delta.b]
        if delta.num_experts > 1:
            # PEFT stacks A as [experts, rank] and B as [rank, experts] (lora.layer.ParamWrapper).
            a = a.view(delta.num_experts, -1, a.shape[1])[delta.expert]
            b = b.view(b.shape[0], -1, delta.num_experts)[:, :, delta.expert]
        b = b[delta.first_out : delta.first_out + delta.num_out]
        return b.contiguous(), a

    def _combine(self, how: Combination | None) -> dict[int, torch.Tensor]:
        """Return the whole combined delta of each block, where the method needs it whole."""
        if how is None or not how.is_dense:
            return {}
        combined = {}
        for block in self.tensor.blocks:
            deltas = [
                self._delta_rows(delta, 0, block.num_rows, factor=delta.scaling).clone()
                for delta in block.deltas
            ]
            weights = [delta.weight for delta in block.deltas]
            name = f"{self.tensor.name}/{block.first_row}"
            combined[block.first_row] = combine_deltas(deltas, weights, how, name=name)
        return combined

    def _set_magnitude(self, weight: torch.Tensor, magnitude: TensorEntry, first_row: int) -> None:
        """Give every output's weights the norm that DoRA learned (arXiv 2402.09353, eq. 5)."""
        learned = self._loaded[magnitude]
        if self._column_norms is not None:
            weight *= learned / self._column_norms
        else:
            learned = learned[first_row : first_row + weight.shape[0]]
            weight *= (learned / torch.linalg.norm(weight, dim=1))[:, None]

    def _needs_column_norms(self) -> bool:
        deltas = self.tensor.deltas
        return self.tensor.magnitude is not None and bool(deltas) and deltas[0].is_transposed

    def _dora_column_norms(self) -> torch.Tensor:
        """Return the norms of W + delta along the stored rows, where outputs are columns: [out]."""
        squares = torch.zeros(self.tensor.num_columns, dtype=torch.float64, device=self.device)
        for block, first_row, num_rows in iter_tiles(self.tensor):
            weight = self._base.read(first_row, num_rows, slot="weight")
            self._add_deltas(weight, block, first_row)
            squares += weight.double().square().sum(dim=0)
        return squares.sqrt().float()

    def _set_token_rows(self, weight: torch.Tensor, first_row: int) -> None:
        assert self.tensor.token_rows is not None
        trained = self._loaded[self.tensor.token_rows]
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
        tensor = self.tensor
        entries = [tensor.magnitude, tensor.added_bias, tensor.token_rows]
        entries += [entry for delta in tensor.deltas for entry in (delta.a, delta.b)]
        return {entry for entry in entries if entry is not None}


def _blend(base: torch.Tensor, trained: torch.Tensor, strength: float) -> torch.Tensor:
    return trained if strength == 1 else base + strength * (trained - base)
