"""Runs that do not wait for each other: one after another here, or side by side on an engine."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llmtune.config import RunConfig
from llmtune.errors import CheckFailed, LlmtuneError, ProcessLost, RunInterrupted
from llmtune.io.processes import joined_processes
from llmtune.launching.base import Engine
from llmtune.launching.config import ENGINES
from llmtune.runs import pipeline

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class Task:
    """One run, or its training alone."""

    config: RunConfig
    force: bool = False
    until: Literal["train", "report"] = "report"


@dataclass(frozen=True)
class Outcome:
    """How a task ended, in values that can be sent: an error may be one that cannot."""

    message: str | None = None
    exit_code: int = 0

    @property
    def error(self) -> LlmtuneError | None:
        """Return the error that it ended with."""
        if self.message is None:
            return None
        kinds = {each.exit_code: each for each in (CheckFailed, RunInterrupted)}
        return kinds.get(self.exit_code, LlmtuneError)(self.message)


def find_caller(name: str | None) -> Engine | None:
    """Return the engine on which runs are done side by side; None does them here.

    Raises:
        LlmtuneError: several processes were started already.
    """
    if name is None:
        return None
    if joined_processes().are_many:
        raise LlmtuneError(f"--on {name}: it starts processes itself; start the command in one")
    return next(engine for engine in ENGINES if engine.name == name)


def do_all(
    tasks: Sequence[Task], engine: Engine | None
) -> Iterator[tuple[int, LlmtuneError | None]]:
    """Do every task; yield its number and what it failed by, if it did, when it has ended.

    Here they are done in their order, on an engine in any.

    Raises:
        RunInterrupted: one was stopped, or the engine lost its process and the others have ended;
            what it saved is kept.
    """
    if engine is None:
        for number, task in enumerate(tasks):
            try:
                do(task)
            except RunInterrupted:
                raise
            except LlmtuneError as error:
                yield number, error
            else:
                yield number, None
        return
    wants_gpu = any(task.config.model.device != "cpu" for task in tasks)
    lost: list[str] = []
    for called in engine.call_each(attempt, tasks, wants_gpu=wants_gpu):
        if called.lost is not None:
            lost.append(f"{tasks[called.number].config.run_dir}: {called.lost}")
            log.warning("%s", lost[-1])
            continue
        failed = None if called.broken is None else LlmtuneError(called.broken)
        if called.value is not None:
            failed = called.value.error
        if isinstance(failed, RunInterrupted):
            raise failed
        yield called.number, failed
    if lost:
        raise ProcessLost(
            f"{len(lost)} of {len(tasks)} runs were lost, and the others have ended; the same "
            f"command continues from what is saved. The first: {lost[0]}"
        )


def do(task: Task) -> None:
    """Do one task here."""
    if task.until == "train":
        pipeline.train(task.config, force=task.force)
    else:
        pipeline.run(task.config, force=task.force)


def attempt(task: Task) -> Outcome:
    """Do one task on a machine of an engine."""
    try:
        do(task)
    except LlmtuneError as error:
        return Outcome(str(error), error.exit_code)
    return Outcome()
