"""A sharded base that the first process scores, while the others lend it their parts.

The first process does all that an evaluation does, in its own order. So answers, diagnoses and
caches are those of one process, and so is the time.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from llmtune.errors import LlmtuneError, ProcessLost
from llmtune.evaluation.sharing import other_model
from llmtune.io.processes import Processes
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel
from llmtune.training.sharding import borrowing, lend

FIRST_TOKENS = 8
"""Of the pass that all processes run together when a model is loaded."""


class Borrowing:
    """The first process's side: has models loaded in parts, one at a time."""

    def __init__(self, processes: Processes, load: Callable[[str], LiveModel]) -> None:
        self._processes = processes
        self._load = load
        self._borrowed = ExitStack()

    def load(self, arm: str) -> LiveModel:
        """Load a model, a part in every process; the one before it answers no more.

        Raises:
            ProcessLost: it cannot be loaded, or its layers cannot be cut.
        """
        self._borrowed.close()
        release_memory()  # of the one before it
        self._tell_all({"model": arm})
        try:
            live = self._load(arm)
        except LlmtuneError as error:
            # nobody may go on without it: the others have their parts, and wait for this one's
            raise ProcessLost(str(error), error.exit_code) from error
        self._tell_all(live.identity.as_dict())
        _run_together(live)
        self._borrowed.enter_context(borrowing(live.model, self._processes))
        return live

    def end(self) -> None:
        """Let the others go: there is nothing more to score."""
        self._borrowed.close()
        self._tell_all({})

    def _tell_all(self, message: Mapping[str, object]) -> None:
        for rank in range(1, self._processes.world_size):
            self._processes.send(rank, message)


def lend_parts(processes: Processes, load: Callable[[str], LiveModel]) -> None:
    """Load what the first process asks for and lend this one's part of it, until it asks no more.

    Raises:
        LlmtuneError: a model that is loaded here is not the one that the first process scores.
    """
    while asked := processes.receive(0):
        arm = str(asked["model"])
        live = load(arm)
        if live.identity.as_dict() != processes.receive(0):
            raise other_model(arm)
        _run_together(live)
        lend(live.model, processes)
        del live
        release_memory()  # for the next one


def _run_together(live: LiveModel) -> None:
    """Run a few tokens, which makes the layers ready to be put together one by one."""
    ids = torch.arange(FIRST_TOKENS, device=live.device)[None]
    with torch.no_grad():
        live.model(input_ids=ids, use_cache=False)
