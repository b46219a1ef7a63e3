"""Calls of one function side by side on Ray: on the cluster that runs, else on one made here.

Ray finds a running cluster itself (`RAY_ADDRESS` names one).
"""

import logging
import os
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmtune.errors import LlmtuneError
from llmtune.launching.base import Called, R, T

RETRIES = 5
"""How often a call is made again after Ray lost its process; a run continues from what it saved."""
NODE_LOSSES = 2
"""Calls that a node may lose in a row before it is avoided, as long as others are there."""
ENDING_SECONDS = 60
SILENT_SECONDS = 60
"""How long no call ends before it is said, once, what may hold them up."""

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
    lost_at, has_said = defaultdict[str, set[int]](set), False
    running: dict[Any, tuple[int, Slot]] = {}
    try:
        on_gpus = wants_gpu and bool(_slots(on_gpus=True))
        if not _slots(on_gpus=on_gpus):
            raise LlmtuneError("--on ray: no node of the cluster has a CPU for it")
        while waiting or running:
            taken = {slot for _, slot in running.values()}
            slots = _kept(_slots(on_gpus=on_gpus), lost_at)
            for slot in slots:
                next_one = None if slot in taken else _next_for(slot, waiting, slots, lost_at)
                if next_one is not None:
                    waiting.remove(next_one)
                    running[_start(function, values[next_one], slot)] = next_one, slot
            if not running:
                yield from (Called(number, lost="the cluster lost its nodes") for number in waiting)
                return
            ended, _ = ray.wait(list(running), num_returns=1, timeout=SILENT_SECONDS)
            if not ended:
                if not has_said:
                    _say_pending([slot for _, slot in running.values()])
                has_said = True
                continue  # nodes may have come
            number, slot = running.pop(ended[0])
            called = _ended(number, ended[0])
            if called.lost is None:
                lost_at[slot.node].clear()
            else:
                lost_at[slot.node].add(number)
                if losses[number] < RETRIES:
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
            each = cpus // max(gpus, 1)  # 0 if the node gives none
            slots += [Slot(node["NodeID"], number, each, 1) for number in range(gpus)]
        elif node["Alive"] and cpus:
            slots.append(Slot(node["NodeID"], 0, cpus, 0))
    return slots


def _kept(slots: list[Slot], lost_at: Mapping[str, set[int]]) -> list[Slot]:
    """Return the room of the nodes that do not lose all that they are given; if all do, of all."""
    return [slot for slot in slots if len(lost_at[slot.node]) < NODE_LOSSES] or slots


def _next_for(
    slot: Slot, waiting: Iterable[int], slots: Sequence[Slot], lost_at: Mapping[str, set[int]]
) -> int | None:
    """Return the first call that waits for this room: one that was lost goes to a different node.

    Unless every node has lost it.
    """
    for number in waiting:
        is_lost_by_all = all(number in lost_at[each.node] for each in slots)
        if is_lost_by_all or number not in lost_at[slot.node]:
            return number
    return None


def _say_pending(slots: Sequence[Slot]) -> None:
    """Say what is called; whether Ray has begun with it only its dashboard knows."""
    nodes = ", ".join(sorted({slot.node for slot in slots}))
    log.info(
        "on Ray, %d calls run or wait, on the nodes %s: one begins when its CPUs there (%s) are "
        "free; `ray status -v` says whether something else holds them",
        len(slots),
        nodes,
        " or ".join(sorted({str(slot.cpus) for slot in slots})),
    )


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
