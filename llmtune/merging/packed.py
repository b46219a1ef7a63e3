"""A base whose files hold linear weights in 4 bits already, as bitsandbytes saves them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import FETCH_AGAIN
from llmtune.io.safetensors import CheckpointIndex
from llmtune.merging.changes import PackedFourBit, PlannedTensor
from llmtune.models.stored.four_bits import (
    STATE_PREFIX,
    group_four_bit_names,
    read_four_bit_header,
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
        header = read_four_bit_header(headers[0], base.tensors[name])
        tensors[name] = PlannedTensor(
            name,
            header.dtype,
            header.shape,
            base.tensors[name],
            dequantized=PackedFourBit(tuple(entries.items())),
        )
        state_names |= set(state.values())
    if not tensors:
        raise LlmtuneError(
            f"{base.directory}: config.json says that bitsandbytes quantized it to 4 bits, yet no "
            f"tensor is; {FETCH_AGAIN}"
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
