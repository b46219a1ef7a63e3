"""Calls of one function side by side on Ray: on the cluster that runs, else on one made here.

Ray finds a running cluster itself (`RAY_ADDRESS` names one).
"""

import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmtune.errors import LlmtuneError
from llmtune.launching.base import Called, R, T

RETRIES = 5
"""How often a call is made again after Ray lost its process; a run continues from what it saved."""
ENDING_SECONDS = 60

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class Slot:
    """Room for one call at a time: a GPU with its share of a node's CPUs, or a whole node."""

    node: str
    number: int
    """Of those on its node."""
    cpus: int
    gpus: int


def call_each(
    function: Callable[[T], R], values: Sequence[T], *, wants_gpu: bool
) -> Iterator[Called[R]]:
    """Call a function for every value, each in a fresh process; yield what has ended.

    Left early, it stops the calls that run and waits for them.

    Raises:
        LlmtuneError: no node is there to work.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(log_to_driver=True)
    waiting, losses = deque(range(len(values))), Counter[int]()
    running: dict[Any, tuple[int, Slot]] = {}
    try:
        on_gpus = wants_gpu and bool(_slots(on_gpus=True))
        if not _slots(on_gpus=on_gpus):
            raise LlmtuneError("--on ray: no node of the cluster has a CPU for it")
        while waiting or running:
            taken = {slot for _, slot in running.values()}
            free = [slot for slot in _slots(on_gpus=on_gpus) if slot not in taken]
            for slot in free[: len(waiting)]:
                number = waiting.popleft()
                running[_start(function, values[number], slot)] = number, slot
            if not running:
                yield from (Called(number, lost="the cluster lost its nodes") for number in waiting)
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            number, _ = running.pop(done)
            called = _ended(number, done)
            if called.lost is not None and losses[number] < RETRIES:
                losses[number] += 1
                log.warning("%s; it is called again", called.lost)
                waiting.append(number)
                continue
            yield called
    finally:
        for task in running:
            ray.cancel(task)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=ENDING_SECONDS)
        if is_ours:
            ray.shutdown()


def _slots(*, on_gpus: bool) -> list[Slot]:
    """Return the room of the nodes that are alive: one call a GPU, or one a node."""
    slots = []
    for node in ray.nodes():
        cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
        if node["Alive"] and on_gpus:
            each = max(1, cpus // max(gpus, 1))
            slots += [Slot(node["NodeID"], number, each, 1) for number in range(gpus)]
        elif node["Alive"] and cpus:
            slots.append(Slot(node["NodeID"], 0, cpus, 0))
    return slots


def _start(function: Callable[[Any], Any], value: Any, slot: Slot) -> Any:
    remote = ray.remote(
        num_cpus=slot.cpus,
        num_gpus=slot.gpus,
        max_retries=0,  # Ray would try the same node again, also one that is gone
        max_calls=1,  # a fresh process for each: what a run leaves in memory goes with it
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=slot.node, soft=False),
    )
    return remote(_call).remote(function, value, str(Path.cwd()))


def _ended(number: int, task: Any) -> Called[Any]:
    try:
        return Called(number, ray.get(task))
    except ray.exceptions.RayTaskError as error:
        log.error("%s", error)
        return Called(number, broken=f"it failed in a way that is a bug: {_last_line(error)}")
    except ray.exceptions.RayError as error:
        return Called(number, lost=f"its process on Ray was lost: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _call(function: Callable[[Any], Any], value: Any, directory: str) -> Any:
    """Call the function in the directory in which the command was typed; Ray shows what is said."""
    os.chdir(directory)
    logger = logging.getLogger("llmtune")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(logging.INFO)
    return function(value)
