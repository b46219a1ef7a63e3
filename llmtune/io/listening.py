"""Functions of a program that hear each line of a run's metrics as it is written."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Heard = Callable[[Mapping[str, Any]], object]
"""A function that is called with a line of metrics: step, epoch, loss or eval_loss, ..."""

_HEARERS: ContextVar[tuple[Heard | None, Heard | None]] = ContextVar(
    "hearers", default=(None, None)
)


@contextmanager
def hearing(on_step: Heard | None, on_eval: Heard | None) -> Iterator[None]:
    """Call `on_step` with each line of a step, `on_eval` with each of an evaluation."""
    token = _HEARERS.set((on_step, on_eval))
    try:
        yield
    finally:
        _HEARERS.reset(token)


def tell_hearers(line: Mapping[str, Any]) -> None:
    """Pass a line on to those who listen; what they raise ends the run."""
    on_step, on_eval = _HEARERS.get()
    hearer = on_eval if "eval_loss" in line else on_step
    if hearer is not None:
        hearer(dict(line))
