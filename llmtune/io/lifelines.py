"""Connections that break when the process at their other end is killed.

While the processes of a run compute together, gloo notices; these are for long work of each alone.
"""

import contextlib
import hmac
import secrets
import socket
import time
from collections.abc import Callable

TOKEN_BYTES = 16
OPEN_SECONDS = 600.0
"""How long the first process waits for the others' connections, and they for its address."""


class Lifelines:
    """One connection between the first process and each of the others; nothing is sent."""

    def __init__(self) -> None:
        self._lines: list[socket.socket] = []

    def accept(self, count: int, publish: Callable[[dict[str, object]], None], host: str) -> None:
        """Wait for so many others, and tell them where by `publish`.

        Raises:
            OSError: they did not come, or there is no such host here.
        """
        token = secrets.token_hex(TOKEN_BYTES)
        until = time.monotonic() + OPEN_SECONDS
        with socket.create_server((host, 0)) as server:
            publish({"host": host, "port": server.getsockname()[1], "token": token})
            while len(self._lines) < count:
                server.settimeout(max(until - time.monotonic(), 0.01))
                line, _ = server.accept()
                line.settimeout(max(until - time.monotonic(), 0.01))
                if hmac.compare_digest(_read(line, len(token)), token.encode()):
                    self._lines.append(line)
                else:
                    line.close()

    def connect(self, host: str, port: int, token: str) -> None:
        """Hold on to the first process.

        Raises:
            OSError: it cannot be reached.
        """
        line = socket.create_connection((host, port), timeout=OPEN_SECONDS)
        line.sendall(token.encode())
        self._lines.append(line)

    @property
    def is_cut(self) -> bool:
        """Whether a process at the other end of a line has ended."""
        return any(map(_is_at_end, self._lines))

    def close(self) -> None:
        """Let go."""
        while self._lines:
            self._lines.pop().close()


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
