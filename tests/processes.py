"""Several processes of one run, as a launcher starts them, without importing everything again.

They are forked from the test's own process and meet on the loopback.
"""

import faulthandler
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BeforeStep = Callable[[int, int], None]

SECONDS = 120
"""A process that takes longer has hung; where, its output says."""


class Started:
    """Processes that run now; their output is in `out-0.txt`, `out-1.txt`, ..."""

    def __init__(self, directory: Path, world_size: int, work: Callable[[], int]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        port = free_port()
        self.pids = [
            fork(directory / f"out-{rank}.txt", work, _launcher_keys(rank, world_size, port))
            for rank in range(world_size)
        ]

    def output(self, rank: int) -> str:
        return (self.directory / f"out-{rank}.txt").read_text()

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Return the exit codes; -9 of one that was killed, here after so many seconds."""
        return wait_for(self.pids, seconds)


def wait_for(pids: list[int], seconds: float = SECONDS) -> list[int]:
    """Return the exit codes of processes; -9 of one that was killed, here after so many seconds."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
            until += SECONDS
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def run_command(
    directory: Path, world_size: int, arguments: list[str], *, before_step: BeforeStep | None = None
) -> Started:
    """Start `llmtune` in so many processes.

    `before_step` is called in each with its rank and the steps that are done.
    """
    from llmtune import cli
    from llmtune.training.step import TrainingStep

    def work() -> int:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        rank, run = int(os.environ["RANK"]), TrainingStep.run

        def run_after(self: Any, inputs: Any, steps_done: int, *rest: Any, **options: Any) -> Any:
            if before_step is not None:
                before_step(rank, steps_done)
            return run(self, inputs, steps_done, *rest, **options)

        TrainingStep.run = run_after
        return cli.run_command(arguments)

    return Started(directory, world_size, work)


def call_in_processes(directory: Path, world_size: int, call: Callable[[Any], Any]) -> list[Any]:
    """Return what `call` returns in each of so many joined processes."""
    from llmtune.io.processes import join_processes

    def work() -> int:
        processes = join_processes()
        result = call(processes)
        (directory / f"result-{processes.rank}.pkl").write_bytes(pickle.dumps(result))
        return 0

    started = Started(directory, world_size, work)
    codes = started.wait()
    assert codes == [0] * world_size, "\n".join(map(started.output, range(world_size)))
    return [
        pickle.loads((directory / f"result-{rank}.pkl").read_bytes()) for rank in range(world_size)
    ]


def _launcher_keys(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def fork(output: Path, work: Callable[[], int], keys: dict[str, str]) -> int:
    """Return the number of a process that does the work with these variables set."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        torch.set_num_threads(1)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        # the threads that tokenizers share the work among are not there after a fork
        os.environ.update(keys | {"TOKENIZERS_PARALLELISM": "false"})
        faulthandler.dump_traceback_later(SECONDS - 5, exit=False)
        code = work()
    except BaseException:  # noqa: BLE001 (nothing may get back into the test's own code)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
