"""What the processes of a run tell each other through the launcher's key-value store.

Nothing here has a time limit of its own: whoever waits is ended by the failure of any process, by a
message in the store if there was time for one, else by the connection that breaks.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llmtune.errors import ProcessLost
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import parse_json
from llmtune.io.lifelines import Lifelines

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 0.05
FAILURE_SECONDS = 3.0
"""How long a process that lost another one waits for that one's message."""
LEAVE_SECONDS = 60.0
"""How long the first process waits at its end for the others to notice."""
STORE_SECONDS = 1.0
"""How long the store may take to answer a process that ends: its machine may be gone."""
PIECE = 2**20
"""Characters of a message in one value of the store, which takes up to 8 MB."""


class StoreTalk:
    """The store as one process sees it; None if this one is alone.

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
        with _ending_after(FAILURE_SECONDS + STORE_SECONDS, self._lost_silently()):
            lost = self._lost()
        _end(lost)

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
            with _ending_after(FAILURE_SECONDS + STORE_SECONDS, ProcessLost(message, code)):
                text = self._store.compare_set("failure", "", json.dumps(mine))
                if self.is_first:
                    self._see_off(FAILURE_SECONDS)
                else:
                    self._leave()
        except RuntimeError:  # the store has ended with the process that kept it
            return message, code
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
        Those whose line is cut have ended, whether or not they could say so.
        """
        import torch.distributed as dist

        assert self._store is not None
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()
        until, others = time.monotonic() + seconds, self.world_size - 1
        with contextlib.suppress(RuntimeError):  # the store has ended: there is nobody to wait for
            while time.monotonic() < until and self._lines.num_cut < others:
                if self._store.add("left", 0) >= others:
                    break
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
        return self._lost_silently(reason)

    def _lost_silently(self, reason: str | None = None) -> ProcessLost:
        found = f"the {self.world_size} processes of this run {reason}"
        if reason is None:
            found = (
                f"one of the {self.world_size} processes of this run ended without a message "
                "(killed, or out of memory?), so the others end"
            )
        return ProcessLost(f"{found}; the same command continues from what is saved")


@contextlib.contextmanager
def _ending_after(seconds: float, lost: ProcessLost) -> Iterator[None]:
    """End this process if what is inside takes longer: the machine of the store may be gone."""
    timer = threading.Timer(seconds, _end, [lost])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(lost: ProcessLost) -> None:
    sys.stderr.write(f"error: {lost}\n")
    sys.stderr.flush()
    os._exit(lost.exit_code)
