"""How much memory a device has and how fast it multiplies: asked of it, given, or by its name."""

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import psutil

from llmtune.errors import LlmtuneError
from llmtune.io.sizes import GIB

SIZES_GIB = (1, 2048)
"""What is believed to be the memory of a GPU, smallest and largest."""
MIG_LINE = re.compile(r"\s+MIG (?:\S*\.)?(\d+)gb\S*\s.*\(UUID: (MIG-[^)]+)\)")
"""A slice of a GPU as `nvidia-smi -L` lists it: its memory is a part of its profile's name."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*g(?:i?b)?", re.IGNORECASE)


@dataclass(frozen=True)
class Device:
    """Where a run would train."""

    name: str
    kind: str
    """cpu or cuda."""
    memory_bytes: int
    """What there is: of a GPU all of it, of this machine what is free now."""
    teraflops: float | None = None
    """Dense 16-bit peak by the maker's figures, 10^12 operations a second; None is not known."""


# Name -> memory in GiB as sold, dense bf16 tensor teraflops by the makers' data sheets.
KNOWN_GPUS = MappingProxyType(
    {
        "t4": (16, 65),
        "rtx3060": (12, 51),
        "rtx3090": (24, 71),
        "rtx4060ti": (16, 88),
        "rtx4090": (24, 165),
        "rtx5090": (32, 210),
        "l4": (24, 121),
        "a10g": (24, 70),
        "a6000": (48, 155),
        "l40s": (48, 362),
        "a100": (80, 312),
        "a100-40gb": (40, 312),
        "h100": (80, 989),
        "h200": (141, 989),
    }
)


def given_gpu(text: str) -> Device:
    """Return the GPU that `--gpu` means: a size such as 24GB, or a name such as rtx4090.

    Raises:
        LlmtuneError: it is neither.
    """
    known = KNOWN_GPUS.get(re.sub(r"[\s_]|nvidia|geforce", "", text.lower()))
    if known is not None:
        return Device(text, "cuda", known[0] * GIB, known[1])
    size = SIZE.fullmatch(text.strip())
    smallest, largest = SIZES_GIB
    if size is None or not smallest <= float(size.group(1)) <= largest:
        raise LlmtuneError(
            f"--gpu {text!r}: expected a size from {smallest}GB to {largest}GB such as 24GB, or "
            f"one of {', '.join(KNOWN_GPUS)}"
        )
    return Device(f"a GPU of {size.group(1)} GB", "cuda", int(float(size.group(1)) * GIB))


def find_device(wanted: str) -> Device:
    """Return the device that `model.device` means here; a GPU is asked through nvidia-smi.

    Raises:
        LlmtuneError: a GPU is named and none is found.
    """
    if wanted == "cpu":
        return this_cpu()
    gpus = _list_gpus()
    index = int(wanted.partition(":")[2] or 0)
    if index < len(gpus):
        return gpus[index]
    if wanted == "auto":
        return this_cpu()
    raise LlmtuneError(
        f"model.device={wanted}: no such GPU is found here. Plan for one with --gpu 24GB, or set "
        "model.device=auto"
    )


def _list_gpus() -> list[Device]:
    """Return the GPUs that CUDA programs see, in their order, with what is free on each.

    They are asked of nvidia-smi, which lists all of them; without it there are none.
    """
    query = "--query-gpu=uuid,memory.free,memory.total,name"
    found: dict[str, Device] = {}
    for line in _ask_nvidia(query, "--format=csv,noheader,nounits"):
        fields = line.split(", ", 3)
        if len(fields) == 4:  # without a GPU it says so in a sentence
            uuid, free, total, name = fields
            found[uuid] = Device(name, "cuda", _gpu_bytes(free, total))
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and "MIG-" in wanted:
        found |= _list_slices()
    return _visible(found, wanted)


def _ask_nvidia(*arguments: str) -> list[str]:
    try:
        answer = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.splitlines()


def _list_slices() -> dict[str, Device]:
    """Return the slices of GPUs (MIG) by uuid. What is free on them it does not say: all counts."""
    found = {}
    for match in filter(None, map(MIG_LINE.match, _ask_nvidia("-L"))):
        size, uuid = match.groups()
        found[uuid] = Device(f"a slice of {size} GB of a GPU", "cuda", int(size) * GIB)
    return found


def _gpu_bytes(free: str, total: str) -> int:
    """Return a GPU's memory from nvidia-smi's MiB; one that shares the machine's names none."""
    for number in (free, total):
        if number.isdigit():
            return int(number) << 20
    return this_cpu().memory_bytes


def _visible(gpus: dict[str, Device], wanted: str | None) -> list[Device]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, by number or uuid, up to the first wrong."""
    every = [gpu for uuid, gpu in gpus.items() if not uuid.startswith("MIG-")]
    if wanted is None:
        return every
    chosen = []
    for name in wanted.split(","):
        name = name.strip()
        is_uuid = name.startswith(("GPU-", "MIG-"))
        matching = [uuid for uuid in gpus if is_uuid and uuid.startswith(name)]
        if len(matching) == 1:
            chosen.append(gpus[matching[0]])
            if name.startswith("MIG-"):
                break  # CUDA shows one slice, the first
        elif name.isdigit() and int(name) < len(every):
            chosen.append(every[int(name)])
        else:
            break
    return chosen


def this_cpu() -> Device:
    """Return this machine's CPU with the memory that is free now, a container's limit included."""
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):  # no container, or none with a limit
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return Device("this machine's CPU", "cpu", free)


def free_device(name: str) -> Device:
    """Return the device that a model is about to be loaded on, with the memory that is free now.

    Args:
        name: cpu, or a GPU as torch names it (cuda:0).
    """
    if not name.startswith("cuda"):
        return this_cpu()
    import torch

    return Device(name, "cuda", torch.cuda.mem_get_info(name)[0])
