"""What the oldest supported transformers does in another way, for the tests that see it."""

import importlib.metadata

import pytest

TRANSFORMERS = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2]))
IS_CURRENT = TRANSFORMERS >= (5, 23)
"""Tried are 5.17 and 5.23; what lies between counts as old."""

without_torch = pytest.mark.skipif(
    not IS_CURRENT, reason="transformers 5.17 imports torch with its tokenizers"
)
