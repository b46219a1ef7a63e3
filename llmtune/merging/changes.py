"""What a merge does to each tensor: the plan's vocabulary, plain data without any weights."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from llmtune.adapters.update import AdditiveUpdate, WeightUpdate
from llmtune.io.fingerprint import JsonObject
from llmtune.io.safetensors import SafetensorsFile, TensorEntry, tensor_bytes
from llmtune.merging.config import Combination

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_PREFIX = "base_model.model."  # what the names of an adapter's tensors begin with

# 512 Ki numbers: 2 MiB in float32, which a core's own cache holds from step to step. A thread then
# keeps about 7 MiB, whatever the model's size.
TILE_ELEMENTS = 1 << 19

# A matrix product's rows come out bit-equal to those of the whole product as long as a tile begins
# at a multiple of the BLAS kernel's height and no tile is thinner than it (16 rows on every x86
# kernel of MKL that was tried; a tile of 1 to 15 rows takes another kernel and differs). And a
# tile's first number then begins a block of 64 that is quantized with one scale.
ROW_ALIGNMENT = 64


class RoundTrip(Protocol):
    """Quantizes rows of a weight and dequantizes them again, as the loaded layer does."""

    @property
    def block_size(self) -> int:
        """How many numbers of the flat weight share one of `measure`'s scales."""

    def measure(self, tiles: "Iterable[Tensor]") -> "Tensor | None":
        """Return what all rows of a weight must be seen for, or None if a row is enough."""

    def apply(self, tile_RC: "Tensor", scales_B: "Tensor | None") -> "Tensor":
        """Return some rows as the quantized layer computes with them, on the CPU."""


@dataclass(frozen=True)
class Block:
    """Some rows of a tensor, seen as a table [rows, columns], and what adapters do to them."""

    first_row: int
    num_rows: int
    updates: tuple[WeightUpdate, ...] = ()  # in the order in which they are made


@dataclass(frozen=True)
class Requantized:
    """The base's tensor is taken as a quantized layer computes with it (`merge.base`)."""

    is_transposed: bool  # stored [in, out]; quantized as [out, in]


@dataclass(frozen=True)
class PackedFourBit:
    """The base's tensor is stored in 4 bits by bitsandbytes; these tensors belong to it."""

    state: tuple[tuple[str, TensorEntry], ...]  # suffix (`stored.four_bits.STATE_SUFFIXES`), tensor


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the merged model: where its bytes come from and what is done to them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorEntry
    blocks: tuple[Block, ...] = ()
    token_rows: TensorEntry | None = None  # rows that replace those at `token_indices`
    token_indices: tuple[int, ...] = ()
    blend_base: TensorEntry | None = None  # strength != 1: base + strength * (trained - base)
    strength: float = 1.0  # of rows and whole tensors
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
    def updates(self) -> tuple[WeightUpdate, ...]:
        """All updates of the tensor, block by block."""
        return tuple(update for block in self.blocks for update in block.updates)

    @property
    def is_additive(self) -> bool:
        """Whether the tensor's only change is by deltas, to which others can be added."""
        if self.token_rows is not None:
            return False
        return bool(self.updates) and all(isinstance(one, AdditiveUpdate) for one in self.updates)

    def tiles(self) -> Iterator[tuple[Block, int, int]]:
        """Yield (block, first row, number of rows); the last tile of a block is the longest.

        A block is one stretch of rows that share their updates; a tensor without one is a single
        block.
        """
        height = max(1, TILE_ELEMENTS // max(1, self.num_columns) // ROW_ALIGNMENT) * ROW_ALIGNMENT
        for block in self.blocks or (Block(0, self.num_rows),):
            num_tiles = max(1, block.num_rows // height)
            for index in range(num_tiles):
                first = index * height
                last = block.num_rows if index == num_tiles - 1 else first + height
                yield block, block.first_row + first, last - first

    @property
    def change(self) -> str:
        """What happens to the tensor, in one word for the plan's table."""
        if self.blocks:
            return self.updates[0].word
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


class ConfigChanges(TypedDict, total=False):
    """What becomes different in the base's config.json."""

    tie_word_embeddings: bool
    vocab_size: int


class ChangedTensorJson(TypedDict):
    """A tensor that the merge changes, as JSON."""

    tensor: str
    shard: str
    change: str
    shape: list[int]
    dtype: str
    bytes: int
    deltas: list[Mapping[str, float | str]]
    """One for each adapter; the experts of a stack are alike."""
    is_dequantized: bool


class WeightedJson(TypedDict):
    """An adapter and how much of it is added, as JSON."""

    directory: str
    weight: float


class MergePlanJson(TypedDict):
    """A plan as JSON."""

    base: str
    base_dir: str
    base_fingerprint: str
    adapters: list[WeightedJson]
    bytes: int
    tensors: int
    config_changes: ConfigChanges
    notices: list[str]
    changed: list[ChangedTensorJson]


@dataclass(frozen=True)
class MergePlan:
    """Every tensor of the merged model, and what changes in its config."""

    base_dir: Path
    adapters: tuple[WeightedAdapter, ...]
    shards: tuple[PlannedShard, ...]
    index_metadata: JsonObject | None  # None: one file without an index
    base_fingerprint: str
    notices: tuple[str, ...]  # what could not be checked
    config_changes: ConfigChanges = field(default_factory=ConfigChanges)
    base: str = "original"  # or dequantized: what the adapter is added to
    round_trip: RoundTrip | None = None  # how `Requantized` tensors are read
    combination: Combination | None = None  # None: the deltas' plain sum
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

    def to_dict(self) -> MergePlanJson:
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
                    "deltas": _describe_updates(tensor),
                    "is_dequantized": tensor.dequantized is not None,
                }
                for shard in self.shards
                for tensor in shard.tensors
                if tensor.change != "none"
            ],
        }


def _describe_updates(tensor: PlannedTensor) -> list[Mapping[str, float | str]]:
    updates = tensor.blocks[0].updates if tensor.blocks else ()
    described = [update.describe() for update in updates]
    return [one for one in described if one is not None]
