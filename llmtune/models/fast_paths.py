"""Which fast paths `llmtune doctor --test` found wrong or slow on this machine (light)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

from llmtune.io.cached import cache_dir
from llmtune.io.environment import machine, processor_name, versions
from llmtune.io.fingerprint import code_fingerprint, hash_json
from llmtune.io.kept_json import read_kept, write_sealed

log = logging.getLogger("llmtune")

FastPath = Literal[
    "frozen_head",
    "fused_lora",
    "fused_blocks",
    "packing",
    "shared_beginnings",
    "kl_to_base",
    "fused_scoring",
]
FOLDER = "fast_paths"
ROOMS = ("training", "scoring", "adapters", "models", "ops")
"""Whose code the paths are: what was found about an older version says nothing of this one."""


class SwitchedOff(TypedDict):
    """A path that is not used on this machine, in one precision."""

    path: FastPath
    dtype: str
    is_quantized: bool
    reason: str


class MachineRecord(TypedDict):
    """What a test of this machine found, and with what."""

    machine: Mapping[str, str | int | None]
    device: str
    versions: Mapping[str, str | None]
    off: Sequence[SwitchedOff]
    results: Sequence[Mapping[str, object]]


_TRIED: ContextVar[Mapping[FastPath, str] | None] = ContextVar("tried", default=None)


@contextmanager
def instead_of_kept(off: Mapping[FastPath, str]) -> Iterator[None]:
    """Inside, these paths are off and all others on, whatever an earlier test found."""
    token = _TRIED.set(off)
    try:
        yield
    finally:
        _TRIED.reset(token)


def switched_off(dtype: str, device: str, *, is_quantized: bool) -> Mapping[FastPath, str]:
    """Return the paths that a test of this machine switched off in this precision, and why.

    What was found with other versions of the libraries or of llmtune no longer counts; a line
    says so, because what was wrong there was not tried since.

    Args:
        dtype: such as bfloat16.
        device: as `models.hardware.device_name` gives it.
    """
    tried = _TRIED.get()
    if tried is not None:
        return tried
    if not (cache_dir() / FOLDER).is_dir():
        return {}
    path = _kept_file(device)
    kept = read_kept(path)
    if kept is None:
        _say_outdated(path)
        return {}
    return {
        one["path"]: f"switched off on this machine by `llmtune doctor --test`: {one['reason']} "
        f"({path})"
        for one in kept["off"]
        if (one["dtype"], one["is_quantized"]) == (dtype, is_quantized)
    }


def keep_record(
    device: str, off: Sequence[SwitchedOff], results: Sequence[Mapping[str, object]]
) -> Path:
    """Write what a test found, for later runs and to be attached to a bug report.

    Raises:
        OSError: the cache directory cannot be written.
    """
    path = _kept_file(device)
    record = MachineRecord(
        machine=machine(), device=device, versions=versions(), off=off, results=results
    )
    write_sealed(path, record)
    for older in _of_this_machine(path):
        older.unlink(missing_ok=True)
    return path


def _kept_file(device: str) -> Path:
    where = hash_json({"processor": processor_name(), "device": device})
    return cache_dir() / FOLDER / f"{where[:16]}-{_made_with()[:16]}.json"


@cache
def _made_with() -> str:
    return hash_json({**versions(), "code": code_fingerprint(ROOMS)})


def _of_this_machine(newest: Path) -> Iterator[Path]:
    """Yield what was kept of this machine with other versions."""
    found = newest.parent.glob(f"{newest.name.split('-')[0]}-*.json")
    return (path for path in found if path != newest)


@cache
def _say_outdated(path: Path) -> None:
    """Say once what was off with other versions and is now on again."""
    for older in _of_this_machine(path):
        kept = read_kept(older)
        if kept is not None and kept["off"]:
            log.warning(
                "%s: `llmtune doctor --test` switched it off with other versions of llmtune or its "
                "libraries. It is on again and was not tried with these: run the test once more",
                ", ".join(sorted({one["path"] for one in kept["off"]})),
            )
