"""Giving memory back between stages of one process: see `models.memory`."""

from llmtune.models.memory import release_memory

__all__ = ["release_memory"]
