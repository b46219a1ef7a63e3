"""The processes that a launcher (torchrun, accelerate launch, srun) started together for one run.

The first one runs the command. The others wait for its orders, do their share of each training, and
end with it. Outside of a training they talk through the launcher's key-value store, which has no
time limit; inside they are connected by gloo (numbers, decisions) and on GPUs by NCCL (gradients).
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import time
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
from llmtune.io.lifelines import Lifelines

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long the first processes wait for the last one to start."""
STEP_TIMEOUT = timedelta(hours=1)
"""How long a process waits in training for one that does not answer and has not ended."""
POLL_SECONDS = 0.05
FAILURE_SECONDS = 3.0
"""How long a process that lost another one waits for that one's message."""
LEAVE_SECONDS = 60.0
"""How long the first process waits at its end for the others to notice."""
PIECE = 2**20
"""Characters of a message in one value of the store, which takes up to 8 MB."""


class Processes:
    """The processes of this run as one of them sees them; alone, every call is a plain local one.

    `rank` counts from 0 over all machines, `num_here` are those on this machine.
    """

    def __init__(
        self, store: "Store | None" = None, rank: int = 0, world_size: int = 1, num_here: int = 1
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.num_here = num_here
        self._store = store
        self._host = socket.gethostname()
        self._numbers: dict[str, Iterator[int]] = {}
        self._lines = Lifelines()

    @property
    def is_first(self) -> bool:
        """Whether this one runs the command, and writes what it leaves."""
        return self.rank == 0

    @property
    def are_many(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

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

    def send(self, to: int, value: Mapping[str, object]) -> None:
        """Leave a message for one of the others."""
        key, text = self._next_key(f"mail/{self.rank}-{to}"), json.dumps(value)
        pieces = range(0, len(text), PIECE)
        for number, start in enumerate(pieces):
            self._set(f"{key}/{number}", text[start : start + PIECE])
        self._put(key, {"pieces": len(pieces)})

    def receive(self, sender: int) -> JsonObject:
        """Return the next message of one of the others; this waits without a limit."""
        assert self._store is not None
        key = self._next_key(f"mail/{sender}-{self.rank}")
        count = parse_json(self._wait(key))["pieces"]
        pieces = [self._wait(f"{key}/{number}") for number in range(count)]
        for number in range(count):
            self._store.delete_key(f"{key}/{number}")
        message: JsonObject = parse_json(b"".join(pieces))
        return message

    def link(self) -> None:
        """Hold on to the first process, or the first one to all others, until this one ends.

        Raises:
            OSError: they cannot reach each other.
        """
        if self.is_first:
            if self.num_here == self.world_size:
                bound, hosts = "127.0.0.1", ["127.0.0.1"]
            else:  # what this machine calls itself may mean nothing to the others
                bound, hosts = "", [os.environ["MASTER_ADDR"], socket.getfqdn()]
            self._lines.accept(
                self.world_size - 1, lambda address: self._put("lines", address), bound, hosts
            )
        else:
            self._lines.connect(**parse_json(self._wait("lines")))
        self._lines.watch(self._end_at_once)

    def _end_at_once(self) -> None:
        """End this process in the middle of work of its own: another one has ended."""
        lost = self._lost()
        sys.stderr.write(f"error: {lost}\n")
        sys.stderr.flush()
        os._exit(lost.exit_code)

    def heed(self) -> None:
        """Look whether all are still there, in the middle of long work of this process alone.

        Raises:
            ProcessLost: one of the others has failed, or ended.
        """
        assert self._store is not None
        try:
            if self._lines.is_cut or self._store.check(["failure"]):
                raise self._lost()
        except RuntimeError as error:
            raise self._lost() from error

    def report_failure(self, message: str, code: int) -> tuple[str | None, int]:
        """Tell the others why this process ends.

        Returns:
            What this process is to print, and its exit code. Only the failure that came first is
            printed, by the process it came to, and by the first one if that is on its own machine.
        """
        if self._store is None:
            return message, code
        self._lines.rest()
        mine = {"rank": self.rank, "host": self._host, "message": message, "code": code}
        try:
            text = self._store.compare_set("failure", "", json.dumps(mine))
        except RuntimeError:  # the store has ended with the process that kept it
            return message, code
        if self.is_first:
            self._see_off(FAILURE_SECONDS)
        else:
            self._leave()
        failure = parse_json(text)
        here = "" if self.is_first else f"process {self.rank} of {self.world_size}: "
        if failure["rank"] == self.rank:
            return here + message, code
        if self.is_first and failure["host"] != self._host:
            return f"process {failure['rank']} on {failure['host']}: {failure['message']}", int(
                failure["code"]
            )
        return None, int(failure["code"])

    def _leave(self) -> None:
        with contextlib.suppress(RuntimeError):  # the first process did not wait so long
            assert self._store is not None
            self._store.add("left", 1)

    def _see_off(self, seconds: float) -> None:
        """Keep the store up until the others know how it ended: it may be this process's own.

        They may be waiting for this one in the middle of a step: gloo tells them that it is gone.
        """
        import torch.distributed as dist

        assert self._store is not None
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the store has ended: there is nobody to wait for
            while time.monotonic() < until and self._store.add("left", 0) < self.world_size - 1:
                time.sleep(POLL_SECONDS)

    def _next_key(self, kind: str) -> str:
        return f"{kind}/{next(self._numbers.setdefault(kind, itertools.count()))}"

    def _put(self, key: str, value: Mapping[str, object]) -> None:
        self._set(key, json.dumps(value))

    def _set(self, key: str, text: str) -> None:
        assert self._store is not None
        try:
            self._store.set(key, text)
        except RuntimeError as error:
            raise self._lost() from error

    def _wait(self, key: str) -> bytes:
        assert self._store is not None
        try:
            while not self._store.check([key]):
                self.heed()
                time.sleep(POLL_SECONDS)
            value: bytes = self._store.get(key)
            return value
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self, reason: str | None = None) -> ProcessLost:
        """Return the failure that another process reported; if none did, the reason given."""
        assert self._store is not None
        try:
            waited = time.monotonic() + FAILURE_SECONDS
            while time.monotonic() < waited:
                if self._store.check(["failure"]):
                    failure = parse_json(self._store.get("failure"))
                    return ProcessLost(failure["message"], int(failure["code"]))
                time.sleep(POLL_SECONDS)
        except RuntimeError:
            pass  # the store has ended with the process that kept it
        found = f"the {self.world_size} processes of this run {reason}"
        if reason is None:
            found = (
                f"one of the {self.world_size} processes of this run ended without a message "
                "(killed, or out of memory?), so the others end"
            )
        return ProcessLost(f"{found}; the same command continues from what is saved")

    # Connected: inside a training

    @contextlib.contextmanager
    def connected(self, device_type: str) -> Iterator[None]:
        """Connect the processes inside; all of them enter and leave together.

        Inside of a connection this does nothing more.
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
                timeout=STEP_TIMEOUT,
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
