"""Output that appears whole or not at all: written beside its place, flushed, renamed.

A lock, which the kernel takes away with its process, distinguishes what a killed one left from what
a running one writes. Entries of a cache are whole directories; the oldest go.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from llmtune.errors import LlmtuneError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

WRITING = ".writing-"
"""Begins the name of a directory that is being written or taken away."""


@contextmanager
def unfinished_dir(out: Path) -> Iterator[Path]:
    """A locked scratch directory beside `out`; it is removed at the end with what is still in it.

    Make the output in a directory below it, and give that to `move_into_place`.

    Raises:
        LlmtuneError: the disk ran full while something was written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    scratch, lock = _make_locked(out.parent, _prefix(out, "tmp"))
    try:
        with _explained(out):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that is flushed and renamed to it at the end, or removed.

    Raises:
        LlmtuneError: the disk ran full while it was written.
    """
    with unfinished_dir(path) as scratch:
        unfinished = scratch / path.name
        yield unfinished
        _flush(unfinished)
        unfinished.replace(path)
        _flush(path.parent)


def remove_leftovers(out: Path) -> None:
    """Remove what killed processes left beside `out`; what a running one writes is kept.

    A directory that was being replaced goes back to its place where the new one never came.
    """
    if not out.exists():
        for replaced in out.parent.glob(_pattern(out, "old")):
            replaced.rename(out)
            break
    for kind in ("tmp", "old"):
        for leftover in out.parent.glob(_pattern(out, kind)):
            _remove_unlocked(leftover)


def remove_all_leftovers(directory: Path) -> None:
    """Remove what killed processes left of any output in `directory`, which must be our own."""
    for leftover in directory.glob(".*.tmp-*"):
        _remove_unlocked(leftover)


def move_into_place(finished: Path, out: Path) -> None:
    """Flush the directory `finished` and rename it to `out`; what is there stays until then."""
    finished.chmod(0o755)
    for path in (*finished.rglob("*"), finished):
        _flush(path)
    replaced = None
    if out.exists():
        replaced = Path(tempfile.mkdtemp(prefix=_prefix(out, "old"), dir=out.parent))
        out.rename(replaced)
    finished.rename(out)
    _flush(out.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def refuse_to_replace(
    out: Path, *, product: str, is_own: Callable[[Path], bool], force: bool
) -> None:
    """Check that nothing is replaced unasked, and nothing but an earlier result at all.

    Args:
        out: the file or directory to make.
        product: what `is_own` recognizes, with its article.
        is_own: whether an earlier result is there, which may be replaced.
        force: whether it may be.

    Raises:
        LlmtuneError: there is something that may not be replaced.
    """
    if not out.exists():
        return
    if not force:
        raise LlmtuneError(f"{out}: exists already; choose another --out, or give --force")
    if not is_own(out):
        raise LlmtuneError(f"{out}: is not {product}, so it is not replaced; choose another --out")


def free_bytes(out: Path) -> int:
    """Return the free bytes of the disk on which `out` is or would be."""
    places = (out.absolute(), *out.absolute().parents)
    return shutil.disk_usage(next(place for place in places if place.exists())).free


def require_space(out: Path, needed: int, *, what: str | None = None) -> None:
    """Check that `needed` more bytes fit onto the disk of `out`; messages call it `what`.

    Raises:
        LlmtuneError: they do not.
    """
    free = free_bytes(out)
    if free < needed:
        raise LlmtuneError(
            f"{what or out.name} needs {needed:,} bytes and its disk has {free:,} free; free some "
            "space, or choose a place on another disk"
        )


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a scratch directory and lock it; another start may take it before the lock is ours."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if scratch.exists():
            return scratch, lock
        os.close(lock)


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise LlmtuneError(
            f"the disk of {out.parent} ran full while {out.name} was written "
            f"({os.strerror(error.errno)}); nothing was left there"
        ) from error


def _remove_unlocked(leftover: Path) -> None:
    try:
        descriptor = os.open(leftover, os.O_RDONLY)
    except FileNotFoundError:
        return  # another start removed it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(leftover, ignore_errors=True)
    except BlockingIOError:
        pass  # another process is writing there
    finally:
        os.close(descriptor)


def _prefix(out: Path, kind: str) -> str:
    return f".{out.name}.{kind}-"


def _pattern(out: Path, kind: str) -> str:
    return f"{escape(_prefix(out, kind))}*"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_entry(entry: Path) -> Iterator[Path]:
    """An empty directory beside `entry` to write to, locked; it is gone at the end, if not renamed.

    Its parent is made, and what killed processes left there is removed.

    Raises:
        OSError: the cache cannot be written.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    for leftover in entry.parent.glob(f"{WRITING}*"):
        _remove_unlocked(leftover)
    directory, lock = _make_locked(entry.parent, WRITING)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


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
    away, lock = _make_locked(entry.parent, WRITING)
    try:
        with contextlib.suppress(FileNotFoundError):
            entry.rename(away / entry.name)
        shutil.rmtree(away, ignore_errors=True)
    finally:
        os.close(lock)


def _forget_oldest(directory: Path, num_kept: int) -> None:
    """Keep the entries that were used last."""
    ages = []
    for entry in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            ages.append((entry.stat().st_mtime, entry))
    kept = sorted((pair for pair in ages if not pair[1].name.startswith(".")), reverse=True)
    for _, entry in kept[num_kept:]:
        _move_away(entry)
