"""Connections that break when the process at their other end is killed.

While the processes of a run compute together, gloo notices; these are for work of each alone, and
for those that wait for one.
"""

import contextlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence

TOKEN_BYTES = 16
OPEN_SECONDS = 600.0
"""How long the first process waits for the others' connections, and they for its address."""
CONNECT_SECONDS = 60.0
"""How long each of the first process's names is tried."""
TOKEN_SECONDS = 10.0
"""How long whoever connects may take to say who it is."""

WATCH_SECONDS = 0.5
NOTICED_SECONDS = 4.0
"""How long the work of a process may go on that has lost another one."""

KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
"""Seconds of silence before a machine is asked whether it is there, between asking, how often."""


class Lifelines:
    """One connection between the first process and each of the others; nothing is sent."""

    def __init__(self) -> None:
        self._lines: list[socket.socket] = []
        self._is_watching = False

    def accept(
        self,
        count: int,
        publish: Callable[[dict[str, object]], None],
        bound: str,
        hosts: Sequence[str],
    ) -> None:
        """Wait for so many others, and tell them where by `publish`.

        Args:
            count: how many.
            publish: takes what `connect` needs.
            bound: the address of this machine to listen on; empty is all of them.
            hosts: what this machine may be called by the others.

        Raises:
            OSError: they did not come, or there is no such address here.
        """
        token = secrets.token_hex(TOKEN_BYTES)
        until = time.monotonic() + OPEN_SECONDS
        with socket.create_server((bound, 0)) as server:
            publish({"hosts": list(hosts), "port": server.getsockname()[1], "token": token})
            while len(self._lines) < count:
                server.settimeout(max(until - time.monotonic(), 0.01))
                line, _ = server.accept()
                line.settimeout(TOKEN_SECONDS)
                if hmac.compare_digest(_read(line, len(token)), token.encode()):
                    _keep_alive(line)
                    self._lines.append(line)
                else:
                    line.close()

    def connect(self, hosts: Sequence[str], port: int, token: str) -> None:
        """Hold on to the first process, by the first of its names that leads to it.

        Raises:
            OSError: it cannot be reached.
        """
        failed = OSError("the first process has no name")
        for host in hosts:
            try:
                line = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
                line.sendall(token.encode())
            except OSError as error:
                failed = OSError(f"{host}:{port}: {error}")
            else:
                _keep_alive(line)
                self._lines.append(line)
                return
        raise failed

    @property
    def is_cut(self) -> bool:
        """Whether a process at the other end of a line has ended."""
        return any(map(_is_at_end, self._lines))

    @property
    def num_cut(self) -> int:
        """How many of those at the other ends have ended."""
        return sum(map(_is_at_end, self._lines))

    def watch(self, end: Callable[[], None]) -> None:
        """Call `end` some seconds after a line was cut if nobody has noticed it until then."""
        self._is_watching = True
        threading.Thread(target=self._watch, args=(end,), daemon=True).start()

    def rest(self) -> None:
        """Watch no more: from here on the others may end."""
        self._is_watching = False

    def _watch(self, end: Callable[[], None]) -> None:
        cut_for = 0.0
        while self._is_watching and cut_for < NOTICED_SECONDS:
            time.sleep(WATCH_SECONDS)
            cut_for = cut_for + WATCH_SECONDS if self.is_cut else 0.0
        if self._is_watching:
            end()


def _keep_alive(line: socket.socket) -> None:
    """Let the line break, too, when the other machine is gone without a word."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # elsewhere than on Linux, what the system does
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _is_at_end(line: socket.socket) -> bool:
    line.setblocking(False)
    try:
        return not line.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _read(line: socket.socket, count: int) -> bytes:
    found = b""
    with contextlib.suppress(OSError):
        while len(found) < count and (more := line.recv(count - len(found))):
            found += more
    return found
