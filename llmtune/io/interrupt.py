"""Defer SIGINT and SIGTERM until the work at hand has reached a good place to stop."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Interruption:
    """Whether someone asked the run to stop, and with which signal."""

    signal_name: str | None = None


@contextlib.contextmanager
def catch_interruption() -> Iterator[Interruption]:
    """Collect the first SIGINT or SIGTERM inside; a second one acts as usual.

    Outside the main thread signals cannot be caught, so nothing is.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        interruption.signal_name = signal.Signals(number).name
        for one, handler in previous.items():
            signal.signal(one, handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
