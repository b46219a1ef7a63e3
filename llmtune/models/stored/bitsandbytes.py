"""Checkpoints that bitsandbytes quantized, in 4 bits (QLoRA) or 8 (LLM.int8)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from llmtune.io.safetensors import CheckpointIndex
from llmtune.models.quantization.config import packed_markers
from llmtune.models.stored.base import Parts, StoredFormat, StoredPlan, StoredWeight
from llmtune.models.stored.four_bits import read_four_bit_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCALES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
EIGHT_BITS = (".weight", ".SCB", ".weight_format")
LARGEST_CODE = 127


class BitsAndBytesFormat(StoredFormat):
    """4-bit codes in blocks, or 8-bit numbers with a scale for each row."""

    method: ClassVar[str] = "bitsandbytes"
    loads_as_is: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """The method and its bits."""
        return f"bitsandbytes {4 if self._has_four_bits else 8}-bit"

    @property
    def _has_four_bits(self) -> bool:
        return bool(self.knobs.get("load_in_4bit") or self.knobs.get("_load_in_4bit"))

    def check(self) -> None:
        """Refuse a config that says neither 4 nor 8 bits."""
        has_eight = self.knobs.get("load_in_8bit") or self.knobs.get("_load_in_8bit")
        if not self._has_four_bits and not has_eight:
            raise self.refuse("neither load_in_4bit nor load_in_8bit")

    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """One weight for each description of its state, or for each row of scales."""
        if not self._has_four_bits:
            found = self.gather(index, ".SCB", EIGHT_BITS)
            return StoredPlan(tuple(_eight_bit_weight(parts) for parts in found))
        weights = []
        for marker in packed_markers():
            ends = ("", *SCALES, f".{marker}")
            for parts in self.gather(index, f".{marker}", ends):
                weights.append(self._four_bit_weight(parts, f".{marker}"))
        return StoredPlan(tuple(weights))

    def _four_bit_weight(self, parts: Parts, marker: str) -> StoredWeight:
        packed = parts.expect("", ("U8", "BF16", "F16", "F32"))
        header = parts.expect(marker, ("U8",))
        for end in SCALES[:2]:
            parts.expect(end, ("U8", "F32"))
        shape = read_four_bit_header(header, packed).shape
        return StoredWeight(parts.stem, shape, parts.entries, _dequantize_four_bits)


def _eight_bit_weight(parts: Parts) -> StoredWeight:
    shape = parts.expect(".weight", ("I8",), (None, None)).shape
    parts.expect(".SCB", ("F32",), shape[:1])
    return StoredWeight(f"{parts.stem}.weight", shape, parts.entries, _dequantize_eight_bits)


def _dequantize_four_bits(parts: Mapping[str, "Tensor"], dtype: "torch.dtype") -> "Tensor":
    from llmtune.ops.nf4 import dequantize, read_four_bit_weight

    state = {end.removeprefix("."): tensor for end, tensor in parts.items() if end}
    return dequantize(read_four_bit_weight(parts[""], state)).to(dtype)


def _dequantize_eight_bits(parts: Mapping[str, "Tensor"], dtype: "torch.dtype") -> "Tensor":
    from llmtune.ops.block_floats import dequantize_blocks

    weight = parts[".weight"]
    scales = parts[".SCB"].unsqueeze(1) / LARGEST_CODE
    return dequantize_blocks(weight, scales, (1, weight.shape[1]), dtype)
