"""HQQ checkpoints in safetensors: codes, zero points and scales, with the layer's settings."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

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

SETTINGS = (
    *(".nbits", ".group_size", ".shape", ".axis", ".packing", ".unpack_view_dtype"),
    *(".view_as_float", ".quant_scale", ".quant_zero", ".compute_dtype", ".offload_meta"),
    *(".encoded_state_dict", ".stores_quant_config", ".channel_wise", ".optimize", ".round_zero"),
)
ENDS = (".W_q", ".zero", ".scale", *SETTINGS)
PACKED_BITS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1, "3bit_32": 3}
THREE_BITS_IN_WORD = 10


class HqqFormat(StoredFormat):
    """Whole numbers of 1 to 8 bits, a zero point and a scale for each group, both floats."""

    method: ClassVar[str] = "hqq"

    @property
    def title(self) -> str:
        """The method and its bits, if all layers have the same."""
        bits = self._bits()
        return f"hqq {bits}-bit" if bits else "hqq"

    def _bits(self) -> object:
        knobs = self.knobs.get("quant_config")
        weights = knobs.get("weight_quant_params") if isinstance(knobs, dict) else None
        return weights.get("nbits") if isinstance(weights, dict) else None

    def check(self) -> None:
        """Nothing in the config changes how it is read: each layer says it."""

    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """One weight for each `.W_q`."""
        return StoredPlan(tuple(map(self._weight, self.gather(index, ENDS[0], ENDS))))

    def _weight(self, parts: Parts) -> StoredWeight:
        if not {".packing", ".encoded_state_dict"} <= parts.entries.keys():
            raise self.refuse(f"{parts.stem} without its settings beside it")
        numbers = {
            end: read_numbers(parts.expect(end, ("U8", "I32", "I64")))
            for end in SETTINGS
            if end in parts.entries and parts.entries[end].dtype in ("U8", "I32", "I64")
        }
        packing = "".join(map(chr, numbers.get(".packing", ())))
        if packing not in PACKED_BITS:
            raise self.refuse(f"packing {packing!r:.40}")
        if any(sum(numbers.get(end, ())) for end in (".quant_scale", ".quant_zero")):
            raise self.refuse("scales that are quantized themselves")
        if any(numbers.get(".view_as_float", ())):
            raise self.refuse("numbers stored as floats")
        parts.expect(".shape", ("I64", "I32"), (2,))
        shape = (numbers[".shape"][0], numbers[".shape"][1])
        codes = parts.expect(".W_q", ("I32",) if packing == "3bit_32" else ("U8",), (None, None))
        zero = parts.expect(".zero", FLOATS, (None, None))
        parts.expect(".scale", FLOATS, zero.shape)
        num_groups, size = math.prod(zero.shape), math.prod(shape)
        if 1 not in zero.shape or not num_groups or size % num_groups:
            parts.expect(".zero", FLOATS, (size // max(1, math.prod(codes.shape)), 1))
        axis = 0 if zero.shape[0] == 1 else 1
        grid = (size // num_groups, num_groups) if axis == 0 else (num_groups, size // num_groups)
        per_row = THREE_BITS_IN_WORD if packing == "3bit_32" else 8 // PACKED_BITS[packing]
        parts.expect(".W_q", (codes.dtype,), (-(-grid[0] // per_row), grid[1]))
        return StoredWeight(
            f"{parts.stem}.weight",
            shape,
            parts.entries,
            partial(_dequantize, shape=shape, num_rows=grid[0], bits=PACKED_BITS[packing]),
        )


def _dequantize(
    parts: Mapping[str, "Tensor"],
    dtype: "torch.dtype",
    *,
    shape: tuple[int, int],
    num_rows: int,
    bits: int,
) -> "Tensor":
    from llmtune.ops.packed_integers import dequantize_hqq, unpack_bytes, unpack_three_bits

    packed = parts[".W_q"]
    codes = unpack_three_bits(packed) if bits == 3 else unpack_bytes(packed, bits)
    return dequantize_hqq(codes[:num_rows], parts[".zero"], parts[".scale"], shape, dtype)
