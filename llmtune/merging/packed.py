"""A base whose files hold linear weights in 4 bits already, as bitsandbytes saves them."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import parse_json
from llmtune.io.safetensors import CheckpointIndex, TensorEntry
from llmtune.merging.changes import PackedFourBit, PlannedTensor
from llmtune.models.quantization.config import packed_markers

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

MOST_HEADER_BYTES = 1 << 16
STATE_PREFIX = "quant_state.bitsandbytes__"
STATE_SUFFIXES = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    *packed_markers(),
)


@dataclass(frozen=True)
class PackedWeights:
    """The 4-bit weights of a base, as they are in the merged model, and what belongs to them."""

    tensors: Mapping[str, PlannedTensor] = field(default_factory=dict)
    state_names: frozenset[str] = frozenset()


def find_packed_weights(base: CheckpointIndex, config: Mapping[str, Any]) -> PackedWeights:
    """Plan every 4-bit weight of the base as its dense self; none in a base that is not quantized.

    Raises:
        LlmtuneError: the base is quantized in a different way, or a weight's state cannot be read.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return PackedWeights()
    _require_four_bit(base.directory, quantization)
    tensors = {}
    state_names: set[str] = set()
    for name, state in group_four_bit_names(base.tensors).items():
        entries = {suffix: base.tensors[other] for suffix, other in state.items()}
        headers = [entry for suffix, entry in entries.items() if suffix.startswith(STATE_PREFIX)]
        dtype, shape = _read_header(headers[0], base.tensors[name])
        tensors[name] = PlannedTensor(
            name,
            dtype,
            shape,
            base.tensors[name],
            dequantized=PackedFourBit(tuple(entries.items())),
        )
        state_names |= set(state.values())
    if not tensors:
        raise LlmtuneError(
            f"{base.directory}: config.json says that bitsandbytes quantized it to 4 bits, yet no "
            "tensor is; download it again"
        )
    return PackedWeights(tensors, frozenset(state_names))


def _require_four_bit(directory: Path, quantization: Mapping[str, Any]) -> None:
    method = quantization.get("quant_method", "unknown")
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        return
    if quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        method = "bitsandbytes, 8 bits"
    raise LlmtuneError(
        f"{directory}: this base is already quantized ({method}), and only 4-bit bitsandbytes "
        "checkpoints can be read back; give the 16-bit model with model.base=..."
    )


def _read_header(entry: TensorEntry, packed: TensorEntry) -> tuple[str, tuple[int, ...]]:
    """Return the dtype and the shape of a weight, which must be that of the packed numbers."""
    with entry.path.open("rb") as file:
        raw = os.pread(file.fileno(), min(entry.num_bytes, MOST_HEADER_BYTES), entry.start)
    try:
        header = parse_json(raw)
        dtype, shape = DTYPE_NAMES[header["dtype"]], tuple(header["shape"])
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"its shape is {header['shape']!s:.80}")
        if (math.prod(shape) + 1) // 2 != packed.num_bytes:
            raise ValueError(f"{packed.num_bytes:,} bytes are not {list(shape)} numbers of 4 bits")
    except (ValueError, KeyError, TypeError) as error:
        raise LlmtuneError(
            f"{entry.path}: {entry.name!r} does not describe a 4-bit weight ({error}); download "
            "it again"
        ) from None
    return dtype, shape


def group_four_bit_names(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Find the 4-bit weights of a checkpoint by the names of its tensors.

    Returns:
        Weight name -> {suffix in `STATE_SUFFIXES`: name of that tensor}, in the order given.
        Weights without a `quant_state` are not 4-bit and are left out.
    """
    known = list(names)
    states: dict[str, dict[str, str]] = {name: {} for name in known}
    for name in known:
        for suffix in STATE_SUFFIXES:
            weight_name = name.removesuffix(f".{suffix}")
            if weight_name != name and weight_name in states:
                states[weight_name][suffix] = name
    return {
        name: state
        for name, state in states.items()
        if any(suffix.startswith(STATE_PREFIX) for suffix in state)
    }
