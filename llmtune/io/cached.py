"""The cache directory, and a checkpoint in it that is made once: whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.io.unfinished import unfinished_dir


def cache_dir() -> Path:
    """Return $LLMTUNE_CACHE, else $XDG_CACHE_HOME/llmtune, else ~/.cache/llmtune."""
    if given := os.environ.get("LLMTUNE_CACHE"):
        return Path(given).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "llmtune"


def make_once(target: Path, write: Callable[[Path], None], *, marker: str, source: str) -> None:
    """Let `write` fill a directory beside `target`, then rename it into place.

    What a killed conversion left is removed; what another process is writing is kept. A target
    that holds a file called `marker` is whole.

    Raises:
        LlmtuneError: there is no room to write, or no right to.
    """
    with unfinished_dir(target) as scratch:
        made = scratch / target.name
        made.mkdir()
        try:
            write(made)
            for path in made.rglob("*"):  # some writers leave files that only their owner can read
                path.chmod(0o755 if path.is_dir() else 0o644)
            try:
                made.rename(target)
            except OSError:
                if not (target / marker).is_file():
                    raise
                # another process was faster; its checkpoint is the same
        except OSError as error:
            raise LlmtuneError(
                f"{target}: the checkpoint made from {source} could not be written: {error}. "
                "Set LLMTUNE_CACHE to a directory with room."
            ) from error
