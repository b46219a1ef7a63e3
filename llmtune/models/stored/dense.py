"""What a quantized checkpoint will be as a dense one, from its headers alone (light)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import FETCH_AGAIN
from llmtune.io.safetensors import INDEX_FILE, CheckpointIndex, TensorEntry, tensor_bytes
from llmtune.models.stored.base import StoredFormat, StoredWeight

DTYPES = {"bfloat16": "BF16", "float16": "F16"}
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
QUANTIZED_DTYPES = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")


@dataclass(frozen=True)
class DenseTensor:
    """One tensor of the dense checkpoint: computed from stored ones, or copied."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: StoredWeight | TensorEntry

    @property
    def num_bytes(self) -> int:
        """What it takes on the disk."""
        return tensor_bytes(self.dtype, self.shape)


def dense_dtype(config: Mapping[str, Any]) -> str:
    """Return what weights become: the 16 bits that config.json names, else bfloat16."""
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return named if named in DTYPES else "bfloat16"


def dense_config(config: Mapping[str, Any]) -> JsonObject:
    """Return the config.json of the dense checkpoint."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    kept.pop("torch_dtype", None)
    return kept | {"dtype": dense_dtype(config)}


def small_files(directory: Path) -> list[Path]:
    """Return the files of a checkpoint that are no weights, which the dense one has too."""
    found = {path for pattern in SMALL_FILES for path in directory.glob(pattern)}
    return sorted(path for path in found if path.name != INDEX_FILE)


def plan_dense(format: StoredFormat, index: CheckpointIndex, dtype: str) -> tuple[DenseTensor, ...]:
    """Return the tensors of the dense checkpoint, in the order in which they are stored.

    Raises:
        LlmtuneError: there are no quantized weights, a part of one is missing or has a wrong shape,
            or a tensor is left that is no weight.
    """
    plan = format.plan(index)
    if not plan.weights:
        raise LlmtuneError(
            f"{format.place}: config.json says that it is stored quantized ({format.title}), and "
            f"no tensor is; {FETCH_AGAIN}"
        )
    of_part = {entry.name: weight for weight in plan.weights for entry in weight.parts.values()}
    return tuple(_tensors(format, index, DTYPES[dtype], of_part, plan.dropped))


def _tensors(
    format: StoredFormat,
    index: CheckpointIndex,
    dtype: str,
    of_part: Mapping[str, StoredWeight],
    dropped: frozenset[str],
) -> Iterator[DenseTensor]:
    seen = set()
    for shard in index.shards:
        for entry in shard.tensors:
            weight = of_part.get(entry.name)
            if weight is not None and weight.name not in seen:
                seen.add(weight.name)
                yield DenseTensor(weight.name, dtype, weight.shape, weight)
            elif weight is None and entry.name not in dropped:
                if entry.dtype in QUANTIZED_DTYPES:
                    raise LlmtuneError(
                        f"{format.place}: {entry.name} is {entry.dtype} {list(entry.shape)}, which "
                        f"belongs to no weight that {format.title} stores; {FETCH_AGAIN}"
                    )
                yield DenseTensor(entry.name, entry.dtype, entry.shape, entry)
