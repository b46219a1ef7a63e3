"""A GGUF file turned into a dense checkpoint, once, in the cache directory."""

import logging
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir, make_once
from llmtune.io.fingerprint import hash_file
from llmtune.io.gguf_head import is_gguf
from llmtune.io.json_files import read_json_object
from llmtune.io.run_dir import atomic_write_json
from llmtune.io.unfinished import remove_all_leftovers
from llmtune.models.checkpoint import CONFIG_NAME

RECORD_NAME = "llmtune_base.json"

logger = logging.getLogger(__name__)


def dense_checkpoint(gguf_path: Path) -> tuple[Path, str]:
    """Return the bfloat16 checkpoint made from `gguf_path`, and the file's SHA-256.

    The checkpoint is made on first use and named after the hash, so the same file is never
    converted twice. It appears whole or not at all, also when two processes make it at once.

    Raises:
        LlmtuneError: not a GGUF file, of a kind transformers cannot read, or no room to write.
    """
    if not is_gguf(gguf_path):
        raise LlmtuneError(f"{gguf_path}: not a GGUF file (its first four bytes are not GGUF).")
    sha256 = hash_file(gguf_path)
    target = _place_of(sha256)
    if target.parent.is_dir():
        remove_all_leftovers(target.parent)
    if not (target / CONFIG_NAME).is_file():
        logger.info("%s: making a dense checkpoint from it, once, in %s", gguf_path, target)
        make_once(
            target,
            lambda directory: _convert(gguf_path, sha256, directory),
            marker=CONFIG_NAME,
            source="the GGUF file",
        )
    return target, sha256


def converted_before(gguf_path: Path) -> Path | None:
    """Return the checkpoint that was made from this GGUF file or a copy of it, if it is there.

    The file is hashed only if a checkpoint was made from one of its size.
    """
    size = gguf_path.stat().st_size
    sizes = set()
    for path in (cache_dir() / "bases").glob(f"*/{RECORD_NAME}"):
        try:
            record = read_json_object(path)
        except LlmtuneError:
            continue
        if "gguf_path" in record:
            sizes.add(record.get("gguf_bytes", size))  # older records have no size
    if size not in sizes:
        return None
    made = _place_of(hash_file(gguf_path))
    return made if (made / CONFIG_NAME).is_file() else None


def _place_of(sha256: str) -> Path:
    return cache_dir() / "bases" / sha256[:16]


def _convert(gguf_path: Path, sha256: str, directory: Path) -> None:
    # Imported here: a base that was converted before, or is no GGUF at all, loads no torch.
    from llmtune.models.gguf_conversion import convert_gguf

    convert_gguf(gguf_path, directory)
    record = {"gguf_path": str(gguf_path), "gguf_bytes": gguf_path.stat().st_size}
    atomic_write_json(directory / RECORD_NAME, {**record, "gguf_sha256": sha256})
