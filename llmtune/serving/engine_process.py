"""An engine with a server of its own: started, waited for, checked, and ended with Ctrl-C."""

import contextlib
import json
import logging
import os
import secrets
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
from llmtune.serving.engine_requests import Follows
from llmtune.serving.listening import (
    ENGINE_HOST,
    ServeSettings,
    announce,
    bind_socket,
    read_api_key,
    require_packages,
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
    follows: Follows
    key_variable: str
    """The environment variable in which the engine reads its key."""
    environment: Mapping[str, str] = field(default_factory=dict)
    rounding: str | None = None
    """The numbers of a file that holds less than the model it was made of."""
    log_file: bool = True
    """Whether its messages go to a file, of which an error shows the end; else to stderr."""


def run_engine(plan: EnginePlan, known: Known, settings: ServeSettings) -> None:
    """Start the engine, compare a few answers, and pass requests on until Ctrl-C, which ends it.

    The engine listens on this machine alone, with a key of its own; who may ask, and what, is
    decided before a request is passed on.

    Raises:
        LlmtuneError: a package is missing, the address is taken, or the engine ended by itself.
    """
    if settings.max_waiting is not None:
        raise LlmtuneError(f"--max-waiting: {plan.engine} has a queue of its own; leave it out")
    require_packages()
    from llmtune.serving.http_api import HttpSettings
    from llmtune.serving.relay import RelayServer, Upstream

    key = read_api_key(settings)
    with (
        contextlib.closing(bind_socket(settings.host, settings.port)) as taken,
        _started(plan) as process,
        contextlib.suppress(KeyboardInterrupt),
    ):  # a server that was stopped did its job
        _wait_until_ready(process)

        def ask(question: KnownQuestion) -> str:
            return _ask(process, plan, question)

        asked = Asked(plan.names[0], plan.arm, rounding=plan.rounding)
        checked = check_answers(asked, known, settings.num_checked, ask)
        announce(settings, taken.getsockname()[1], plan.engine, plan.names, checked)
        upstream = Upstream(plan.engine, process.port, process.key, plan.names, plan.follows)
        http = HttpSettings(settings.host, key, settings.temperature)
        server = RelayServer(upstream, http, process.process)
        server.take_requests(taken)
        if not server.was_asked_to_stop:
            raise process.ended()


@dataclass(frozen=True)
class _Process:
    """The engine while it runs, the port that it listens on, and the key that it asks for."""

    engine: str
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    port: int
    key: str

    @property
    def url(self) -> str:
        """Where this process reaches it."""
        return f"http://{ENGINE_HOST}:{self.port}"

    def ended(self) -> LlmtuneError:
        """Return the error that it ended by itself."""
        self.process.wait()
        self.output.seek(0)
        printed = self.output.read().decode("utf-8", "replace")
        last = last_lines(printed, LAST_LINES) or "its messages are above"
        return LlmtuneError(
            f"{self.engine} ended by itself (exit {self.process.returncode}): {last}"
        )


@contextlib.contextmanager
def _started(plan: EnginePlan) -> Iterator[_Process]:
    with contextlib.closing(bind_socket(ENGINE_HOST, 0)) as free:
        port = free.getsockname()[1]  # the engine takes it itself
    key = secrets.token_urlsafe(32)
    environment = {**os.environ, **plan.environment, plan.key_variable: key}
    command = [part.replace("{port}", str(port)) for part in plan.command]
    log.info("serve: %s starts", plan.engine)
    with tempfile.TemporaryFile() as output:
        # A session of its own: Ctrl-C reaches us alone, and we end it. Its input ends with us.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output if plan.log_file else 2,
            stderr=output if plan.log_file else 2,
            env=environment,
            start_new_session=True,
        )
        try:
            yield _Process(plan.engine, process, output, port, key)
        finally:
            process.terminate()
            try:
                process.wait(GOODBYE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: _Process) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.process.poll() is not None:
            raise process.ended()
        with contextlib.suppress(OSError), _open(f"{process.url}/health", None, None):
            return
        time.sleep(POLL_SECONDS)
    raise LlmtuneError(f"{process.engine}: no answer within {START_SECONDS} s")


def _ask(process: _Process, plan: EnginePlan, question: KnownQuestion) -> str:
    body = {
        "model": plan.names[0],
        "messages": list(question.messages),
        "max_tokens": question.kept.max_tokens,
        "temperature": 0,
        "stop": list(question.kept.stops),
        **plan.follows.if_repeatable,
    }
    try:
        url = f"{process.url}/v1/chat/completions"
        with _open(url, process.key, json.dumps(body).encode()) as answer:
            found = parse_json(answer.read())
            return str(found["choices"][0]["message"]["content"] or "")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LlmtuneError(
            f"{process.engine}: the first question was not answered: {error}"
        ) from None


def _open(url: str, key: str | None, body: bytes | None) -> "IO[bytes]":
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    # straight to this machine, whatever proxy the environment names
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(url, body, headers), timeout=ASK_SECONDS)  # type: ignore[no-any-return]
