"""Tiny checkpoints of every family, made once for this room."""

from pathlib import Path

import pytest

from tests.tiny import make_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a function giving the directory of a tiny checkpoint of a family; do not change it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(family: str = "llama") -> Path:
        directory = root / family
        if not directory.exists():
            make_model(family, directory)
        return directory

    return make
