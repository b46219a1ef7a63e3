"""FP8 checkpoints as DeepSeek, Qwen and Mistral publish them: 8-bit floats, a scale per block."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import FETCH_AGAIN
from llmtune.io.safetensors import CheckpointIndex, TensorEntry
from llmtune.models.stored.base import StoredFormat, StoredPlan, StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHT_DTYPES = ("F8_E4M3", "F8_E5M2")
PACKED_DTYPES = ("I8", "F4")
"""Of two 4-bit floats in a byte, in DeepSeek-V4's experts."""
SCALE_ENDS = ("_scale_inv", "_scale", ".scale", ".qscale_weight")
ACTIVATION_ENDS = (
    *("activation_scale", "input_scale", "qscale_act"),
    *(".k_scale", ".v_scale", ".q_scale"),
)
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


class Fp8Format(StoredFormat):
    """8-bit floats with a scale for each block, row or tensor."""

    method: ClassVar[str] = "fp8"
    aliases: ClassVar[tuple[str, ...]] = ("fbgemm_fp8",)

    @property
    def title(self) -> str:
        """The method."""
        return "fp8"

    def check(self) -> None:
        """Refuse blocks that are not two sizes."""
        block = self.knobs.get("weight_block_size")
        is_pair = isinstance(block, list) and len(block) == 2
        if block is not None and not (is_pair and all(type(b) is int and b > 0 for b in block)):
            raise self.refuse(f"weight_block_size {str(block)!r:.40}, expected two whole numbers")

    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """One weight for each tensor of 8-bit floats, and of packed 4-bit ones with a scale."""
        weights = []
        for name, entry in index.tensors.items():
            if entry.dtype not in WEIGHT_DTYPES + PACKED_DTYPES:
                continue
            scale = self._find_scale(index, name)
            if scale is None:
                if entry.dtype in PACKED_DTYPES:
                    continue
                raise LlmtuneError(
                    f"{self.place}: {name} is stored in 8 bits and {name}{SCALE_ENDS[0]} is "
                    f"missing; {FETCH_AGAIN}"
                )
            weights.append(self._weight(entry, scale))
        dropped = {name for name in index.tensors if name.endswith(ACTIVATION_ENDS)}
        return StoredPlan(tuple(weights), frozenset(dropped))

    def _find_scale(self, index: CheckpointIndex, name: str) -> TensorEntry | None:
        stem = name.removesuffix(".weight")
        names = [name + end if end.startswith("_") else stem + end for end in SCALE_ENDS]
        return next((index.tensors[one] for one in names if one in index.tensors), None)

    def _weight(self, entry: TensorEntry, scale: TensorEntry) -> StoredWeight:
        is_packed = entry.dtype == "I8"
        shape = (*entry.shape[:-1], entry.shape[-1] * 2) if is_packed else entry.shape
        block = self._block(shape, scale.shape) if scale.dtype in SCALE_DTYPES else None
        if block is None or entry.dtype == "F4":
            raise LlmtuneError(
                f"{self.place}: {scale.name} is {scale.dtype} {list(scale.shape)}, which does not "
                f"fit {entry.name}, {entry.dtype} {list(entry.shape)}; {FETCH_AGAIN}"
            )
        return StoredWeight(
            name=entry.name,
            shape=shape,
            parts={"weight": entry, "scale": scale},
            dequantize=partial(_dequantize, block=block),
        )

    def _block(self, shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int] | None:
        """Return rows and columns of a block: the config's if they fit, else what the grid says."""
        if len(shape) < 2:
            return None
        rows, columns = shape[-2:]
        if grid in ((), (1,)) or grid in (shape[:-2], (*shape[:-2], 1, 1)):
            return rows, columns
        if len(grid) != len(shape) or grid[:-2] != shape[:-2] or 0 in grid:
            return None
        height, width = self.knobs.get("weight_block_size") or (0, 0)
        if height and (-(-rows // height), -(-columns // width)) == grid[-2:]:
            return height, width
        if rows % grid[-2] or columns % grid[-1]:
            return None
        return rows // grid[-2], columns // grid[-1]


def _dequantize(
    parts: Mapping[str, "Tensor"], dtype: "torch.dtype", *, block: tuple[int, int]
) -> "Tensor":
    import torch

    from llmtune.ops.block_floats import dequantize_blocks, unpack_e2m1

    weight, scales = parts["weight"], parts["scale"]
    if weight.dtype == torch.int8:
        weight = unpack_e2m1(weight)
    grid = tuple(-(-size // step) for size, step in zip(weight.shape[-2:], block, strict=True))
    scales = scales.reshape(-1) if scales.numel() == 1 else scales
    scales = scales.expand(*weight.shape[:-2], *grid) if scales.numel() == 1 else scales
    return dequantize_blocks(weight, scales.reshape(*weight.shape[:-2], *grid), block, dtype)
