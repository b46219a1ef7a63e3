"""Trying whether something works on a loaded model: whatever a library raises there means no."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmtune.errors import LlmtuneError

LONGEST_MESSAGE = 160


class ProbeFailedError(Exception):
    """What was tried does not work on this model; the message says why in one line."""


@contextmanager
def probing() -> Iterator[None]:
    """Turn what is raised inside into `ProbeFailedError`.

    Memory that runs out says nothing about the model and is raised as it is, and so is what we
    have to tell the user.
    """
    try:
        yield
    except (ProbeFailedError, LlmtuneError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ProbeFailedError(describe_error(error)) from error


def describe_error(error: BaseException) -> str:
    """Return an error's kind and message in one line that is not long."""
    message = " ".join(str(error).split())
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]} ..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an allocation that failed, on a GPU or on the CPU, from other errors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error) or "out of memory" in str(error)
