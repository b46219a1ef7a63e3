"""Adding an adapter into its base: planned from headers, streamed, and finished by one rename."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.environment import versions
from llmtune.errors import LlmtuneError
from llmtune.merging.changes import MergePlan
from llmtune.merging.plan import plan_merge
from llmtune.merging.provenance import PROVENANCE_FILE
from llmtune.merging.scratch import CPU
from llmtune.merging.shards import merged_bytes, write_shards
from llmtune.merging.sidecar import sidecar_sources, write_sidecar

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

SMALL_FILES_BYTES = 1 << 20  # config, index and provenance, when the free space is checked


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: what went into it and how much of the base it changed."""

    out_dir: Path
    base: str  # original or dequantized
    base_fingerprint: str
    adapter_hash: str
    strength: float
    adapters: tuple[dict[str, object], ...]  # of several: name, hash and weight of each
    num_tensors: int
    changes: dict[str, int]  # number of changed tensors, by kind of change
    config_changes: dict[str, object]
    num_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Return the result as JSON."""
        return {**asdict(self), "out_dir": str(self.out_dir)}


def merge_adapter(
    base_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    strength: float = 1.0,
    num_threads: int = 2,
    overwrite: bool = False,
) -> MergeResult:
    """Write `base + strength * adapter` into `out_dir` as a model that transformers loads.

    Every changed weight is `(W + scaling * (B @ A)).to(dtype)` with all of it in float32, rounded
    once; every other byte is the base's. The directory appears whole or not at all: it is written
    beside `out_dir`, flushed, and renamed; what a killed merge left there is removed first.

    Args:
        base_dir: the 16- or 32-bit base checkpoint.
        adapter_dir: a LoRA adapter in PEFT's format.
        out_dir: the directory to make.
        strength: how much of the adapter is added.
        num_threads: tiles computed at once, one torch thread each.
        overwrite: replace an existing `out_dir`, which stays until the new one is complete.

    Raises:
        LlmtuneError: as `plan_merge`; `out_dir` exists; the disk is too small; or a merged weight
            is not finite.
    """
    plan = plan_merge(base_dir, adapter_dir, strength=strength)
    return write_merge(plan, out_dir, num_threads=num_threads, overwrite=overwrite)


def write_merge(
    plan: MergePlan,
    out_dir: Path,
    *,
    num_threads: int = 2,
    overwrite: bool = False,
    device: torch.device = CPU,
) -> MergeResult:
    """Carry out a plan, the arithmetic on `device`; see `merge_adapter`."""
    start = time.monotonic()
    out_dir = out_dir.absolute()
    if out_dir.exists() and not overwrite:
        raise LlmtuneError(f"{out_dir} exists; remove it, or ask for it to be overwritten")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out_dir)
    _check_free_space(plan, out_dir)
    with _unfinished_dir(out_dir) as directory:
        write_shards(plan, directory, num_threads=num_threads, device=device)
        write_sidecar(plan, directory)
        result = _result(plan, out_dir, time.monotonic() - start)
        provenance = json.dumps(_provenance(plan, result), indent=2) + "\n"
        (directory / PROVENANCE_FILE).write_text(provenance, encoding="utf-8")
        _flush(directory)
        move_into_place(directory, out_dir)
    return result


def remove_leftovers(out_dir: Path) -> None:
    """Remove what killed merges into `out_dir` left beside it; a running one's is kept.

    A directory that was being replaced goes back to its place where the new one never came.
    """
    if not out_dir.exists():
        for replaced in out_dir.parent.glob(f"{out_dir.name}.old-*"):
            replaced.rename(out_dir)
            break
    for pattern in (f"{out_dir.name}.tmp-*", f"{out_dir.name}.old-*"):
        for leftover in out_dir.parent.glob(pattern):
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            except BlockingIOError:
                pass  # another process is writing there
            finally:
                os.close(descriptor)


@contextmanager
def _unfinished_dir(out_dir: Path) -> Iterator[Path]:
    """A locked directory beside `out_dir`, gone again unless it was renamed."""
    directory = Path(tempfile.mkdtemp(prefix=f"{out_dir.name}.tmp-", dir=out_dir.parent))
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
    except OSError as error:
        if error.errno in NO_SPACE:
            raise LlmtuneError(
                f"the disk of {out_dir.parent} ran full while the merged model was written "
                f"({os.strerror(error.errno)}); nothing was left there"
            ) from error
        raise
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def needed_bytes(plan: MergePlan) -> int:
    """Return what the merged directory takes on the disk."""
    needed = sum(merged_bytes(shard) for shard in plan.shards) + SMALL_FILES_BYTES
    return needed + sum(path.stat().st_size for path in sidecar_sources(plan).values())


def free_bytes(out_dir: Path) -> int:
    """Return the free bytes of the disk on which `out_dir` lies or would lie."""
    place = next(
        place for place in (out_dir.absolute(), *out_dir.absolute().parents) if place.exists()
    )
    return shutil.disk_usage(place).free


def _check_free_space(plan: MergePlan, out_dir: Path) -> None:
    needed, free = needed_bytes(plan), free_bytes(out_dir)
    if free < needed:
        raise LlmtuneError(
            f"{out_dir} needs {needed:,} bytes and its disk has {free:,} free; free some space or "
            "merge onto another disk"
        )


def _result(plan: MergePlan, out_dir: Path, seconds: float) -> MergeResult:
    changes = Counter(tensor.change for tensor in plan.tensors if tensor.change != "none")
    return MergeResult(
        out_dir=out_dir,
        base=plan.base,
        base_fingerprint=plan.base_fingerprint,
        adapter_hash=adapter_fingerprint(plan.adapter_dir),
        strength=plan.strength,
        adapters=_describe_adapters(plan) if len(plan.adapters) > 1 else (),
        num_tensors=len(plan.tensors),
        changes=dict(changes),
        config_changes=plan.config_changes,
        num_bytes=plan.num_bytes,
        seconds=seconds,
    )


def _describe_adapters(plan: MergePlan) -> tuple[dict[str, object], ...]:
    return tuple(
        {
            "name": one.directory.name,
            "hash": adapter_fingerprint(one.directory),
            "weight": one.weight,
        }
        for one in plan.adapters
    )


def _provenance(plan: MergePlan, result: MergeResult) -> dict[str, object]:
    values = result.to_dict()
    values.pop("out_dir")
    return {
        "base_name": plan.base_name,
        "base_revision": plan.base_revision,
        **values,
        "versions": versions(),
    }


def _flush(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move_into_place(directory: Path, out_dir: Path) -> None:
    """Rename `directory` to `out_dir`; what was there stays until the new one is in place."""
    directory.chmod(0o755)
    replaced = None
    if out_dir.exists():
        replaced = Path(tempfile.mkdtemp(prefix=f"{out_dir.name}.old-", dir=out_dir.parent))
        out_dir.rename(replaced)
    directory.rename(out_dir)
    descriptor = os.open(out_dir.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
