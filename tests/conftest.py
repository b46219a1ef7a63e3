"""Every test runs without the network, and alike on every machine.

A connection to anywhere but this machine is an error. What a machine, a user's settings, or the
tests before this one would bring in is set here: the terminal's width, caches, the proxy, random
numbers, and which examples hypothesis draws.
"""

import atexit
import ipaddress
import json
import logging
import os
import random
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
for _name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "HF_ENDPOINT", "HF_TOKEN"):
    os.environ.pop(_name, None)
# A proxy of the machine knows no servers of the tests.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1,::1"
# The libraries' own cache, of every process its own: read when they are imported.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="llmtune-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# The same examples everywhere, however slow the machine; `--hypothesis-profile random` looks for
# others.
_slow: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("random", **_slow)
settings.register_profile("same", **_slow, derandomize=True, database=None)
settings.load_profile("same")

_connect = socket.socket.connect


def _connect_locally(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = str(address[0])
        is_local = host == "localhost" or _is_loopback(host)
        if not is_local:
            raise OSError(f"tests do not use the network: {host}")
    return _connect(self, address)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse connections for the whole session."""
    socket.socket.connect = _connect_locally
    yield
    socket.socket.connect = _connect


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Let no random number depend on which tests ran before; fixtures are made after this."""
    random.seed(0)
    for name in ("numpy.random", "torch"):
        if module := sys.modules.get(name):
            (module.manual_seed if name == "torch" else module.seed)(0)


@pytest.fixture(autouse=True, scope="session")
def shared_cache(tmp_path_factory):
    """Give fixtures that several tests share a cache that is not the user's."""
    os.environ["LLMTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_cache(shared_cache, tmp_path_factory, monkeypatch):
    """Give every test a cache directory of its own."""
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def own_log():
    """Undo what a command does to the package's logger: its handler writes to a closed stream.

    Before the test too, whose fixtures of a wider scope may have called a command already.
    """
    logger = logging.getLogger("llmtune")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSONL and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
