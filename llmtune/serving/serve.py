"""Start an OpenAI-compatible endpoint on what a target names, and check its answers first."""

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmtune.data.conversation import Conversation
from llmtune.errors import LlmtuneError
from llmtune.models.resolve import Loadable
from llmtune.serving.start_check import Asked, Known, KnownQuestion, StartCheck, check_answers

if TYPE_CHECKING:
    from llmtune.serving.live_models import LiveModels

log = logging.getLogger("llmtune")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PACKAGES = ("starlette", "uvicorn")


@dataclass(frozen=True)
class ServeSettings:
    """Where requests are taken, by whom they are answered, and how."""

    engine: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_env: str | None = None
    names: tuple[str, ...] = ()
    """Models that are served; empty is all."""
    temperature: float = 1.0
    """Of a request that names none."""
    max_waiting: int = 16
    num_checked: int = 3
    as_json: bool = False


@dataclass(frozen=True)
class Servable:
    """What is served: a target, what was exported from it, and where its report's answers are."""

    target: Loadable
    known: Known = field(default_factory=Known)
    exports: Mapping[str, Loadable] = field(default_factory=dict)
    """Checkpoints."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """GGUF files."""


def read_api_key(settings: ServeSettings) -> str | None:
    """Return the key that requests must carry, from the environment alone.

    Raises:
        LlmtuneError: the variable is not set.
    """
    if settings.api_key_env is None:
        if settings.host not in LOOPBACK:
            log.warning(
                "WARNING: --host %s without --api-key-env: whoever reaches this machine can use "
                "the model; set a key in an environment variable and name it",
                settings.host,
            )
        return None
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise LlmtuneError(
            f"--api-key-env {settings.api_key_env}: the environment variable is not set; it must "
            "hold the key"
        )
    return key


def serve_live(served: Servable, settings: ServeSettings) -> None:
    """Load the target with transformers and take requests until Ctrl-C.

    Raises:
        LlmtuneError: a package is missing, the address is taken, there is no such model, or it
            cannot be loaded.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LlmtuneError(
            f"serving needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install {' '.join(missing)}"
        )
    key = read_api_key(settings)
    from llmtune.serving.http_server import HttpSettings, Server, bind_socket
    from llmtune.serving.live_models import LiveModels, find_models

    models = LiveModels(find_models(served.target, served.exports, settings.names))
    taken = bind_socket(settings.host, settings.port)
    try:
        models.load()
        checked = _check_live(models, served, settings)
        http = HttpSettings(settings.host, key, settings.temperature, settings.max_waiting)
        server = Server(models, http)
        announce(settings, taken.getsockname()[1], "transformers", models.names, checked)
        server.take_requests(taken)
    finally:
        taken.close()


def _check_live(models: "LiveModels", served: Servable, settings: ServeSettings) -> StartCheck:
    from llmtune.serving.live_models import Said
    from llmtune.serving.openai_api import AnswerRequest

    first = models.find(None)
    identity = models.load().identity_as("base" if first.arm == "base" else None).as_dict()

    def ask(question: KnownQuestion) -> str:
        request = AnswerRequest(
            first.name,
            Conversation("chat", [dict(message) for message in question.messages]),
            max_tokens=question.kept.max_tokens,
            temperature=0.0,
            stop=question.kept.stops,
        )
        return "".join(part.text for part in models.answer(request) if isinstance(part, Said))

    known = served.known if first.target is served.target else Known()
    return check_answers(Asked(first.name, first.arm, identity), known, settings.num_checked, ask)


def announce(
    settings: ServeSettings,
    port: int,
    engine: str,
    names: tuple[str, ...],
    checked: StartCheck,
) -> None:
    """Say where requests are taken, on stdout, once they are."""
    checked.say()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}/v1"
    if settings.as_json:
        facts = {"url": url, "engine": engine, "models": names, "check": checked.to_json()}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{url} answers as {', '.join(names)} ({engine}); Ctrl-C ends it")
