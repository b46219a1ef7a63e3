"""What is saved beside an adapter: its manifest, and checks that need no torch."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtune.adapters.config import METHODS, method_of
from llmtune.adapters.module_selection import ALL_LINEAR
from llmtune.adapters.patterns import require_quick_patterns
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
NEEDED_SETTINGS = frozenset({"r", "lora_alpha"})
"""Never `null`."""
MOST_RANK = 1 << 20
MOST_ALPHA = 1e9


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
    for name in ("base", "config", "files", "template"):
        if not isinstance(manifest.get(name) or {}, dict):
            raise LlmtuneError(f"{path}: {name} is not an object. {COPY_AGAIN}")
    if not isinstance((manifest.get("config") or {}).get("model") or {}, dict):
        raise LlmtuneError(f"{path}: config.model is not an object. {COPY_AGAIN}")
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
    _check_settings(config, directory / CONFIG_NAME)
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


def _check_settings(config: Mapping[str, Any], path: Path) -> None:
    """Check the values that peft and merging take as they are; `null` mostly counts as not set."""
    owner = next((method for method in METHODS if method.owns(config)), None)
    zeros = owner.ZERO_SETTINGS if owner is not None else frozenset()
    for expected, (is_right, settings) in SETTINGS.items():
        for name in settings:
            value = config.get(name)
            is_set = value is not None or (name in config and name in NEEDED_SETTINGS)
            is_zero = name in zeros and value == 0 and not isinstance(value, bool)
            wanted, fits = expected, is_right
            if owner is not None and name in owner.CHOICE_SETTINGS:
                wanted, fits = "lists of true and false by module", _are_choices
            if is_set and not is_zero and not fits(value):
                raise LlmtuneError(
                    f"{path}: {name} is {str(value)!r:.80}; expected {wanted}. {COPY_AGAIN}"
                )
    names = [one for one in PATTERN_SETTINGS if not owner or one not in owner.CHOICE_SETTINGS]
    patterns = [key for name in names for key in config.get(name) or ()]
    named = [config.get(name) for name in NAME_SETTINGS]
    patterns += [value for value in named if isinstance(value, str) and value != ALL_LINEAR]
    if patterns:
        require_quick_patterns(patterns, (), place=str(path))


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 < value <= MOST_RANK


def _are_choices(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(chosen, list) and all(isinstance(one, bool) for one in chosen)
        for chosen in value.values()
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(float(str(value))) < MOST_ALPHA


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


NAME_SETTINGS = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")
PATTERN_SETTINGS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern")
SETTINGS: Mapping[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    f"a whole number from 1 to {MOST_RANK:,}": (_is_whole, ("r", "init_r", "target_r")),
    "a number": (_is_number, ("lora_alpha", "lora_dropout")),
    "true or false": (
        lambda value: isinstance(value, bool),
        ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"),
    ),
    "a text": (
        lambda value: isinstance(value, str),
        ("peft_type", "task_type", "bias", "base_model_name_or_path", "revision"),
    ),
    "a list of names": (_are_names, ("modules_to_save", "target_parameters")),
    "a list of names, or one regex": (
        lambda value: isinstance(value, str) or _are_names(value),
        NAME_SETTINGS,
    ),
    "whole numbers above 0 by pattern": (
        lambda value: isinstance(value, dict) and all(map(_is_whole, value.values())),
        ("rank_pattern", "n_frequency_pattern"),
    ),
    "numbers by pattern": (
        lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
        ("alpha_pattern",),
    ),
    "a whole number or a list of them": (
        lambda value: (
            isinstance(value, int)
            or (isinstance(value, list) and all(type(n) is int for n in value))
        ),
        ("layers_to_transform",),
    ),
}
"""What is expected: whether a value is that, and the settings that must be."""


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
    base = manifest.get("base") or {}
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
        number = struct.pack({"F16": "<e", "F32": "<f", "F64": "<d"}.get(dtype, "<f"), value)
    return content == number * (len(content) // len(number))


def _is_adapter(directory: Path) -> bool:
    return (directory / CONFIG_NAME).is_file()
