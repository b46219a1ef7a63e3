"""What the processes of an arm send each other, and how long llmtune's reduction takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from torch import Tensor

from bench_arms.job import StepReduction
from llmtune.io.processes import Processes
from llmtune.training.reduction import Reduction

LOOPBACK = "lo"


def loopback_bytes() -> int:
    """Return how much this machine has sent to itself so far; 0 where it has no loopback."""
    counters = psutil.net_io_counters(pernic=True).get(LOOPBACK)
    return 0 if counters is None else counters.bytes_sent


@contextmanager
def timed_reductions() -> Iterator[list[StepReduction]]:
    """Time every reduction of a step's gradients inside.

    It begins with a small exchange, in which the first process waits until the others have done
    their rows. That is not the reduction's doing, so it is counted apart.
    """
    found: list[StepReduction] = []
    waited, num_bytes = 0.0, 0
    kept = {"add_up": Reduction.add_up, "largest": Processes.largest, "send": Processes.add_up}

    def largest(self: Processes, *arguments: Any) -> Any:
        nonlocal waited
        started = time.perf_counter()
        try:
            return kept["largest"](self, *arguments)
        finally:
            waited += time.perf_counter() - started

    def send(self: Processes, tensor: Tensor) -> None:
        nonlocal num_bytes
        num_bytes += tensor.nbytes
        kept["send"](self, tensor)

    def add_up(self: Reduction, loss: Tensor) -> Any:
        nonlocal waited, num_bytes
        waited, num_bytes, started = 0.0, 0, time.perf_counter()
        try:
            return kept["add_up"](self, loss)
        finally:
            seconds = time.perf_counter() - started
            found.append(StepReduction(seconds - waited, waited, num_bytes))

    Reduction.add_up, Processes.largest, Processes.add_up = add_up, largest, send
    try:
        yield found
    finally:
        Reduction.add_up, Processes.largest = kept["add_up"], kept["largest"]
        Processes.add_up = kept["send"]
