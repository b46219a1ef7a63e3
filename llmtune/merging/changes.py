"""What a merge does to each tensor: the plan's vocabulary, plain data without any weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.io.safetensors import SafetensorsFile, TensorEntry, tensor_bytes

if TYPE_CHECKING:
    from llmtune.merging.config import Combination
    from llmtune.merging.source import RoundTrip

ADAPTER_PREFIX = "base_model.model."  # what the names of an adapter's tensors begin with


@dataclass(frozen=True)
class LowRankDelta:
    """scaling * B @ A, or its transpose where the base stores its weight as [in, out]."""

    a: TensorEntry  # [rank, in]; [num_experts * rank, in] for a stack of experts
    b: TensorEntry  # [out, rank]; [out, rank * num_experts]
    scaling: float
    weight: float = 1.0  # the adapter's: how much of it is added
    is_transposed: bool = False
    expert: int = 0
    num_experts: int = 1
    first_out: int = 0  # the first of B's rows that this tensor takes
    num_out: int = 0  # how many of them


@dataclass(frozen=True)
class Block:
    """Some rows of a tensor, seen as a table [rows, columns], and the deltas they get."""

    first_row: int
    num_rows: int
    deltas: tuple[LowRankDelta, ...] = ()  # one an adapter, in the order in which they are added


@dataclass(frozen=True)
class Requantized:
    """The base's tensor is taken as a quantized layer computes with it (`merge.base`)."""

    is_transposed: bool  # stored [in, out]; quantized as [out, in]


@dataclass(frozen=True)
class PackedFourBit:
    """The base's tensor is stored in 4 bits by bitsandbytes; these tensors belong to it."""

    state: tuple[tuple[str, TensorEntry], ...]  # suffix (`ops.nf4.STATE_SUFFIXES`), tensor


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged model: where its bytes come from and what is done to them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorEntry
    blocks: tuple[Block, ...] = ()
    magnitude: TensorEntry | None = None  # DoRA: [out]
    added_bias: TensorEntry | None = None  # LoRA's own bias, times `bias_scaling`
    bias_scaling: float = 0.0
    token_rows: TensorEntry | None = None  # rows that replace those at `token_indices`
    token_indices: tuple[int, ...] = ()
    blend_base: TensorEntry | None = None  # strength != 1: base + strength * (trained - base)
    strength: float = 1.0  # of what is not a low-rank delta
    dequantized: Requantized | PackedFourBit | None = None  # how the base's tensor is read

    @property
    def num_columns(self) -> int:
        """The width of the tensor seen as a table; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        """The height of the tensor seen as a table."""
        return math.prod(self.shape[:-1])

    @property
    def deltas(self) -> tuple[LowRankDelta, ...]:
        """All low-rank deltas of the tensor, block by block."""
        return tuple(delta for block in self.blocks for delta in block.deltas)

    @property
    def change(self) -> str:
        """What happens to the tensor, in one word for the plan's table."""
        if self.magnitude is not None:
            return "dora"
        if self.blocks:
            return "lora"
        if self.added_bias is not None:
            return "bias"
        if self.token_rows is not None:
            return "rows"
        if self.source.name == self.name:
            return "none" if self.dequantized is None else "dequantized"
        return "replace" if self.source.name.startswith(ADAPTER_PREFIX) else "untie"

    @property
    def is_copied(self) -> bool:
        """Whether the source's bytes go into the merged file as they are."""
        is_changed = self.change not in {"none", "replace", "untie"}
        return not (is_changed or self.blend_base or self.source.dtype != self.dtype)


@dataclass(frozen=True)
class PlannedShard:
    """One file of the merged model."""

    file_name: str
    source: SafetensorsFile
    tensors: tuple[PlannedTensor, ...]

    @property
    def keeps_header(self) -> bool:
        """Whether the merged file has the same tensors at the same offsets as the base's."""
        planned = [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors]
        return bool(self.source.preamble) and planned == [
            (entry.name, entry.dtype, entry.shape) for entry in self.source.tensors
        ]


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter directory and how much of it is added."""

    directory: Path
    weight: float = 1.0


@dataclass(frozen=True)
class MergePlan:
    """Every tensor of the merged model, and what changes in its config."""

    base_dir: Path
    adapters: tuple[WeightedAdapter, ...]
    shards: tuple[PlannedShard, ...]
    index_metadata: Mapping[str, object] | None  # None: one file without an index
    base_fingerprint: str
    notices: tuple[str, ...]  # what could not be checked
    config_changes: dict[str, object] = field(default_factory=dict)
    base: str = "original"  # or dequantized: what the adapter is added to
    round_trip: "RoundTrip | None" = None  # how `Requantized` tensors are read
    combination: "Combination | None" = None  # None: the deltas' plain sum
    base_name: str = ""  # for people: a hub id, or the last part of a path
    base_revision: str | None = None

    @property
    def adapter_dir(self) -> Path:
        """The adapter, or the first of several: its tokenizer goes with the merged model."""
        return self.adapters[0].directory

    @property
    def strength(self) -> float:
        """How much of the first adapter is added."""
        return self.adapters[0].weight

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """The merged model's tensors, in the order of the shards and of their bytes."""
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors together, headers not counted."""
        return sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in self.tensors)

    def to_dict(self) -> dict[str, object]:
        """Return the plan as JSON: each changed tensor, its shard, its change and its size."""
        return {
            "base": self.base,
            "base_dir": str(self.base_dir),
            "base_fingerprint": self.base_fingerprint,
            "adapters": [
                {"directory": str(one.directory), "weight": one.weight} for one in self.adapters
            ],
            "bytes": self.num_bytes,
            "tensors": len(self.tensors),
            "config_changes": self.config_changes,
            "notices": list(self.notices),
            "changed": [
                {
                    "tensor": tensor.name,
                    "shard": shard.file_name,
                    "change": tensor.change,
                    "shape": list(tensor.shape),
                    "dtype": tensor.dtype,
                    "bytes": tensor_bytes(tensor.dtype, tensor.shape),
                    "deltas": _describe_deltas(tensor),
                    "is_dequantized": tensor.dequantized is not None,
                }
                for shard in self.shards
                for tensor in shard.tensors
                if tensor.change != "none"
            ],
        }


def _describe_deltas(tensor: PlannedTensor) -> list[dict[str, object]]:
    """One for each adapter; the experts of a stack are alike."""
    deltas = tensor.blocks[0].deltas if tensor.blocks else ()
    return [
        {
            "rank": delta.a.shape[0] // delta.num_experts,
            "scaling": delta.scaling,
            "weight": delta.weight,
            "tensor": delta.a.name,
        }
        for delta in deltas
    ]
