"""Reading safetensors headers, finding a checkpoint's tensors, and naming its weights by a hash."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import parse_json, read_weight_map

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"

STORED_FLOATS = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})
"""A dtype as torch calls it -> as safetensors does."""

# Bits an element takes, by the dtype's name in the header (safetensors 0.6, `Dtype::bitsize`).
DTYPE_BITS = MappingProxyType(
    {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32}
    | {"U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8}
    | {"F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
)

MAX_HEADER_BYTES = 100 << 20  # the format's own limit
MAX_DIMENSIONS = 16
MAX_SIZE = 1 << 63
SAMPLE_BYTES = 4096  # read at the start, the middle and the end of a tensor


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is: `num_bytes` bytes at offset `start` of `path`, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int

    @property
    def stop(self) -> int:
        """The offset just after the tensor's last byte."""
        return self.start + self.num_bytes


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of one file: its tensors in the order of their bytes, and its raw beginning."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    preamble: bytes  # the length field and the header, byte for byte

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return self.tensors[-1].stop if self.tensors else len(self.preamble)


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint directory, whether it is one file or many."""

    directory: Path
    shards: tuple[SafetensorsFile, ...]
    tensors: Mapping[str, TensorEntry]
    index_metadata: JsonObject | None  # None: a single file without an index

    @classmethod
    def open(cls, directory: Path) -> "CheckpointIndex":
        """Read the headers of `model.safetensors` or of every shard its index names.

        Raises:
            LlmtuneError: there is no checkpoint, only pickled weights, a shard is missing or cut
                short, a header cannot be read, or the index and the shards disagree.
        """
        if (directory / SINGLE_FILE).is_file():
            single = (read_header(directory / SINGLE_FILE),)
            return cls(directory, single, _tensors_by_name(single), None)
        if (directory / INDEX_FILE).is_file():
            weight_map, metadata = read_weight_map(directory / INDEX_FILE)
            shards = tuple(read_header(directory / name) for name in _shards(directory, weight_map))
            tensors = _tensors_by_name(shards)
            _check_weight_map(directory, weight_map, tensors)
            return cls(directory, shards, tensors, metadata)
        raise LlmtuneError(_no_checkpoint_message(directory))


def read_header(path: Path) -> SafetensorsFile:
    """Read one file's header and check it against the file's size; no tensor is read.

    Raises:
        LlmtuneError: the file is missing, cut short, or its header is not one of safetensors.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            preamble = _read_preamble(path, file.read(8), file.read, file_bytes)
    except FileNotFoundError:
        raise LlmtuneError(f"{path} does not exist; expected a safetensors file") from None
    try:
        header = parse_json(preamble[8:])
        metadata = dict(header.pop("__metadata__", None) or {})
        tensors = sorted(
            (_entry(path, name, info, len(preamble)) for name, info in header.items()),
            key=lambda entry: (entry.start, entry.stop),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LlmtuneError(
            f"{path} has a malformed safetensors header ({error}); download or save it again"
        ) from None
    _check_ranges(path, tensors, len(preamble), file_bytes)
    return SafetensorsFile(path, tuple(tensors), MappingProxyType(metadata), preamble)


def build_preamble(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Return the length field and header of a file that holds (name, dtype, shape) in this order.

    The header is padded with spaces so that the tensors begin at a multiple of 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes a tensor takes on disk."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def fingerprint_checkpoint(index: CheckpointIndex) -> str:
    """Return a hash of a checkpoint's weights: 64 hex digits, the same however it is sharded.

    It covers every tensor's name, dtype and shape, and 4 KiB at its start, middle and end (a
    small tensor whole), so a 16 GB checkpoint takes about a second. It tells models apart; it does
    not prove that every byte is intact.
    """
    sampled: dict[str, bytes] = {}
    for shard in index.shards:
        with shard.path.open("rb") as file:
            for entry in shard.tensors:
                sampled[entry.name] = _sample(file.fileno(), entry)
    digest = hashlib.sha256()
    for name in sorted(index.tensors):
        entry = index.tensors[name]
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        digest.update(sampled[name])
    return digest.hexdigest()


def _read_preamble(
    path: Path, length_field: bytes, read: Callable[[int], bytes], file_bytes: int
) -> bytes:
    if len(length_field) < 8:
        raise LlmtuneError(f"{path} holds {file_bytes} bytes, too few for a safetensors file")
    (length,) = struct.unpack("<Q", length_field)
    if length > MAX_HEADER_BYTES:
        raise LlmtuneError(
            f"{path} is not a safetensors file: its header would be {length} bytes long"
        )
    header = read(length)
    if len(header) < length:
        raise LlmtuneError(
            f"{path} is cut short: its header is {length} bytes and the file has {file_bytes}; "
            "download or save it again"
        )
    return length_field + header


def _entry(path: Path, name: str, info: dict[str, Any], data_start: int) -> TensorEntry:
    begin, end = info["data_offsets"]
    shape = tuple(info["shape"])
    dtype = info["dtype"]
    sizes = (begin, end, *shape)
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and n < MAX_SIZE for n in sizes):
        raise ValueError(f"tensor {name!r} has no sizes: {[*shape, begin, end]!s:.100}")
    if dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if begin < 0 or min(shape, default=1) < 0 or end - begin != tensor_bytes(dtype, shape):
        raise ValueError(
            f"tensor {name!r} of shape {list(shape)} and dtype {dtype} cannot lie at {begin}:{end}"
        )
    return TensorEntry(name, dtype, shape, path, data_start + begin, end - begin)


def _check_ranges(path: Path, tensors: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    offset = data_start
    for entry in tensors:
        if entry.start != offset:
            raise LlmtuneError(
                f"{path} has a malformed safetensors header (tensor {entry.name!r} leaves a hole "
                "or overlaps another); download or save it again"
            )
        offset = entry.stop
    if file_bytes != offset:
        state = "is cut short" if file_bytes < offset else "has bytes after its last tensor"
        raise LlmtuneError(
            f"{path} {state}: its header declares {offset} bytes and the file has {file_bytes}; "
            "download or save it again"
        )


def _shards(directory: Path, weight_map: Mapping[str, str]) -> list[str]:
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise LlmtuneError(
            f"{directory} lacks {len(missing)} of the {len(names)} shards that {INDEX_FILE} names: "
            f"{', '.join(missing[:4])}; download or copy them again"
        )
    return names


def _tensors_by_name(shards: Iterable[SafetensorsFile]) -> Mapping[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in shard.tensors:
            if entry.name in tensors:
                raise LlmtuneError(
                    f"tensor {entry.name!r} is in both {tensors[entry.name].path} and {entry.path}"
                )
            tensors[entry.name] = entry
    return MappingProxyType(tensors)


def _check_weight_map(
    directory: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    wrong = [
        name
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].path.name != file
    ]
    if wrong:
        raise LlmtuneError(
            f"{directory}: {INDEX_FILE} places {len(wrong)} tensors in shards that do not hold "
            f"them, for example {wrong[0]!r} in {weight_map[wrong[0]]}"
        )


def _no_checkpoint_message(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory; expected one with {SINGLE_FILE}"
    if any(directory.glob("pytorch_model*.bin")):
        return (
            f"{directory} holds its weights as pickles (pytorch_model.bin), which are not read "
            "because loading one can run code; load it once with transformers and "
            "`save_pretrained` it to another directory, which writes safetensors"
        )
    if (directory / ADAPTER_FILE).is_file():
        return f"{directory} holds an adapter, not a model; expected {SINGLE_FILE} or {INDEX_FILE}"
    return f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}"


def _sample(descriptor: int, entry: TensorEntry) -> bytes:
    if entry.num_bytes <= 3 * SAMPLE_BYTES:
        return os.pread(descriptor, entry.num_bytes, entry.start)
    middle = entry.start + (entry.num_bytes - SAMPLE_BYTES) // 2
    return b"".join(
        os.pread(descriptor, SAMPLE_BYTES, offset)
        for offset in (entry.start, middle, entry.stop - SAMPLE_BYTES)
    )
