"""Checkpoints by compressed-tensors (llm-compressor): packed integers, 8-bit and 4-bit floats."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from llmtune.io.fingerprint import JsonObject
from llmtune.io.safetensors import CheckpointIndex
from llmtune.models.stored.base import (
    FLOATS,
    Parts,
    StoredFormat,
    StoredPlan,
    StoredWeight,
    read_numbers,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WORD = 32
LAYOUTS = (
    *("pack-quantized", "naive-quantized", "int-quantized", "float-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "dense"),
    "mixed-precision",
)
WEIGHT_ENDS = (".weight", ".weight_scale", ".weight_zero_point", ".weight_g_idx")
PACKED_ENDS = (
    *(".weight_packed", ".weight_scale", ".weight_zero_point"),
    *(".weight_shape", ".weight_g_idx", ".weight_global_scale"),
)
DROPPED_ENDS = (
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".input_g_idx"),
    *(".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale"),
)
SMALL_DTYPES = ("I8", "F8_E4M3", "F8_E5M2")


class CompressedTensorsFormat(StoredFormat):
    """Each layer in the layout that its tensors show."""

    method: ClassVar[str] = "compressed-tensors"

    @property
    def title(self) -> str:
        """The method and its layout."""
        return f"compressed-tensors {self.knobs['format']}"

    def check(self) -> None:
        """Refuse sparse layouts, and weights that are rotated as the model runs."""
        self.choose("format", LAYOUTS)
        groups = self.knobs.get("config_groups") or {}
        if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
            raise self.refuse(f"config_groups {str(groups)!r:.40}, expected an object of objects")
        for group in groups.values():
            if group.get("format") not in (None, *LAYOUTS):
                raise self.refuse(f"format {str(group['format'])!r:.40}")
        sparsity = self.knobs.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise self.refuse(f"sparse weights, {str(sparsity['format'])!r:.40}")
        if self.knobs.get("transform_config"):
            raise self.refuse("weights rotated by transform_config")

    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """One weight for each that is packed, or is stored in 8 bits."""
        packed = map(self._packed_weight, self.gather(index, PACKED_ENDS[0], PACKED_ENDS))
        weights = (*packed, *self._small_weights(index))
        dropped = frozenset(name for name in index.tensors if name.endswith(DROPPED_ENDS))
        return StoredPlan(weights, dropped)

    def _small_weights(self, index: CheckpointIndex) -> Iterator[StoredWeight]:
        for parts in self.gather(index, WEIGHT_ENDS[0], WEIGHT_ENDS):
            entry = parts.entries[".weight"]
            if entry.dtype not in SMALL_DTYPES:
                continue
            parts.expect(".weight", SMALL_DTYPES, (None, None))
            rows, columns = entry.shape
            dtypes = (*FLOATS, "U8", "F8_E8M0")
            grids = ((1,), (), (rows, None), (None, None))
            grid = parts.expect(".weight_scale", dtypes, *grids).shape
            block = self._block((rows, columns), grid)
            if block is None:  # said by what no grid fits
                parts.expect(".weight_scale", dtypes, (rows, 1), (1,))
            yield StoredWeight(
                f"{parts.stem}.weight",
                entry.shape,
                parts.entries,
                partial(_dequantize_small, block=block or (1, 1)),
            )

    def _block(self, shape: tuple[int, int], grid: tuple[int, ...]) -> tuple[int, int] | None:
        """Return rows and columns of what shares a scale: a block of the config, or even parts."""
        if math.prod(grid) == 1:
            return shape
        for weights in self._weight_knobs():
            block = weights.get("block_structure")
            if isinstance(block, list) and [type(size) for size in block] == [int, int]:
                height, width = block
                if min(height, width) < 1:
                    continue
                if (-(-shape[0] // height), -(-shape[1] // width)) == grid:
                    return height, width
        if 0 in grid or len(grid) != 2 or shape[0] % grid[0] or shape[1] % grid[1]:
            return None
        return shape[0] // grid[0], shape[1] // grid[1]

    def _weight_knobs(self) -> Iterator[JsonObject]:
        for group in (self.knobs.get("config_groups") or {}).values():
            if isinstance(group.get("weights"), dict):
                yield group["weights"]

    def _packed_weight(self, parts: Parts) -> StoredWeight:
        packed = parts.expect(".weight_packed", ("I32", "U8"), (None, None))
        rows, width = packed.shape
        if packed.dtype == "U8":
            return self._four_bit_floats(parts, (rows, width * 2))
        shape = read_numbers(parts.expect(".weight_shape", ("I64", "I32"), (2,)))
        columns = shape[1]
        fitting = [
            bits
            for bits in (weights.get("num_bits") for weights in self._weight_knobs())
            if type(bits) is int and 1 <= bits <= 8 and -(-columns * bits // WORD) == width
        ]
        if not fitting or shape[0] != rows:
            raise self.refuse(
                f"{packed.name} I32 {[rows, width]} holds no {list(shape)} of the config's num_bits"
            )
        bits = fitting[0]
        scale = parts.expect(".weight_scale", FLOATS, (rows, None), (1,))
        num_groups = scale.shape[-1]
        if not num_groups or (columns % num_groups and ".weight_g_idx" not in parts.entries):
            parts.expect(".weight_scale", FLOATS, (rows, 1))
        if ".weight_g_idx" in parts.entries:
            parts.expect(".weight_g_idx", ("I32", "I64"), (columns,))
        if ".weight_zero_point" in parts.entries:
            words = -(-rows * bits // WORD)
            parts.expect(".weight_zero_point", ("I32",), (words, num_groups))
        return StoredWeight(
            f"{parts.stem}.weight",
            (rows, columns),
            parts.entries,
            partial(_dequantize_packed, shape=(rows, columns), bits=bits),
        )

    def _four_bit_floats(self, parts: Parts, shape: tuple[int, int]) -> StoredWeight:
        rows, columns = shape
        dtypes = ("F8_E4M3", "U8", "F8_E8M0", *FLOATS)
        num_groups = parts.expect(".weight_scale", dtypes, (rows, None)).shape[1]
        if not num_groups or columns % num_groups:
            parts.expect(".weight_scale", dtypes, (rows, columns // 16), (rows, columns // 32))
        if parts.entries[".weight_scale"].dtype == "F8_E4M3":
            parts.expect(".weight_global_scale", ("F32",), (1,), ())
        return StoredWeight(f"{parts.stem}.weight", shape, parts.entries, _dequantize_fp4)


def _dequantize_small(
    parts: Mapping[str, "Tensor"], dtype: "torch.dtype", *, block: tuple[int, int]
) -> "Tensor":
    from llmtune.ops.block_floats import dequantize_blocks, subtract_zeros

    weight, scales = parts[".weight"], parts[".weight_scale"]
    grid = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if ".weight_zero_point" in parts:
        weight = subtract_zeros(weight, parts[".weight_zero_point"].reshape(grid), block)
    return dequantize_blocks(weight, scales.reshape(grid), block, dtype)


def _dequantize_packed(
    parts: Mapping[str, "Tensor"],
    dtype: "torch.dtype",
    *,
    shape: tuple[int, int],
    bits: int,
) -> "Tensor":
    from llmtune.ops.packed_integers import dequantize_packed, groups_of

    scales = parts[".weight_scale"].reshape(-1, parts[".weight_scale"].shape[-1])
    scales = scales.expand(shape[0], -1)
    num_groups = scales.shape[1]
    if ".weight_g_idx" in parts:
        group_of_I = parts[".weight_g_idx"].long()
        if not 0 <= int(group_of_I.min()) <= int(group_of_I.max()) < num_groups:
            raise ValueError(f"weight_g_idx names groups that are not among the {num_groups}")
    else:
        group_of_I = groups_of(shape[1], shape[1] // num_groups)
    zeros = parts.get(".weight_zero_point")
    return dequantize_packed(
        parts[".weight_packed"], zeros, scales, group_of_I, bits=bits, dtype=dtype
    )


def _dequantize_fp4(parts: Mapping[str, "Tensor"], dtype: "torch.dtype") -> "Tensor":
    from llmtune.ops.block_floats import dequantize_blocks, read_scales, unpack_e2m1

    scales = read_scales(parts[".weight_scale"])
    if ".weight_global_scale" in parts:
        scales = scales / parts[".weight_global_scale"].float()
    values = unpack_e2m1(parts[".weight_packed"])
    return dequantize_blocks(values, scales, (1, values.shape[1] // scales.shape[1]), dtype)
