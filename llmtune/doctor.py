"""What this machine can and cannot do, and how to mend what is broken."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from llmtune.environment import machine, package_version
from llmtune.models.gguf import cache_dir

GIB = 1 << 30
LOW_DISK_BYTES = 10 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing looked at: fine, worth knowing, or broken, and then what to do."""

    subject: str
    state: Literal["ok", "note", "broken"]
    found: str
    fix: str | None = None


def examine() -> list[Finding]:
    """Look at Python, packages, processor, GPU, quantization, memory and disk."""
    return [
        _python(),
        *_packages(),
        _processor(),
        *_torch(),
        _memory(),
        _disk("disk of the current directory", Path.cwd()),
        _disk("disk of the cache", cache_dir()),
        _cache_writable(),
    ]


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    required = importlib.metadata.requires("llmtune") or []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = package_version(requirement.name)
        install = f'python -m pip install "{requirement}"'
        if found is None:
            yield Finding(requirement.name, "broken", "not installed", install)
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding(
                requirement.name, "broken", f"{found}, needs {requirement.specifier}", install
            )
        else:
            yield Finding(requirement.name, "ok", found)


def _processor() -> Finding:
    about = machine()
    return Finding("processor", "ok", f"{about['processor']}, {about['cores']} usable cores")


def _torch() -> Iterator[Finding]:
    if package_version("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        build = "built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
        yield Finding(
            "GPU",
            "note",
            f"none in use: torch {torch.__version__} {build}; everything runs on the CPU, slowly",
            "with an NVIDIA GPU: install its driver and a CUDA build of torch",
        )
        yield Finding("precision", "ok", "bfloat16 on the CPU")
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            f"GPU {index}", "ok", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        has_bf16 = torch.cuda.get_device_capability(index)[0] >= 8
        yield Finding(
            f"GPU {index} precision",
            "ok" if has_bf16 else "note",
            "bfloat16" if has_bf16 else "no bfloat16: float16 is used",
        )
    yield _quantization()


def _quantization() -> Finding:
    from llmtune.models.trial import try_quantization

    problem = try_quantization()
    if problem is None:
        return Finding("4-bit quantization", "ok", "bitsandbytes quantizes and multiplies here")
    return Finding(
        "4-bit quantization",
        "broken",
        problem,
        "set model.quantization=null, or reinstall bitsandbytes for this machine",
    )


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding(
        "memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    )


def _disk(subject: str, path: Path) -> Finding:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    found = f"{free / GIB:.1f} GiB free at {path}"
    if free < LOW_DISK_BYTES:
        return Finding(subject, "note", found, "a merged 8B model alone takes 16 GiB")
    return Finding(subject, "ok", found)


def _cache_writable() -> Finding:
    path = cache_dir()
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if os.access(nearest, os.W_OK):
        return Finding("cache", "ok", str(path))
    return Finding("cache", "broken", f"{path} cannot be written", "set LLMTUNE_CACHE")
