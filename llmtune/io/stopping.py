"""Stopping in time: signals wait for a good place to stop, calls are given a deadline."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from llmtune.errors import LlmtuneError

T = TypeVar("T")


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


@contextlib.contextmanager
def limited_work(seconds: float, what: str) -> Iterator[None]:
    """Stop what takes longer than so many seconds of the processor: matching a regex, rendering.

    Outside the main thread nothing can be stopped, so nothing is.

    Raises:
        LlmtuneError: it took longer; begins with `what`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise LlmtuneError(f"{what} takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """Return `call()`; name look-ups know no timeout of their own, so a thread makes the call.

    Raises:
        TimeoutError: there was no answer within `seconds`; the call is left to end by itself.
    """
    outcome: list[T] = []
    problem: list[Exception] = []

    def work() -> None:
        try:
            outcome.append(call())
        except Exception as error:  # noqa: BLE001  (raised again by the caller's thread)
            problem.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if problem:
        raise problem[0]
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome[0]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_lines(text: str, count: int) -> str:
    """Return the last lines of what a program printed, as one line."""
    return " | ".join(text.strip().splitlines()[-count:])
