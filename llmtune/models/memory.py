"""Giving memory back between stages of one process."""

import ctypes
import ctypes.util
import gc

import torch

from llmtune.io.stopping import catch_interruption


def release_memory() -> None:
    """Return what earlier work freed: a trained model in cycles, the allocator's empty pages.

    glibc keeps the pages of many small freed blocks; after a short training of a 135M model that
    was half of the process. Other C libraries have no such call and are left alone.

    A Ctrl-C meanwhile is raised at the end: Python would raise it in the first finalizer that the
    collection calls, where exceptions are lost.
    """
    with catch_interruption() as interruption:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        name = ctypes.util.find_library("c")
        libc = ctypes.CDLL(name) if name else None
        if libc is not None and hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
    if interruption.signal_name:
        raise KeyboardInterrupt
