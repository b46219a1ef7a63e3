"""Directories of a cache: put in place whole, the oldest removed."""

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

WRITING = ".writing-"
"""Begins the name of a directory that is being written or taken away."""
DAY_SECONDS = 24 * 3600


def new_entry(entry: Path) -> Path:
    """Return an empty directory beside `entry` to write to; its parent is made.

    Raises:
        OSError: the cache cannot be written.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=entry.parent, prefix=WRITING))


def replace_entry(directory: Path, entry: Path, *, num_kept: int) -> None:
    """Rename a written directory to `entry`, and keep the `num_kept` entries used last.

    An earlier entry is damaged, or another process was faster with the same content.

    Raises:
        OSError: the cache cannot be written.
    """
    _move_away(entry)
    directory.rename(entry)
    _forget_oldest(entry.parent, num_kept)


def _move_away(entry: Path) -> None:
    """Take an entry out of the way in one step; whoever has mapped it keeps its bytes."""
    if not entry.exists():
        return
    away = Path(tempfile.mkdtemp(dir=entry.parent, prefix=WRITING))
    with contextlib.suppress(FileNotFoundError):
        entry.rename(away / entry.name)
    shutil.rmtree(away, ignore_errors=True)


def _forget_oldest(directory: Path, num_kept: int) -> None:
    """Keep the entries that were used last, and nothing left by a process that was killed."""
    ages = []
    for entry in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            ages.append((entry.stat().st_mtime, entry))
    yesterday = time.time() - DAY_SECONDS
    left = [entry for age, entry in ages if entry.name.startswith(WRITING) and age < yesterday]
    kept = sorted((pair for pair in ages if not pair[1].name.startswith(".")), reverse=True)
    for entry in [*left, *(entry for _, entry in kept[num_kept:])]:
        _move_away(entry)
