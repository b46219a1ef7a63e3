"""What libraries say by themselves: loggers turned down, native prints kept out of the output."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class _Quieted:
    """A logger that somebody holds down: its own level, what it let through, what is asked now."""

    own: int
    effective: int
    asked: list[int] = field(default_factory=list)


_held: dict[str, _Quieted] = {}
_lock = threading.Lock()


@contextmanager
def quieted(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Hide the messages of logger `name` and its children below `level` inside.

    It never makes a logger louder. Several may hold one logger, in any order and from any thread:
    the strictest counts, and the last to leave puts back the level that the first one found.
    """
    logger = logging.getLogger(name)
    with _lock:
        held = _held.setdefault(name, _Quieted(logger.level, logger.getEffectiveLevel()))
        held.asked.append(level)
        logger.setLevel(max(held.effective, *held.asked))
    try:
        yield
    finally:
        with _lock:
            held.asked.remove(level)
            if held.asked:
                logger.setLevel(max(held.effective, *held.asked))
            else:
                logger.setLevel(_held.pop(name).own)


@contextmanager
def native_prints_aside() -> Iterator[None]:
    """Let what native code prints to the standard output go to the standard error inside.

    `tokenizers` prints so of keys that it does not know, into the middle of our JSON.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
