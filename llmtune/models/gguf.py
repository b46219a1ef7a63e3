"""A GGUF file turned into a dense checkpoint, once, in the cache directory."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_file
from llmtune.io.gguf_head import is_gguf
from llmtune.io.run_dir import atomic_write_json
from llmtune.io.unfinished import remove_all_leftovers, unfinished_dir
from llmtune.models.checkpoint import CONFIG_NAME

RECORD_NAME = "llmtune_base.json"

logger = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Return $LLMTUNE_CACHE, else $XDG_CACHE_HOME/llmtune, else ~/.cache/llmtune."""
    if given := os.environ.get("LLMTUNE_CACHE"):
        return Path(given).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "llmtune"


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
    target = cache_dir() / "bases" / sha256[:16]
    if target.parent.is_dir():
        remove_all_leftovers(target.parent)
    if not (target / CONFIG_NAME).is_file():
        logger.info("%s: making a dense checkpoint from it, once, in %s", gguf_path, target)
        make_once(target, lambda directory: _convert(gguf_path, sha256, directory))
    return target, sha256


def make_once(
    target: Path, write: Callable[[Path], None], *, source: str = "the GGUF file"
) -> None:
    """Let `write` fill a directory beside `target`, then rename it into place.

    What a killed conversion left is removed; what another process is writing is kept.
    """
    with unfinished_dir(target) as scratch:
        made = scratch / target.name
        made.mkdir()
        try:
            write(made)
            for path in made.iterdir():  # some writers leave files that only their owner can read
                path.chmod(0o644)
            try:
                made.rename(target)
            except OSError:
                if not (target / CONFIG_NAME).is_file():
                    raise
                # another process was faster; its checkpoint is the same
        except OSError as error:
            raise LlmtuneError(
                f"{target}: the checkpoint made from {source} could not be written: {error}. "
                "Set LLMTUNE_CACHE to a directory with room."
            ) from error


def _convert(gguf_path: Path, sha256: str, directory: Path) -> None:
    # Imported here: a base that was converted before, or is no GGUF at all, loads no torch.
    from llmtune.models.gguf_conversion import convert_gguf

    convert_gguf(gguf_path, directory)
    atomic_write_json(directory / RECORD_NAME, {"gguf_path": str(gguf_path), "gguf_sha256": sha256})
