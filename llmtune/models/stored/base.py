"""What a format of quantized checkpoints says of itself (light: torch is imported in methods)."""

import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import FETCH_AGAIN
from llmtune.io.safetensors import CheckpointIndex, TensorEntry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOATS = ("F32", "F16", "BF16")
NUMBER_FORMATS = {"I64": "q", "I32": "i", "U8": "B"}
MOST_NUMBERS = 256

Dequantize = Callable[[Mapping[str, "Tensor"], "torch.dtype"], "Tensor"]
"""From a weight's stored tensors, by their part's name, and the dtype to return it in."""


@dataclass(frozen=True)
class StoredWeight:
    """A dense weight, and the stored tensors that it is computed from."""

    name: str
    """Of the tensor in the dense checkpoint."""
    shape: tuple[int, ...]
    parts: Mapping[str, TensorEntry]
    """By what the format calls them."""
    dequantize: Dequantize


@dataclass(frozen=True)
class StoredPlan:
    """What becomes of a checkpoint's tensors; those not named are copied as they are."""

    weights: tuple[StoredWeight, ...]
    dropped: frozenset[str] = frozenset()
    """Stored tensors that no weight needs: scales of activations and of caches."""


@dataclass(frozen=True)
class Parts:
    """The stored tensors of one layer, by their names' ends."""

    place: str
    stem: str
    entries: Mapping[str, TensorEntry]

    def expect(
        self, end: str, dtypes: Sequence[str], *shapes: tuple[int | None, ...]
    ) -> TensorEntry:
        """Return one of them, which must be there in one of these dtypes and shapes.

        A size of None is any; without shapes any shape will do.

        Raises:
            LlmtuneError: it is missing or something else.
        """
        entry = self.entries.get(end)
        name = f"{self.stem}{end}"
        if entry is None:
            raise LlmtuneError(f"{self.place}: {name} is missing; {FETCH_AGAIN}")
        fits = [
            len(shape) == len(entry.shape)
            and all(wanted in (None, size) for wanted, size in zip(shape, entry.shape, strict=True))
            for shape in shapes
        ]
        if entry.dtype not in dtypes or (shapes and not any(fits)):
            wanted = " or ".join(str(list(shape)).replace("None", "any") for shape in shapes)
            raise LlmtuneError(
                f"{self.place}: {name} is {entry.dtype} {list(entry.shape)}; expected "
                f"{' or '.join(dtypes)} {wanted}; {FETCH_AGAIN}"
            )
        return entry


class StoredFormat(ABC):
    """One way in which a checkpoint's weights are stored; it is listed in `stored.formats`."""

    method: ClassVar[str]
    """`quantization_config.quant_method` in config.json."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """What else `quant_method` may say."""
    loads_as_is: ClassVar[bool] = False
    """Whether transformers loads it with a library that llmtune requires."""

    def __init__(self, knobs: Mapping[str, Any], place: str) -> None:
        """Read the `quantization_config` of the checkpoint at `place`.

        Raises:
            LlmtuneError: it is of a variant that is not read.
        """
        self.knobs = knobs
        self.place = place
        self.check()

    @property
    @abstractmethod
    def title(self) -> str:
        """What a reader is shown: the method, and bits where they vary."""

    @abstractmethod
    def check(self) -> None:
        """Check what config.json says.

        Raises:
            LlmtuneError: it is of a variant that is not read, or damaged.
        """

    @abstractmethod
    def plan(self, index: CheckpointIndex) -> StoredPlan:
        """Say which dense weights the stored tensors are, from their headers.

        Raises:
            LlmtuneError: a part is missing, or has a wrong dtype or shape.
        """

    def gather(self, index: CheckpointIndex, anchor: str, ends: Sequence[str]) -> Iterator[Parts]:
        """Yield the parts of each layer that has a tensor whose name ends in `anchor`."""
        tensors = index.tensors
        for name in tensors:
            if name.endswith(anchor):
                stem = name.removesuffix(anchor)
                found = {end: tensors[stem + end] for end in ends if stem + end in tensors}
                yield Parts(self.place, stem, found)

    def refuse(self, found: str) -> LlmtuneError:
        """Return the error for a variant of the format that is not read."""
        return LlmtuneError(
            f"{self.place}: this base is stored quantized ({self.method}, {found}), which is not "
            "read; give the 16-bit checkpoint that it was made from: model.base=..."
        )

    def choose(self, key: str, allowed: Sequence[Any], default: Any = None) -> None:
        """Check what the config says under `key`.

        Raises:
            LlmtuneError: it is not one of `allowed`.
        """
        value = self.knobs.get(key, default)
        # 4.0 and True equal 4 and 1, and are not numbers of bits
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise self.refuse(
                f"{key} {str(value)!r:.40}, expected {' or '.join(map(str, allowed))}"
            )

    def group_size(self, num_inputs: int) -> int:
        """Return how many input features share a scale; -1 in the config is all of them.

        Raises:
            LlmtuneError: the config says something else.
        """
        size = self.knobs.get("group_size", self.knobs.get("q_group_size", 128))
        if type(size) is not int or size == 0 or size < -1:
            raise self.refuse(f"group_size {str(size)!r:.40}, expected a whole number or -1")
        return num_inputs if size == -1 else size


def read_numbers(entry: TensorEntry) -> tuple[int, ...]:
    """Return a short tensor of whole numbers.

    Raises:
        LlmtuneError: it is long, or holds something else.
    """
    format = NUMBER_FORMATS.get(entry.dtype)
    count = 0 if format is None else entry.num_bytes // struct.calcsize(f"<{format}")
    if not 0 < count <= MOST_NUMBERS:
        raise LlmtuneError(
            f"{entry.path}: {entry.name} is {entry.dtype} {list(entry.shape)}; expected a few "
            f"whole numbers; {FETCH_AGAIN}"
        )
    raw = read_bytes(entry.path, entry.start, entry.num_bytes)
    return struct.unpack(f"<{count}{format}", raw)


def read_bytes(path: Path, start: int, count: int) -> bytes:
    """Return some bytes of a file.

    Raises:
        LlmtuneError: it ends before.
    """
    with path.open("rb") as file:
        raw = os.pread(file.fileno(), count, start)
    if len(raw) < count:
        raise LlmtuneError(f"{path} is cut short; {FETCH_AGAIN}")
    return raw
