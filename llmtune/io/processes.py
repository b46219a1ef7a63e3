"""The processes that a launcher (torchrun, accelerate launch, srun) started together for one run.

The first one runs the command. The others wait for its orders, do their share of each training, and
end with it. Outside of a training they talk through the launcher's key-value store, which has no
time limit; inside they are connected by gloo (numbers, decisions) and on GPUs by NCCL (gradients).
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from llmtune.errors import LlmtuneError, ProcessLost
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import parse_json, plain_reason
from llmtune.io.launcher import (
    LAUNCHER_KEYS,
    read_number,
    read_place_here,
    take_card,
    take_out_accelerate,
)
from llmtune.io.store_talk import LEAVE_SECONDS, StoreTalk

if TYPE_CHECKING:
    from torch import Tensor

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long the first processes wait for the last one to start."""
STEP_TIMEOUT = timedelta(hours=1)
"""How long a process waits in training for one that does not answer and has not ended."""
LEND_TIMEOUT = timedelta(days=14)
"""How long one that lends its part of a base waits for the first, which may ask an endpoint or a
judge for hours meanwhile; that the first one has ended it notices at once."""


class Processes(StoreTalk):
    """The processes of this run as one of them sees them; alone, every call is a local one."""

    # Through the store: no time limit, ended by the failure of any process

    def share(self, make: Callable[[], JsonObject]) -> JsonObject:
        """Return what `make` returns in the first process; the others wait for it."""
        if not self.are_many:
            return make()
        key = self._next_key("shared")
        if not self.is_first:
            shared: JsonObject = parse_json(self._wait(key))
            return shared
        value = make()
        self._put(key, value)
        return value

    @contextlib.contextmanager
    def ordering(self, order: Mapping[str, object]) -> Iterator[None]:
        """Have the others follow an order while the first does the same inside.

        Raises:
            ProcessLost: what ended the work here, or in one of the others; all of them end.
        """
        if not self.are_many:
            yield
            return
        self._put(self._next_key("order"), order)
        try:
            yield
        except ProcessLost:
            raise
        except LlmtuneError as error:
            # nobody may take it for the end of one run of many: the others wait in the middle of it
            raise ProcessLost(str(error), error.exit_code) from error

    def orders(self) -> Iterator[JsonObject]:
        """Yield the orders of the first process until it ends."""
        while True:
            order = parse_json(self._wait(self._next_key("order")))
            if not order:
                self._lines.rest()
                self._leave()
                return
            yield order

    def end(self) -> None:
        """Let the others end: there are no more orders."""
        if self.are_many and self.is_first:
            self._lines.rest()
            self._put(self._next_key("order"), {})
            self._see_off(LEAVE_SECONDS)

    # Connected: inside a training

    @contextlib.contextmanager
    def connected(self, device_type: str, timeout: timedelta = STEP_TIMEOUT) -> Iterator[None]:
        """Connect the processes inside; all of them enter and leave together.

        Inside of a connection this does nothing more. Each call waits at most `timeout`.
        """
        if not self.are_many:
            yield
            return
        import torch.distributed as dist

        if dist.is_initialized():
            yield
            return
        assert self._store is not None
        self._come_together()
        with self._heeding():
            dist.init_process_group(
                "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
                store=dist.PrefixStore(self._next_key("group"), self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
            )
        yield  # after an error the process ends; taking the group down could wait for the others
        with self._heeding():
            self.meet()
            dist.destroy_process_group()

    def _come_together(self) -> None:
        """Wait for the others, who may have much to do yet, and may be killed at it."""
        key = self._next_key("here")
        self._set(f"{key}/{self.rank}", "")
        for rank in range(self.world_size):
            self._wait(f"{key}/{rank}")

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of all processes' values, in float64."""
        if not self.are_many:
            return list(values)
        import torch
        import torch.distributed as dist

        summed = torch.tensor(values, dtype=torch.float64)
        with self._heeding():
            dist.all_reduce(summed)
        totals: list[float] = summed.tolist()
        return totals

    def meet(self) -> None:
        """Wait until all processes are here."""
        self.total([0.0])

    def largest(self, values: Sequence[int]) -> list[int]:
        """Return the largest of all processes' values, place by place."""
        if not self.are_many:
            return list(values)
        import torch
        import torch.distributed as dist

        found = torch.tensor(values, dtype=torch.int64)
        with self._heeding():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        largest: list[int] = found.tolist()
        return largest

    def add_up(self, tensor: "Tensor") -> None:
        """Replace a tensor by the sum of all processes' tensors, where it is."""
        if self.are_many:
            import torch.distributed as dist

            with self._heeding():
                dist.all_reduce(tensor)

    def copy_first(self, tensor: "Tensor") -> None:
        """Replace a tensor by that of the first process, where it is."""
        if self.are_many:
            import torch.distributed as dist

            with self._heeding():
                dist.broadcast(tensor, src=0)

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Make one clear failure of a connection that breaks off in a library's own calls."""
        return self._heeding("gloo")

    @contextlib.contextmanager
    def _heeding(self, mark: str = "") -> Iterator[None]:
        """Make one clear failure of a connection that broke off, or could not be made.

        `mark` is in the message of every error that is meant.
        """
        import torch.distributed as dist

        try:
            yield
        except dist.DistBackendError as error:
            raise self._lost(f"could not work together ({plain_reason(error)})") from error
        except RuntimeError as error:
            if mark not in str(error):
                raise
            raise self._lost() from error


ALONE = Processes()
_joined = ALONE


def joined_processes() -> Processes:
    """Return the processes of this run; only this one if `join_processes` found no others."""
    return _joined


def refuse_unjoined() -> None:
    """Refuse to work as one of several processes that nobody has joined.

    Raises:
        LlmtuneError: a launcher has started several, and they call from Python.
    """
    if read_number("WORLD_SIZE", 1) > 1:  # `join_processes` takes it out
        raise LlmtuneError(
            f"started as one of {os.environ['WORLD_SIZE']} processes, but a call from Python works "
            "in one: to train in several, start the command, as in `torchrun --nproc-per-node 2 -m "
            "llmtune run CONFIG`"
        )


def join_processes() -> Processes:
    """Meet the other processes that the launcher started, if it started several.

    Its variables are taken out of the environment then: no library and no child process may split
    the work once more. On a machine with GPUs each process sees the one of its number alone.

    Raises:
        LlmtuneError: the launcher's variables are not complete, ask for another engine, or there
            are fewer GPUs than processes.
    """
    global _joined  # a process joins once, like torch's own group
    world_size = read_number("WORLD_SIZE", 1)
    take_out_accelerate()
    if world_size <= 1:
        return _joined
    local_rank, num_here = read_place_here(world_size)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what a lost connection means we say
    take_card(local_rank, num_here)
    if num_here == world_size and sys.platform == "linux":
        # All are on this machine: its loopback needs no name and lets nobody else in.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, world_size = next(iter(rendezvous("env://", timeout=JOIN_TIMEOUT)))
        met = Processes(PrefixStore("llmtune", store), rank, world_size, num_here)
        met.link()
    except (RuntimeError, ValueError, OSError) as error:
        raise LlmtuneError(
            f"the {world_size} processes of this run could not meet at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {plain_reason(error)}"
        ) from error
    for key in list(os.environ):
        if key in LAUNCHER_KEYS or key.startswith("TORCHELASTIC_"):
            del os.environ[key]
    _joined = met
    return _joined
