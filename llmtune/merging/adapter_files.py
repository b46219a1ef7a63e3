"""What an adapter directory holds, by its config and header; tensors compared, not loaded."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmtune.adapters.base import Adapter, SavedConfig
from llmtune.adapters.config import method_of
from llmtune.adapters.manifest import WEIGHTS_NAME, read_adapter_config
from llmtune.adapters.update import Factors, ModuleTensors, Part
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import DTYPE_BITS, TensorEntry, read_header
from llmtune.merging.changes import ADAPTER_PREFIX

TOKENS_KEY = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
SAVED_KEY = re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?(?=\.(?:weight|bias)$)")
# PEFT saves an untrained table along if it is under an adapter or has grown.
BASE_COPY_KEY = re.compile(
    r"(?:\.token_adapter)?\.base_layer(?=\.weight$)|\.original_module(?=\.(?:weight|bias)$)"
)

FLOATS = ("BF16", "F16", "F32", "F64")

PIECE_ELEMENTS = 1 << 20

# The coarsest of the 16-bit formats keeps 8 bits of a number: what a cast to it may change.
CAST_TOLERANCE = 2.0**-8


@dataclass
class AdapterFiles:
    """An adapter directory, its tensors sorted by what they do to the base."""

    directory: Path
    method: type[Adapter]
    config: SavedConfig
    tensors: Mapping[str, TensorEntry]
    modules: dict[str, ModuleTensors] = field(default_factory=dict)  # the method's own
    tokens: dict[str, TensorEntry] = field(default_factory=dict)  # by module
    replaced: dict[str, TensorEntry] = field(default_factory=dict)  # trained, by tensor name
    base_copies: dict[str, TensorEntry] = field(default_factory=dict)  # saved, not trained

    @classmethod
    def open(cls, directory: Path) -> "AdapterFiles":
        """Read `adapter_config.json` and the header of `adapter_model.safetensors`.

        Raises:
            LlmtuneError: a file is missing or malformed, the adapter is of a kind that cannot be
                added into one set of weights, or a tensor is not one that PEFT writes.
        """
        config = read_adapter_config(directory)
        method = method_of(config)
        method.check_settings(directory, config)
        tensors = {entry.name: entry for entry in read_header(directory / WEIGHTS_NAME).tensors}
        for name, entry in tensors.items():
            if entry.dtype not in FLOATS and not (entry.dtype == "I32" and method.counts(name)):
                raise LlmtuneError(
                    f"{directory / WEIGHTS_NAME}: tensor {name!r} is of type {entry.dtype}; "
                    f"expected one of {', '.join(FLOATS)}"
                )
        files = cls(directory, method, config, tensors)
        for name, entry in tensors.items():
            files._sort_in(name, entry)
        shared = {method.shared_part(name): entry for name, entry in tensors.items()}
        for group in files.modules.values():
            group.parts.update({part: entry for part, entry in shared.items() if part is not None})
            missing = method.missing_part(group)
            if missing is not None:
                raise LlmtuneError(f"{directory}: module {group.module!r} has no {missing} tensor")
        return files

    def beside_factors(self) -> dict[str, str]:
        """Return what the adapter holds beside low-rank factors of modules, {kind: an example}."""
        kinds = {
            "trained token rows": list(self.tokens),
            "whole tensors (modules_to_save or biases)": list(self.replaced),
            "a copy of an embedding": list(self.base_copies),
            "expert parameters": list(self.method.target_parameters(self.config)),
        }
        found = {kind: names[0] for kind, names in kinds.items() if names}
        for group in self.modules.values():
            kind = self.method.why_no_factors(group)
            if kind is not None:
                found.setdefault(kind, group.module)
        return found

    def factors(self, module: str) -> Factors:
        """Return the low-rank factors of a module; `beside_factors` is empty."""
        return self.method.factors(self.modules[module], self.config)

    def _sort_in(self, name: str, entry: TensorEntry) -> None:
        if self.method.shared_part(name) is not None:
            return
        if not name.startswith(ADAPTER_PREFIX):
            raise LlmtuneError(
                f"{self.directory}: tensor {name!r} does not begin with {ADAPTER_PREFIX!r}; "
                "expected an adapter of a whole model as peft's `save_pretrained` writes it"
            )
        name = SAVED_KEY.sub("", name.removeprefix(ADAPTER_PREFIX))
        try:
            part = self.method.part_of(name)
        except ValueError as error:
            raise LlmtuneError(f"{self.directory}: tensor {entry.name!r} {error}") from None
        if part is not None:
            self._sort_in_part(part, entry)
        elif match := TOKENS_KEY.match(name):
            self.tokens[match["module"]] = entry
        elif BASE_COPY_KEY.search(name):
            self.base_copies[BASE_COPY_KEY.sub("", name)] = entry
        elif self.method.TENSOR_MARK in name or ".token_adapter." in name:
            raise LlmtuneError(
                f"{self.directory}: tensor {entry.name!r} is of a kind that merging does not know"
            )
        else:
            self._sort_in_replaced(name.replace(".base_layer.", "."), entry)

    def _sort_in_replaced(self, name: str, entry: TensorEntry) -> None:
        other = self.replaced.setdefault(name, entry)
        if other is not entry and not have_same_bytes(other, entry):
            raise LlmtuneError(
                f"{self.directory} holds {name!r} twice, and the two differ: {other.name!r} and "
                f"{entry.name!r}"
            )

    def _sort_in_part(self, part: Part, entry: TensorEntry) -> None:
        group = self.modules.setdefault(part.module, ModuleTensors(part.module))
        if part.name in group.parts:
            raise LlmtuneError(
                f"{self.directory} holds more than one adapter for module {group.module!r}; "
                "save one adapter alone"
            )
        group.parts[part.name] = entry


def have_same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_pieces(one), _pieces(other), strict=True))


def agree(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of one shape hold the same numbers, but for a cast to 16 bits."""
    if one.dtype == other.dtype:
        return have_same_bytes(one, other)
    return all(
        np.allclose(_floats(a, one.dtype), _floats(b, other.dtype), rtol=CAST_TOLERANCE, atol=1e-30)
        for a, b in zip(_pieces(one), _pieces(other), strict=True)
    )


def _pieces(entry: TensorEntry) -> Iterator[bytes]:
    piece_bytes = PIECE_ELEMENTS * DTYPE_BITS[entry.dtype] // 8
    with entry.path.open("rb") as file:
        for start in range(entry.start, entry.stop, piece_bytes):
            yield os.pread(file.fileno(), min(piece_bytes, entry.stop - start), start)


def _floats(piece: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(piece, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(piece, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
