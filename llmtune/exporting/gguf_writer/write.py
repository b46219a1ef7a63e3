"""Write a merged checkpoint as one GGUF file: streamed, checked, and finished by a rename."""

import os
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader, GGUFWriter

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.architectures import (
    Architecture,
    find_architecture,
    hyperparameters,
    read_full_config,
)
from llmtune.exporting.gguf_writer.tensors import PlannedTensor, plan_tensors
from llmtune.exporting.gguf_writer.tiles import iter_tensor_bytes
from llmtune.exporting.gguf_writer.types import FILE_TYPES, QUANTIZER_TYPES, quantize_file
from llmtune.exporting.gguf_writer.vocabulary import Vocabulary, read_vocabulary
from llmtune.io.fingerprint import JsonObject
from llmtune.io.progress import iter_with_bar
from llmtune.io.unfinished import require_space
from llmtune.models.checkpoint import Checkpoint

PHI3_NAME = re.compile("phi-?3", re.IGNORECASE)
HEAD_BYTES = 16 << 20
"""More than any tokenizer and tensor list take."""


@dataclass(frozen=True)
class GgufResult:
    """A finished GGUF file."""

    path: Path
    architecture: str
    pre_tokenizer: str
    type: str
    num_tensors: int
    tensor_types: dict[str, int]
    """Number of tensors by type: what is not of the file's type is seen here."""
    num_bytes: int
    seconds: float
    notices: tuple[str, ...]

    def to_dict(self) -> JsonObject:
        """Return the result as JSON."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class _Plan:
    architecture: Architecture
    config: Mapping[str, Any]
    vocabulary: Vocabulary
    tensors: list[PlannedTensor]


@dataclass(frozen=True)
class GgufRequest:
    """Which checkpoint becomes which file."""

    source: Checkpoint
    """16- or 32-bit weights with their tokenizer."""
    path: Path
    type: str
    """One of `OWN_TYPES`; for `write_model`, of `GGUF_TYPES`."""
    name: str
    """`general.name`."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Further text for the file's head, by key."""


def write_model(request: GgufRequest) -> GgufResult:
    """Write a GGUF file of any type, a K-quant through an exact file that the quantizer reads.

    Raises:
        LlmtuneError: as `write_gguf`; or the quantizer is not on this machine, or fails.
        OSError: the disk ran full.
    """
    path = request.path
    if request.type not in QUANTIZER_TYPES:
        return write_gguf(request)
    exact = path.with_name("exact.gguf")
    result = write_gguf(replace(request, path=exact, type=_exact_type(request.source)))
    start = time.monotonic()
    quantize_file(exact, path, request.type)
    exact.unlink()
    return replace(
        result,
        path=path,
        type=request.type,
        tensor_types=_count_tensor_types(path),
        num_bytes=path.stat().st_size,
        seconds=result.seconds + time.monotonic() - start,
    )


def _exact_type(source: Checkpoint) -> str:
    """Return the GGUF type that holds every number of the checkpoint as it is."""
    stored = {tensor.dtype for tensor in source.index.tensors.values()}
    return "f32" if len(stored) > 1 else {"BF16": "bf16", "F16": "f16"}.get(stored.pop(), "f32")


def _count_tensor_types(path: Path) -> dict[str, int]:
    return dict(Counter(tensor.tensor_type.name.lower() for tensor in GGUFReader(path).tensors))


def write_gguf(request: GgufRequest) -> GgufResult:
    """Write a checkpoint as one GGUF file, at once in its place.

    Memory does not grow with the model, only with its vocabulary: 150 MiB for 49,000 tokens, most
    of it while the finished head is read back.

    Raises:
        LlmtuneError: the model cannot be exported, the disk is too small, or the finished file
            does not read back as planned.
        OSError: the disk ran full; `io.unfinished` explains that and cleans up.
    """
    start = time.monotonic()
    path = request.path
    plan = _plan(request)
    require_space(path, sum(tensor.num_bytes for tensor in plan.tensors) + HEAD_BYTES)
    _write(plan, path, request)
    check_file(path, plan.tensors, plan.vocabulary)
    return GgufResult(
        path=path,
        architecture=plan.architecture.name,
        pre_tokenizer=plan.vocabulary.pre.name,
        type=request.type,
        num_tensors=len(plan.tensors),
        tensor_types=dict(Counter(tensor.type.name.lower() for tensor in plan.tensors)),
        num_bytes=path.stat().st_size,
        seconds=time.monotonic() - start,
        notices=plan.vocabulary.notices,
    )


def _plan(request: GgufRequest) -> _Plan:
    architecture = find_architecture(request.source)
    config = read_full_config(request.source)
    return _Plan(
        architecture,
        config,
        read_vocabulary(request.source),
        plan_tensors(request.source, architecture, config, request.type),
    )


def _write(plan: _Plan, path: Path, request: GgufRequest) -> None:
    writer = GGUFWriter(path, plan.architecture.name)
    writer.add_type("model")
    writer.add_name(runtime_name(request.name, trims_as_phi3=plan.vocabulary.trims_as_phi3))
    for key, text in request.provenance.items():
        writer.add_string(key, text)
    for key, value in hyperparameters(plan.architecture, plan.config).items():
        add_value(writer, key, value)
    writer.add_file_type(FILE_TYPES[request.type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, plan.vocabulary)
    write_tensors(writer, plan.tensors)


def runtime_name(name: str, *, trims_as_phi3: bool) -> str:
    """Return `name` so that llama.cpp treats special tokens as this tokenizer does.

    It goes by the model's name: with Phi-3 in it, special tokens take the spaces after them.
    """
    if trims_as_phi3:
        return name if PHI3_NAME.search(name) else f"{name} (Phi-3)"
    return PHI3_NAME.sub("Phi 3", name)


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add one number, flag or text under its key, in the type llama.cpp reads it in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def write_tensors(writer: GGUFWriter, tensors: list[PlannedTensor]) -> None:
    """Write head and tensors through `writer`, and flush the file to the disk."""
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.num_bytes,
            raw_dtype=tensor.type,
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for tensor in iter_with_bar(tensors, "export", unit="tensors"):
            before = file.tell()
            for piece in iter_tensor_bytes(tensor):
                file.write(np.ascontiguousarray(piece).data)
            assert file.tell() - before == tensor.num_bytes, tensor.name
            writer.write_padding(file, tensor.num_bytes)
        file.flush()
        os.fsync(file.fileno())
    finally:
        writer.close()


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.pre.model)
    writer.add_tokenizer_pre(vocabulary.pre.name)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.pre.adds_space)
    else:
        writer.add_token_merges(list(vocabulary.merges))
    for role, id in vocabulary.special_ids.items():
        getattr(writer, f"add_{role}_token_id")(id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def check_file(path: Path, tensors: list[PlannedTensor], vocabulary: Vocabulary | None) -> None:
    """Read the file back with the official reader and compare its head with the plan.

    Raises:
        LlmtuneError: a tensor, a token or the chat template is not what was planned.
    """
    reader = GGUFReader(path)
    found = {
        tensor.name: (tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type)
        for tensor in reader.tensors
    }
    planned = {tensor.name: (tuple(tensor.shape), tensor.type) for tensor in tensors}
    if found != planned:
        odd = sorted({name for name, _ in found.items() ^ planned.items()})
        raise LlmtuneError(f"{path}: does not read back as written: {', '.join(odd[:4])}")
    if vocabulary is None:
        return
    expected = {
        gguf.Keys.Tokenizer.LIST: list(vocabulary.tokens),
        gguf.Keys.Tokenizer.TOKEN_TYPE: [int(kind) for kind in vocabulary.kinds],
        gguf.Keys.Tokenizer.PRE: vocabulary.pre.name,
        gguf.Keys.Tokenizer.CHAT_TEMPLATE: vocabulary.chat_template,
    }
    for key, value in expected.items():
        field = reader.get_field(key)
        if (None if field is None else field.contents()) != value:
            raise LlmtuneError(f"{path}: {key} does not read back as written")
