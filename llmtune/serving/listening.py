"""Where a server listens and who may ask it: settings, address, key, and what the user is told."""

import importlib.util
import json
import logging
import os
import socket
from dataclasses import dataclass

import click

from llmtune.errors import LlmtuneError
from llmtune.evaluation.endpoint import LOOPBACK
from llmtune.serving.start_check import StartCheck

log = logging.getLogger("llmtune")

ENGINE_HOST = "127.0.0.1"
"""Where an engine with a server of its own listens."""
PACKAGES = ("starlette", "uvicorn")
MAX_WAITING = 16
"""Requests that may wait if nothing is said."""


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
    max_waiting: int | None = None
    num_checked: int = 3
    as_json: bool = False


def require_packages() -> None:
    """Check that what takes requests is installed.

    Raises:
        LlmtuneError: it is not.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LlmtuneError(
            f"serving needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install {' '.join(missing)}"
        )


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


def bind_socket(host: str, port: int) -> socket.socket:
    """Take the address, so that no model is loaded for one that is taken.

    Raises:
        LlmtuneError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen()  # two sockets may be bound to one port until one of them listens
    except (OSError, OverflowError) as error:
        taken.close()
        reason = getattr(error, "strerror", None) or error
        raise LlmtuneError(
            f"--host {host} --port {port}: cannot be listened on: {reason}; choose a different "
            "one (--port 0 takes any that is free)"
        ) from None
    return taken


def address_url(host: str, port: int) -> str:
    """Return an address as a URL, an IPv6 one in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(
    settings: ServeSettings,
    port: int,
    engine: str,
    names: tuple[str, ...],
    checked: StartCheck,
) -> None:
    """Say where requests are taken, on stdout, once they are."""
    checked.say()
    url = f"{address_url(settings.host, port)}/v1"
    if settings.as_json:
        facts = {"url": url, "engine": engine, "models": names, "check": checked.to_json()}
        click.echo(json.dumps(facts))
    else:
        click.echo(f"{url} answers as {', '.join(names)} ({engine}); Ctrl-C ends it")
