"""4-bit weights as bitsandbytes saves them: the tensors of each, and what it says of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import FETCH_AGAIN, parse_json
from llmtune.io.safetensors import STORED_FLOATS, TensorEntry
from llmtune.models.quantization.config import packed_markers
from llmtune.models.stored.base import read_bytes

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
class FourBitHeader:
    """What bitsandbytes writes of a weight beside its 4-bit codes.

    Attributes:
        dtype: of the weight before it was quantized, as safetensors spells it.
        shape: of that weight.
    """

    dtype: str
    shape: tuple[int, ...]


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


def read_four_bit_header(header: TensorEntry, packed: TensorEntry) -> FourBitHeader:
    """Read how bitsandbytes describes one weight, which must fit the packed numbers.

    Args:
        header: the tensor whose bytes are the JSON text of the weight's state.
        packed: the tensor of codes, two to a byte.

    Raises:
        LlmtuneError: the text cannot be read, or its shape is not that of the packed numbers.
    """
    raw = read_bytes(header.path, header.start, min(header.num_bytes, MOST_HEADER_BYTES))
    try:
        state = parse_json(raw)
        dtype, shape = STORED_FLOATS[state["dtype"]], tuple(state["shape"])
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"its shape is {shape!s:.80}")
        if (math.prod(shape) + 1) // 2 != packed.num_bytes:
            raise ValueError(f"{packed.num_bytes:,} bytes are not {list(shape)} numbers of 4 bits")
    except (ValueError, KeyError, TypeError) as error:
        raise LlmtuneError(
            f"{header.path}: {header.name!r} does not describe a 4-bit weight ({error}); "
            f"{FETCH_AGAIN}"
        ) from None
    return FourBitHeader(dtype, shape)
