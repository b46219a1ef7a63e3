"""torchao checkpoints in safetensors: 8-bit floats and whole numbers, described in the headers."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.io.json_files import parse_json
from llmtune.io.safetensors import CheckpointIndex, TensorEntry
from llmtune.models.stored.base import FLOATS, Parts, StoredFormat, StoredPlan, StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NUMBERS = ("I8", "F8_E4M3", "F8_E5M2")
READ = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")
"""Of torchao's tensor classes; the others are packed for one kind of GPU."""
ENDS = ("qdata", "scale", "zero_point")
ACTIVATION_ENDS = ("act_quant_scale", "act_quant_zero_point")
PRE_SCALE = "act_pre_scale"


class TorchaoFormat(StoredFormat):
    """8-bit numbers with a scale for each row, block or tensor."""

    method: ClassVar[str] = "torchao"

    @property
    def title(self) -> str:
        """The method, and the first thing that it says of itself."""
        kind = self.knobs.get("quant_type")
        named = kind.get("default") if isinstance(kind, dict) else kind
        name = named.get("_type") if isinstance(named, dict) else named
        return f"torchao {name}" if isinstance(name, str) else "torchao"

    def check(self) -> None:
        """Nothing in the config changes how it is read: the headers say it."""

    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """One weight for each that a header describes as one of torchao's tensors."""
        described = {key: text for shard in index.shards for key, text in shard.metadata.items()}
        weights, dropped = [], set()
        for name, text in described.items():
            kind = _kind_of(text)
            if kind is None or kind == "Tensor":
                continue
            stem, _, last = name.rpartition(".")
            prefix = f"{stem}._{last}_"
            if kind not in READ:
                raise self.refuse(f"{name} is {kind:.60}, expected {' or '.join(READ)}")
            if prefix + PRE_SCALE in index.tensors:
                raise self.refuse(f"{name} has {PRE_SCALE}")
            found = {
                end: index.tensors[prefix + end] for end in ENDS if prefix + end in index.tensors
            }
            weights.append(_weight(name, Parts(self.place, prefix, found)))
            dropped |= {prefix + end for end in ACTIVATION_ENDS if prefix + end in index.tensors}
        if not weights:
            raise self.refuse("no weight that its headers describe")
        return StoredPlan(tuple(weights), frozenset(dropped))


def _kind_of(text: str) -> str | None:
    """Return the class that a header's text describes; None if it describes none."""
    try:
        value: Any = parse_json(text)
    except ValueError:
        return None
    kind = value.get("_type") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else None


def _weight(name: str, parts: Parts) -> StoredWeight:
    rows, columns = parts.expect("qdata", NUMBERS, (None, None)).shape
    scale = parts.expect("scale", FLOATS)
    block = _block((rows, columns), scale)
    if block is None:  # said by what no block fits
        parts.expect("scale", FLOATS, (rows, 1), (1, 1))
    return StoredWeight(
        name, (rows, columns), parts.entries, partial(_dequantize, block=block or (1, 1))
    )


def _block(shape: tuple[int, int], scale: TensorEntry) -> tuple[int, int] | None:
    """Return rows and columns of what shares a scale."""
    if math.prod(scale.shape) == 1:
        return shape
    grid = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1)
    if len(grid) != 2 or 0 in grid or shape[0] % grid[0] or shape[1] % grid[1]:
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


def _dequantize(
    parts: Mapping[str, "Tensor"], dtype: "torch.dtype", *, block: tuple[int, int]
) -> "Tensor":
    from llmtune.ops.block_floats import dequantize_blocks, subtract_zeros

    weight = parts["qdata"]
    grid = tuple(size // step for size, step in zip(weight.shape, block, strict=True))
    if "zero_point" in parts:
        weight = subtract_zeros(weight, parts["zero_point"].reshape(grid), block)
    return dequantize_blocks(weight, parts["scale"].reshape(grid), block, dtype)
