"""AWQ checkpoints by AutoAWQ: 4-bit numbers packed along the output features, out of order."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from llmtune.io.safetensors import CheckpointIndex
from llmtune.models.stored.base import FLOATS, Parts, StoredFormat, StoredPlan, StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PER_WORD = 8
ENDS = (".qweight", ".qzeros", ".scales")


class AwqFormat(StoredFormat):
    """Whole numbers of 4 bits with a scale and a zero point for each group, `gemm` layout."""

    method: ClassVar[str] = "awq"

    @property
    def title(self) -> str:
        """The method and its bits."""
        return "awq 4-bit"

    def check(self) -> None:
        """Refuse layouts that were made for other kernels."""
        if "w_bit" not in self.knobs:
            self.choose("bits", (4,), 4)
        else:
            self.choose("w_bit", (4,))
        self.choose("version", ("gemm", "GEMM"), "gemm")
        self.group_size(1)

    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """One weight for each `.qweight`."""
        return StoredPlan(tuple(map(self._weight, self.gather(index, ENDS[0], ENDS))))

    def _weight(self, parts: Parts) -> StoredWeight:
        num_inputs, num_words = parts.expect(".qweight", ("I32",), (None, None)).shape
        group_size = self.group_size(num_inputs)
        num_groups = -(-num_inputs // group_size)
        parts.expect(".qzeros", ("I32",), (num_groups, num_words))
        parts.expect(".scales", FLOATS, (num_groups, num_words * PER_WORD))
        return StoredWeight(
            name=f"{parts.stem}.weight",
            shape=(num_words * PER_WORD, num_inputs),
            parts=parts.entries,
            dequantize=partial(_dequantize, group_size=group_size),
        )


def _dequantize(
    parts: Mapping[str, "Tensor"], dtype: "torch.dtype", *, group_size: int
) -> "Tensor":
    from llmtune.ops.packed_integers import dequantize_awq

    words, zeros, scales = (parts[end] for end in ENDS)
    return dequantize_awq(words, zeros, scales, group_size=group_size, dtype=dtype)
