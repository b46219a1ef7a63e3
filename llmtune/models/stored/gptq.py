"""GPTQ checkpoints by AutoGPTQ and GPTQModel: whole numbers packed along the input features."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from llmtune.io.safetensors import CheckpointIndex
from llmtune.models.stored.base import FLOATS, Parts, StoredFormat, StoredPlan, StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS = (2, 3, 4, 8)
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""How much less than the zero point is stored, by `checkpoint_format`."""
ENDS = (".qweight", ".qzeros", ".scales", ".g_idx")
WORD = 32


class GptqFormat(StoredFormat):
    """Whole numbers of 2, 3, 4 or 8 bits with a scale and a zero point for each group."""

    method: ClassVar[str] = "gptq"

    @property
    def title(self) -> str:
        """The method and its bits."""
        return f"gptq {self.knobs['bits']}-bit"

    def check(self) -> None:
        """Refuse layouts that were made for one kernel, such as marlin."""
        self.choose("bits", BITS)
        if self.knobs.get("is_marlin_format"):
            raise self.refuse("marlin layout")
        if "checkpoint_format" in self.knobs:
            self.choose("checkpoint_format", tuple(ZERO_OFFSETS))
        self.group_size(1)

    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """One weight for each `.qweight`."""
        return StoredPlan(tuple(map(self._weight, self.gather(index, ENDS[0], ENDS))))

    def _weight(self, parts: Parts) -> StoredWeight:
        packed = parts.expect(".qweight", ("I32",), (None, None))
        num_words, num_outputs = packed.shape
        bits = self.knobs["bits"]
        num_inputs = num_words * WORD // bits
        if ".g_idx" in parts.entries:
            (num_inputs,) = parts.expect(".g_idx", ("I32",), (None,)).shape
            fitting = [b for b in BITS if num_inputs * b == num_words * WORD]
            if self.knobs.get("dynamic") and fitting:  # some layers have bits of their own
                bits = fitting[0]
            parts.expect(".g_idx", ("I32",), (num_words * WORD // bits,))
        group_size = self.group_size(num_inputs)
        num_groups = -(-num_inputs // group_size)
        if self.knobs.get("dynamic"):
            num_groups = parts.expect(".scales", FLOATS, (None, num_outputs)).shape[0]
            group_size = -(-num_inputs // max(1, num_groups))
        parts.expect(".scales", FLOATS, (num_groups, num_outputs))
        if ".qzeros" in parts.entries or not self.knobs.get("sym"):
            parts.expect(".qzeros", ("I32",), (num_groups, num_outputs * bits // WORD))
        zero_offset = ZERO_OFFSETS[self.knobs.get("checkpoint_format", "gptq")]
        return StoredWeight(
            name=f"{parts.stem}.weight",
            shape=(num_outputs, num_inputs),
            parts=parts.entries,
            dequantize=partial(
                _dequantize, bits=bits, group_size=group_size, zero_offset=zero_offset
            ),
        )


def _dequantize(
    parts: Mapping[str, "Tensor"],
    dtype: "torch.dtype",
    *,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> "Tensor":
    from llmtune.ops.packed_integers import dequantize_gptq, groups_of, unpack_gptq_zeros

    num_groups = len(parts[".scales"])
    group_of_I = groups_of(len(parts[".qweight"]) * WORD // bits, group_size)
    if ".g_idx" in parts and (num_groups == 1 or parts[".g_idx"].any()):
        group_of_I = parts[".g_idx"].long()  # all zeros are a placeholder: no order was kept
    if not 0 <= int(group_of_I.min()) <= int(group_of_I.max()) < num_groups:
        raise ValueError(f"g_idx names groups that are not among the {num_groups} in scales")
    zeros_GO = None
    if ".qzeros" in parts:
        zeros_GO = unpack_gptq_zeros(parts[".qzeros"], bits, zero_offset)
    return dequantize_gptq(
        parts[".qweight"],
        zeros_GO,
        parts[".scales"],
        group_of_I,
        bits=bits,
        dtype=dtype,
    )
