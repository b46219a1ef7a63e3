"""Every test runs without the network: a connection to anywhere but this machine is an error."""

import ipaddress
import json
import logging
import os
import socket
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

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


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
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
