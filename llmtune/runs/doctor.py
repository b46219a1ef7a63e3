"""What this machine can and cannot do, and how to mend what is broken."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import psutil
from packaging.requirements import Requirement

from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir
from llmtune.io.environment import machine, package_version
from llmtune.io.native_libraries import threads_sleep
from llmtune.io.sizes import GIB, format_in
from llmtune.models.config import DtypeName

if TYPE_CHECKING:
    from llmtune.checks.fast_paths import PathResult

LOW_DISK_BYTES = 10 * GIB
TCMALLOC_NAMES = ("libtcmalloc_minimal.so*", "libtcmalloc.so*")
LIBRARY_DIRS = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/lib64")
TCMALLOC_GAIN = (
    "training on two CPU cores was 1.2 times as fast with it, in a quarter less memory (measured "
    "once, on a prototype)"
)
BUSY_RATIO = 0.25


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
        check_threads(psutil.cpu_percent(interval=0.3) / 100, os.environ),
        check_allocator(Path("/proc/self/maps"), library_dirs(os.environ)),
        *_torch(),
        _memory(),
        _disk("disk of the current directory", Path.cwd()),
        _disk("disk of the cache", cache_dir()),
        _cache_writable(),
    ]


def try_machine(say: Callable[[str], None]) -> list[Finding]:
    """Try every fast path against the plain one in every precision of this machine.

    What is wrong or slow is kept in the cache directory, and later runs leave it out.

    Args:
        say: takes what is tried next.

    Raises:
        LlmtuneError: the cache directory cannot be written.
    """
    from llmtune.checks.fast_paths import PathResult, list_switched_off, try_fast_paths
    from llmtune.models.fast_paths import keep_record
    from llmtune.models.hardware import choose_device, choose_dtype, device_name
    from llmtune.models.quantization.bnb import try_quantization

    device = choose_device("auto")
    own = str(choose_dtype("auto", device, "")).removeprefix("torch.")
    dtypes: list[DtypeName] = ["float32"]
    dtypes += [name for name in get_args(DtypeName) if name == own != "float32"]
    results: list[PathResult] = []
    with tempfile.TemporaryDirectory(prefix="llmtune-doctor-") as name:
        for result in try_fast_paths(
            Path(name), dtypes, with_quantized=try_quantization(device) is None
        ):
            say(f"{result.setting}: {result.path} {result.state}")
            results.append(result)
    off = list_switched_off(results)
    try:
        kept = keep_record(device_name(device), off, [asdict(result) for result in results])
    except OSError as error:
        raise LlmtuneError(
            f"what was found cannot be kept in {cache_dir()}: {error.strerror}; set LLMTUNE_CACHE "
            "to a directory that can be written"
        ) from error
    return [*map(_path_finding, results), Finding("test of this machine", "ok", f"kept in {kept}")]


def _path_finding(result: "PathResult") -> Finding:
    """Say what became of a path; a wrong one is a fault even though it is left out from now on."""
    subject = f"{result.path} ({result.setting})"
    if result.state in ("used", "not used"):
        return Finding(subject, "ok", f"{result.state}: {result.reason}")
    found = f"{result.state}: {result.reason}"
    if result.state == "broken":
        return Finding(subject, "broken", found, "nothing can be switched off: report it")
    fix = "switched off on this machine in this precision; please report it with the file below"
    return Finding(subject, "note" if result.state == "slow" else "broken", found, fix)


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


def check_threads(busy_ratio: float, environ: Mapping[str, str]) -> Finding:
    """Say whether other processes and waiting OpenMP threads would take each other's cores.

    `busy_ratio` is the share of all cores that is in use now, 0 to 1.
    """
    threads = environ.get("OMP_NUM_THREADS", "one a core")
    found = f"{threads}; {busy_ratio:.0%} of the cores are busy now"
    if busy_ratio < BUSY_RATIO or threads_sleep(environ):
        return Finding("OpenMP threads", "ok", found)
    return Finding(
        "OpenMP threads",
        "note",
        f"{found}: threads that wait for each other spin, and would take cores from that work",
        "while other work runs: export OMP_WAIT_POLICY=passive, or a smaller OMP_NUM_THREADS",
    )


def library_dirs(environ: Mapping[str, str]) -> list[Path]:
    """Return where shared libraries are: the environment's own places first."""
    named = [Path(part) for part in environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    system = [path for pattern in LIBRARY_DIRS for path in sorted(Path("/").glob(pattern[1:]))]
    return [*named, Path(sys.prefix) / "lib", *system]


def check_allocator(maps: Path, directories: Sequence[Path]) -> Finding:
    """Say whether tcmalloc serves this process, or could; nothing is ever preloaded unasked.

    `maps` lists what is mapped into this process, as /proc/self/maps does.
    """
    subject = "memory allocator"
    mapped = maps.read_text(encoding="utf-8", errors="replace") if maps.is_file() else ""
    if "/libtcmalloc" in mapped:
        return Finding(subject, "ok", "tcmalloc is preloaded")
    for name in TCMALLOC_NAMES:
        for directory in directories:
            if found := sorted(directory.glob(name)):
                return Finding(
                    subject,
                    "note",
                    f"the system's own; tcmalloc is here and not preloaded: {TCMALLOC_GAIN}",
                    f"export LD_PRELOAD={found[0]}",
                )
    return Finding(
        subject,
        "ok",
        f"the system's own; no tcmalloc is installed: {TCMALLOC_GAIN}",
        "to try it, install libtcmalloc (Debian: libtcmalloc-minimal4) and run doctor again",
    )


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
            f"GPU {index}", "ok", f"{name}, {free / GIB:.1f} of {format_in(total, 'GiB')} free"
        )
        has_bf16 = torch.cuda.get_device_capability(index)[0] >= 8
        yield Finding(
            f"GPU {index} precision",
            "ok" if has_bf16 else "note",
            "bfloat16" if has_bf16 else "no bfloat16: float16 is used",
        )
    yield _quantization()


def _quantization() -> Finding:
    from llmtune.models.hardware import choose_device
    from llmtune.models.quantization.bnb import try_quantization

    problem = try_quantization(choose_device("auto"))
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
        "memory", "ok", f"{memory.available / GIB:.1f} of {format_in(memory.total, 'GiB')} free"
    )


def _disk(subject: str, path: Path) -> Finding:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    found = f"{format_in(free, 'GiB')} free at {path}"
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
