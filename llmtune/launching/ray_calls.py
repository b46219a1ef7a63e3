"""Calls of one function side by side on Ray: on the cluster that runs, else on one made here.

Ray finds a running cluster itself (`RAY_ADDRESS` names one).
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from llmtune.errors import LlmtuneError
from llmtune.launching.base import Called, R, T

RETRIES = 5
"""How often a call is made again after Ray lost its process; a run continues from what it saved."""
ENDING_SECONDS = 60

log = logging.getLogger("llmtune")


def call_each(
    function: Callable[[T], R], values: Sequence[T], *, wants_gpu: bool
) -> Iterator[Called[R]]:
    """Call a function for every value, each in a fresh process; yield what has ended.

    Left early, it stops the calls that run and waits for them.
    """
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(log_to_driver=True)
    cpus, gpus = _share(ray.nodes(), wants_gpu=wants_gpu)
    # a fresh process for each: what a run leaves in memory goes with it
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(_call)
    here = str(Path.cwd())
    tasks = {remote.remote(function, value, here): number for number, value in enumerate(values)}
    try:
        while tasks:
            (done,), _ = ray.wait(list(tasks), num_returns=1)
            yield _ended(tasks.pop(done), done)
    finally:
        for task in tasks:
            ray.cancel(task)
        if tasks:
            ray.wait(list(tasks), num_returns=len(tasks), timeout=ENDING_SECONDS)
        if is_ours:
            ray.shutdown()


def _ended(number: int, task: Any) -> Called[Any]:
    try:
        return Called(number, ray.get(task))
    except ray.exceptions.RayTaskError as error:
        log.error("%s", error)
        return Called(number, lost=f"it failed in a way that is a bug: {_last_line(error)}")
    except ray.exceptions.RayError as error:
        return Called(number, lost=f"its process on Ray was lost: {_last_line(error)}")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _share(nodes: Sequence[dict[str, Any]], *, wants_gpu: bool) -> tuple[int, int]:
    """Return the CPUs and GPUs of one call: a GPU, or where there is none a whole node.

    Raises:
        LlmtuneError: no node is there to work.
    """
    found = [
        (int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0)))
        for node in nodes
        if node["Alive"]
    ]
    with_gpus = [cpus // gpus for cpus, gpus in found if gpus]
    if wants_gpu and with_gpus:
        return max(1, min(with_gpus)), 1
    whole = [cpus for cpus, _ in found if cpus]
    if not whole:
        raise LlmtuneError("--on ray: no node of the cluster has a CPU for it")
    return min(whole), 0


def _call(function: Callable[[Any], Any], value: Any, directory: str) -> Any:
    """Call the function in the directory in which the command was typed; Ray shows what is said."""
    os.chdir(directory)
    logger = logging.getLogger("llmtune")
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(logging.INFO)
    return function(value)
