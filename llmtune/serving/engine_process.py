"""An engine with a server of its own: started, waited for, checked, and ended with Ctrl-C."""

import contextlib
import json
import logging
import os
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import parse_json
from llmtune.io.stopping import last_lines
from llmtune.serving.listening import (
    ServeSettings,
    address_url,
    announce,
    bind_socket,
    read_api_key,
)
from llmtune.serving.start_check import Asked, Known, KnownQuestion, check_answers

log = logging.getLogger("llmtune")

START_SECONDS = 1800
POLL_SECONDS = 0.2
ASK_SECONDS = 600
GOODBYE_SECONDS = 10
LAST_LINES = 6


@dataclass(frozen=True)
class EnginePlan:
    """One engine's process: what is started, and what answers there by which name."""

    engine: str
    command: Sequence[str]
    """`{port}` is replaced by the port that it listens on."""
    names: tuple[str, ...]
    arm: str
    """Whose results the answers of the first name are compared with."""
    key_variable: str
    """The environment variable in which the engine reads its key."""
    environment: Mapping[str, str] = field(default_factory=dict)
    log_file: bool = True
    """Whether its messages go to a file, of which an error shows the end; else to stderr."""


def run_engine(plan: EnginePlan, known: Known, settings: ServeSettings) -> None:
    """Start the engine, compare a few answers, and wait for Ctrl-C, which ends it.

    Raises:
        LlmtuneError: the address is taken, or the engine ended by itself.
    """
    if settings.max_waiting is not None:
        raise LlmtuneError(f"--max-waiting: {plan.engine} has a queue of its own; leave it out")
    key = read_api_key(settings)
    taken = bind_socket(settings.host, settings.port)
    port = taken.getsockname()[1]
    taken.close()  # the engine takes it itself
    environment = {**os.environ, **plan.environment}
    environment.pop(plan.key_variable, None)
    if key is not None:
        environment[plan.key_variable] = key
    with _started(plan, port, environment) as process:
        url = _local_url(settings.host, port)
        with contextlib.suppress(KeyboardInterrupt):  # a server that was stopped did its job
            _wait_until_ready(process, url)

            def ask(question: KnownQuestion) -> str:
                return _ask(url, key, plan.names[0], question)

            asked = Asked(plan.names[0], plan.arm)
            checked = check_answers(asked, known, settings.num_checked, ask)
            announce(settings, port, plan.engine, plan.names, checked)
            process.process.wait()
            raise process.ended()


class _Process:
    """The engine while it runs."""

    def __init__(self, plan: EnginePlan, process: "subprocess.Popen[bytes]", output: IO[bytes]):
        self.process = process
        self._plan, self._output = plan, output

    def ended(self) -> LlmtuneError:
        """Return the error that it ended by itself."""
        self._output.seek(0)
        printed = self._output.read().decode("utf-8", "replace")
        last = last_lines(printed, LAST_LINES) or "its messages are above"
        return LlmtuneError(
            f"{self._plan.engine} ended by itself (exit {self.process.returncode}): {last}"
        )


@contextlib.contextmanager
def _started(plan: EnginePlan, port: int, environment: Mapping[str, str]) -> Iterator[_Process]:
    command = [part.replace("{port}", str(port)) for part in plan.command]
    log.info("serve: %s starts", plan.engine)
    with tempfile.TemporaryFile() as output:
        # A session of its own: Ctrl-C reaches us alone, and we end it. Its input ends with us.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output if plan.log_file else 2,
            stderr=output if plan.log_file else 2,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            yield _Process(plan, process, output)
        finally:
            process.terminate()
            try:
                process.wait(GOODBYE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: _Process, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.process.poll() is not None:
            raise process.ended()
        with contextlib.suppress(OSError), _open(f"{url}/health", None, None):
            return
        time.sleep(POLL_SECONDS)
    raise LlmtuneError(f"{url}: no answer within {START_SECONDS} s")


def _ask(url: str, key: str | None, name: str, question: KnownQuestion) -> str:
    body = {
        "model": name,
        "messages": list(question.messages),
        "max_tokens": question.kept.max_tokens,
        "temperature": 0,
        "stop": list(question.kept.stops),
    }
    try:
        with _open(f"{url}/v1/chat/completions", key, json.dumps(body).encode()) as answer:
            found = parse_json(answer.read())
            return str(found["choices"][0]["message"]["content"] or "")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LlmtuneError(f"{url}: the first question was not answered: {error}") from None


def _open(url: str, key: str | None, body: bytes | None) -> "IO[bytes]":
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    # straight to this machine, whatever proxy the environment names
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, body, headers), timeout=ASK_SECONDS)  # type: ignore[no-any-return]


def _local_url(host: str, port: int) -> str:
    """Return where this machine itself reaches the address."""
    return address_url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)
