"""What machine and which versions a run was made with; asked without importing the libraries."""

import importlib.metadata
import os
import platform
import resource
import sys
from functools import cache
from pathlib import Path

import psutil

from llmtune.version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
    "accelerate",
)


@cache
def package_version(name: str) -> str | None:
    """Return an installed distribution's version, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return llmtune's, Python's and the main libraries' versions."""
    found = {"llmtune": __version__, "python": platform.python_version()}
    return found | {name: package_version(name) for name in PACKAGES}


def machine() -> dict[str, str | int | None]:
    """Return the machine in a few words: system, processor, usable cores, bytes of memory."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def processor_name() -> str:
    """Return the processor as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
