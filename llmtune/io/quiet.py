"""Loggers turned down for a while and then left as they were found."""

import logging
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
