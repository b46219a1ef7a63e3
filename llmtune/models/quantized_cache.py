"""Quantized bases kept by content: the next load reads the small numbers, quantizing nothing."""

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from llmtune.io.cached import cache_dir
from llmtune.io.environment import package_version
from llmtune.io.fingerprint import hash_file, hash_json, hash_text
from llmtune.io.json_files import parse_json, read_json_object
from llmtune.io.sizes import format_size
from llmtune.io.unfinished import new_entry, replace_entry
from llmtune.models.checkpoint import CONFIG_NAME, GENERATION_NAME, Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.quiet import quiet_loading

logger = logging.getLogger(__name__)

FOLDER = "quantized"
META_FILE = "meta.txt"
LIBRARIES = ("bitsandbytes", "transformers", "torch", "safetensors")
KEPT_ENTRIES = 4
SHARD_SIZE = "1GB"
SPARE_FACTOR = 3
"""An entry is written only if this many times its bytes are free: a run needs the disk more."""
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


def quantized_entry(
    config: ModelConfig,
    source: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Path | None:
    """Return where this very base in these very numbers is kept; None if it is not kept.

    The name is a hash of everything the numbers depend on: the base's fingerprint, its config
    files, size and time of change of its weight files (the fingerprint samples them), the
    quantization section, the dtype, the kind of device and the libraries' versions. A base that is
    quantized already, or that brings code of its own, is not kept.
    """
    if not config.storage.is_cached or not config.cache_quantized:
        return None
    if config.trust_remote_code or source.is_quantized:
        return None
    files = [source.directory / name for name in (CONFIG_NAME, GENERATION_NAME)]
    weights = [*source.directory.glob("*.safetensors"), *source.directory.glob("*.bin")]
    key = {
        "fingerprint": source.fingerprint,
        "configs": {path.name: hash_file(path) for path in files if path.is_file()},
        "weights": {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in weights},
        "quantization": config.storage.model_dump(mode="json"),
        "dtype": str(dtype),
        "device": device.type,
        "versions": {name: package_version(name) for name in LIBRARIES},
    }
    return cache_dir() / FOLDER / hash_json(key)


def is_whole(entry: Path) -> bool:
    """Say whether every byte of an entry is as it was written; a damaged one is named in the log.

    Reads the entry once, which also brings it into the page cache for the load that follows.
    """
    if not entry.is_dir():
        return False
    try:
        seal, _, text = (entry / META_FILE).read_text(encoding="utf-8").partition("\n")
        hashes = parse_json(text) if seal == hash_text(text) else {}
        if hashes and all(hash_file(entry / name) == wanted for name, wanted in hashes.items()):
            with contextlib.suppress(OSError):  # of another user, or on a read-only disk
                os.utime(entry)
            return True
    except (OSError, ValueError):
        pass
    say_unusable(entry, "it is damaged or half written")
    return False


def say_unusable(entry: Path, reason: object) -> None:
    """Log, in one line, that the base is quantized anew although there is an entry."""
    logger.warning("%s is not used, the base is quantized anew: %s", entry, reason)


def keep_quantized(entry: Path, model: PreTrainedModel, source_dir: Path, num_bytes: int) -> None:
    """Write a quantized model as a checkpoint of its own at `entry`, whole or not at all.

    It is written beside its place and renamed, so two processes may do this at once. Where the disk
    has no room, or cannot be written, nothing is left and one log line says so: a run needs no
    cache.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(entry.parent).free
        if free < SPARE_FACTOR * num_bytes:
            logger.warning(
                "the quantized base (%s) is not kept: %s are free in %s",
                format_size(num_bytes),
                format_size(free),
                entry.parent,
            )
            return
        with new_entry(entry) as directory:
            _write(directory, model, source_dir)
            replace_entry(directory, entry, num_kept=KEPT_ENTRIES)
    except (OSError, SafetensorError) as error:  # safetensors' only reason to fail is the disk
        logger.warning("the quantized base is not kept in %s: %s", entry.parent, error)


def _write(directory: Path, model: PreTrainedModel, source_dir: Path) -> None:
    with quiet_loading(), _kept_config(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CPU counts as offloading there
        # The model's own layout: turning fused experts back would need a second copy of them.
        model.save_pretrained(directory, max_shard_size=SHARD_SIZE, save_original_format=False)
    # Everything but the numbers stays the source's: defaults and repairs are made at every load.
    written = read_json_object(directory / CONFIG_NAME)["quantization_config"]
    config = {**read_json_object(source_dir / CONFIG_NAME), "quantization_config": written}
    (directory / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    (directory / GENERATION_NAME).unlink(missing_ok=True)
    if (source_dir / GENERATION_NAME).is_file():
        shutil.copyfile(source_dir / GENERATION_NAME, directory / GENERATION_NAME)
    text = json.dumps({path.name: hash_file(path) for path in sorted(directory.iterdir())})
    (directory / META_FILE).write_text(f"{hash_text(text)}\n{text}", encoding="utf-8")


@contextlib.contextmanager
def _kept_config(model: PreTrainedModel) -> Iterator[None]:
    """Undo what saving notes in the model's own config."""
    before = {name: getattr(model.config, name) for name in ("dtype", "architectures")}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
