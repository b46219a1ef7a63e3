"""MXFP4 checkpoints as gpt-oss is published: fused experts in 4-bit floats."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from llmtune.io.safetensors import CheckpointIndex
from llmtune.models.stored.base import Parts, StoredFormat, StoredPlan, StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ENDS = ("_blocks", "_scales")
BLOCK_BYTES = 16


class Mxfp4Format(StoredFormat):
    """4-bit floats, a power of two for each 32 of them."""

    method: ClassVar[str] = "mxfp4"

    @property
    def title(self) -> str:
        """The method."""
        return "mxfp4"

    def check(self) -> None:
        """Nothing in the config changes how it is read."""

    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """One stack of experts for each `_blocks`."""
        return StoredPlan(tuple(map(_weight, self.gather(index, ENDS[0], ENDS))))


def _weight(parts: Parts) -> StoredWeight:
    blocks = parts.expect("_blocks", ("U8",), (None, None, None, BLOCK_BYTES))
    experts, outputs, groups, _ = blocks.shape
    parts.expect("_scales", ("U8",), (experts, outputs, groups))
    shape = (experts, groups * BLOCK_BYTES * 2, outputs)
    return StoredWeight(parts.stem, shape, parts.entries, _dequantize)


def _dequantize(parts: Mapping[str, "Tensor"], dtype: "torch.dtype") -> "Tensor":
    from llmtune.ops.block_floats import dequantize_expert_stack

    return dequantize_expert_stack(parts["_blocks"], parts["_scales"], dtype)
