"""A sharded base that the first process scores, while the others lend it their parts.

The first process does all that an evaluation does, in its own order. Before one of the model's
layers runs it says which one; the others bring their parts of that layer together with its own, and
drop them again. So answers, diagnoses and caches are those of one process, and so is the time.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from llmtune.evaluation.sharing import other_model
from llmtune.io.processes import Processes
from llmtune.models.live import LiveModel
from llmtune.training.sharding import cut_layers

FIRST_TOKENS = 8
"""Of the pass that all processes run together when a model is loaded."""
NO_MORE = -1


class Borrowing:
    """The first process's side: has models loaded in parts, one at a time."""

    def __init__(self, processes: Processes, load: Callable[[str], LiveModel]) -> None:
        self._processes = processes
        self._load = load
        self._has_borrowed = False

    def load(self, arm: str) -> LiveModel:
        """Load a model, a part in every process; the one before it answers no more.

        Raises:
            LlmtuneError: it cannot be loaded, or its layers cannot be cut.
        """
        self._give_back()
        self._tell_all({"model": arm})
        live = self._load(arm)
        self._tell_all(live.identity.as_dict())
        _run_together(live)
        for number, layer in enumerate(cut_layers(live.model)):
            layer.register_forward_pre_hook(partial(self._ask, number), prepend=True)
        self._has_borrowed = True
        return live

    def end(self) -> None:
        """Let the others go: there is nothing more to score."""
        self._give_back()
        self._tell_all({})

    def _ask(self, number: int, layer: nn.Module, _: object) -> None:
        layer.reshard()  # whole still if memory ran out in the last pass
        self._processes.copy_first(torch.tensor([number]))

    def _give_back(self) -> None:
        if self._has_borrowed:
            self._processes.copy_first(torch.tensor([NO_MORE]))
        self._has_borrowed = False

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
        layers, wanted = cut_layers(live.model), torch.tensor([NO_MORE])
        while True:
            processes.copy_first(wanted)
            if wanted.item() == NO_MORE:
                break
            layer = layers[int(wanted)]
            layer.unshard()
            layer.reshard()
        del live, layers


def _run_together(live: LiveModel) -> None:
    """Run a few tokens, which makes the layers ready to be put together one by one."""
    ids = torch.arange(FIRST_TOKENS, device=live.device)[None]
    with torch.no_grad():
        live.model(input_ids=ids, use_cache=False)
