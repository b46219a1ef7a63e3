"""What is saved beside an adapter: its manifest, and checks that need no torch."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.adapters.config import method_of
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_file, hash_json
from llmtune.io.json_files import read_json_object
from llmtune.io.safetensors import read_header

MANIFEST_NAME = "llmtune_adapter.json"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
MANIFEST_FORMAT = 1
COPY_AGAIN = "Copy the adapter again, or make it again"


def read_adapter_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest that llmtune wrote beside the adapter.

    Raises:
        LlmtuneError: there is none, or it cannot be read.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise LlmtuneError(
            f"{directory}: no {MANIFEST_NAME}; expected an adapter that llmtune wrote, "
            + (
                "and this one is of a different program or has lost that file: copy it back"
                if _is_adapter(directory)
                else "and there is no adapter here: give the directory of one (a run's is "
                "RUN/adapter)"
            )
        )
    manifest = read_json_object(path, advice=COPY_AGAIN)
    if manifest.get("format") != MANIFEST_FORMAT:
        raise LlmtuneError(
            f"{path}: format {manifest.get('format')!r}, this version reads {MANIFEST_FORMAT}. "
            "Use the llmtune that wrote it, or train the adapter again"
        )
    return manifest


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Return adapter_config.json of an adapter kept as safetensors.

    Raises:
        LlmtuneError: it is not an adapter, of a method that llmtune does not have, or its weights
            are pickled.
    """
    if not _is_adapter(directory):
        raise LlmtuneError(
            f"{directory}: no adapter here: expected {CONFIG_NAME}. Give the directory of an "
            "adapter (a run's is RUN/adapter), or copy back what is lost"
        )
    config = read_json_object(directory / CONFIG_NAME, advice=COPY_AGAIN)
    try:
        method_of(config)
    except LlmtuneError as error:
        raise LlmtuneError(f"{directory}: {error}") from None
    if not (directory / WEIGHTS_NAME).is_file():
        is_pickled = (directory / PICKLE_NAME).is_file()
        raise LlmtuneError(
            f"{directory}: no {WEIGHTS_NAME} beside {CONFIG_NAME}"
            + (
                f", only pickled weights, which are not read ({PICKLE_NAME}). Save the adapter "
                "again as safetensors, which is what peft's save_pretrained does"
                if is_pickled
                else ": its weights are lost. Copy them back, or make the adapter again (a run's "
                "with: llmtune train RUN --force)"
            )
        )
    return config


def has_strengths(directory: Path) -> bool:
    """Whether a live adapter can be weakened (`adapters.live`): no bias or token row of it."""
    config = read_adapter_config(directory)
    tensors = read_header(directory / WEIGHTS_NAME).tensors
    has_biases = any(entry.name.endswith(".bias") for entry in tensors)
    return method_of(config).has_strength(config) and not has_biases


def check_adapter(directory: Path, *, base_fingerprint: str | None) -> tuple[str, ...]:
    """Check that the adapter is as it was saved and belongs to this base; return notices.

    An adapter without our manifest cannot be checked here; its notice says so.

    Raises:
        LlmtuneError: it is not a usable adapter, its files are not those that were saved, or it is
            one of a different base.
    """
    read_adapter_config(directory)
    if not (directory / MANIFEST_NAME).is_file():
        return (
            f"{directory}: not written by llmtune, so its base cannot be verified; shapes are "
            "checked",
        )
    manifest = read_adapter_manifest(directory)
    _require_unchanged(directory, manifest.get("files") or {})
    base = manifest.get("base", {})
    trained_on = base.get("fingerprint")
    if base_fingerprint is not None and trained_on != base_fingerprint:
        raise LlmtuneError(
            f"{directory}: this adapter was trained on a different base: {base.get('origin')} "
            f"(fingerprint {str(trained_on)[:16]}), the base given has fingerprint "
            f"{base_fingerprint[:16]}. Give model.base={base.get('origin')}."
        )
    return ()


def _require_unchanged(directory: Path, files: Mapping[str, str]) -> None:
    """Compare config and weights with the hashes that were taken when they were saved."""
    changed = [
        name
        for name in (CONFIG_NAME, WEIGHTS_NAME)
        if name in files and hash_file(directory / name) != files[name]
    ]
    if changed:
        raise LlmtuneError(
            f"{directory}: {' and '.join(changed)} changed since the adapter was saved (by the "
            f"hash in {MANIFEST_NAME}): damaged, or edited by hand. {COPY_AGAIN}"
        )


def adapter_fingerprint(directory: Path) -> str:
    """Return a hash of the adapter's config and weights.

    Raises:
        LlmtuneError: it is not a usable adapter.
    """
    read_adapter_config(directory)
    return hash_json([hash_file(directory / name) for name in (CONFIG_NAME, WEIGHTS_NAME)])


def has_effect(directory: Path) -> bool:
    """Whether the adapter changes the model: its tensors have moved, or it has a saved module.

    Raises:
        LlmtuneError: there are no readable weights.
    """
    method = method_of(read_adapter_config(directory))
    weights = read_header(directory / WEIGHTS_NAME)
    if any(method.TENSOR_MARK not in entry.name for entry in weights.tensors):
        return True
    with weights.path.open("rb") as file:
        for entry in weights.tensors:
            neutral = method.neutral_value(entry.name)
            if neutral is not None:
                file.seek(entry.start)
                if not _is_filled(file.read(entry.num_bytes), neutral, entry.dtype):
                    return True
    return False


def _is_filled(content: bytes, value: float, dtype: str) -> bool:
    """Whether every number of a stored tensor is this one."""
    if dtype == "BF16":
        number = struct.pack("<f", value)[2:]
    else:
        number = struct.pack({"F16": "<e", "F32": "<f", "F64": "<d"}[dtype], value)
    return content == number * (len(content) // len(number))


def _is_adapter(directory: Path) -> bool:
    return (directory / CONFIG_NAME).is_file()
