"""Calls to the network that may not take longer than a given time."""

import threading
from collections.abc import Callable


def call_within(seconds: float, call: Callable[[], str]) -> str:
    """Return `call()`; name look-ups know no timeout of their own, so a thread makes the call.

    Raises:
        TimeoutError: there was no answer within `seconds`; the call is left to end by itself.
    """
    outcome: list[str] = []
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
