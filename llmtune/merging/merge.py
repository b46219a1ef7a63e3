"""Adding an adapter into its base: planned from headers, streamed, and finished by one rename."""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.checks.provenance import PROVENANCE_FILE
from llmtune.errors import LlmtuneError
from llmtune.io.environment import versions
from llmtune.io.fingerprint import JsonObject
from llmtune.io.unfinished import move_into_place, require_space, unfinished_dir
from llmtune.merging.changes import ConfigChanges, MergePlan
from llmtune.merging.plan import plan_merge
from llmtune.merging.scratch import CPU
from llmtune.merging.shards import merged_bytes, write_shards
from llmtune.merging.sidecar import sidecar_sources, write_sidecar
from llmtune.models.checkpoint import Checkpoint

SMALL_FILES_BYTES = 1 << 20  # config, index and provenance, when the free space is checked


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: what went into it and how much of the base it changed."""

    out_dir: Path
    base: str  # original or dequantized
    base_fingerprint: str
    adapter_hash: str
    strength: float
    adapters: tuple[JsonObject, ...]  # of several: name, hash and weight of each
    num_tensors: int
    changes: dict[str, int]  # number of changed tensors, by kind of change
    config_changes: ConfigChanges
    num_bytes: int
    seconds: float

    def to_dict(self) -> JsonObject:
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
        adapter_dir: an adapter in PEFT's format.
        out_dir: the directory to make.
        strength: how much of the adapter is added.
        num_threads: tiles computed at once, one torch thread each.
        overwrite: replace an existing `out_dir`, which stays until the new one is complete.

    Raises:
        LlmtuneError: as `plan_merge`; `out_dir` exists; the disk is too small; or a merged weight
            is not finite.
    """
    out_dir = out_dir.absolute()
    if out_dir.exists() and not overwrite:
        raise LlmtuneError(f"{out_dir} exists; remove it, or ask for it to be overwritten")
    plan = plan_merge(Checkpoint.open(base_dir), adapter_dir, strength=strength)
    require_space(out_dir, needed_bytes(plan))
    with unfinished_dir(out_dir) as scratch:
        result = write_merge(plan, scratch / out_dir.name, num_threads=num_threads)
        move_into_place(result.out_dir, out_dir)
    return replace(result, out_dir=out_dir)


def write_merge(
    plan: MergePlan, directory: Path, *, num_threads: int = 2, device: torch.device = CPU
) -> MergeResult:
    """Carry out a plan into a new directory, the arithmetic on `device`; see `merge_adapter`.

    Raises:
        LlmtuneError: a merged weight is not finite.
        OSError: the disk ran full; `unfinished_dir` explains that and cleans up.
    """
    start = time.monotonic()
    directory.mkdir()
    write_shards(plan, directory, num_threads=num_threads, device=device)
    write_sidecar(plan, directory)
    result = _result(plan, directory, time.monotonic() - start)
    provenance = json.dumps(_provenance(plan, result), indent=2) + "\n"
    (directory / PROVENANCE_FILE).write_text(provenance, encoding="utf-8")
    return result


def needed_bytes(plan: MergePlan) -> int:
    """Return what the merged directory takes on the disk."""
    needed = sum(merged_bytes(shard) for shard in plan.shards) + SMALL_FILES_BYTES
    return needed + sum(path.stat().st_size for path in sidecar_sources(plan).values())


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


def _describe_adapters(plan: MergePlan) -> tuple[JsonObject, ...]:
    return tuple(
        {
            "name": one.directory.name,
            "hash": adapter_fingerprint(one.directory),
            "weight": one.weight,
        }
        for one in plan.adapters
    )


def _provenance(plan: MergePlan, result: MergeResult) -> JsonObject:
    values = {**result.to_dict()}
    values.pop("out_dir")
    return {
        "base_name": plan.base_name,
        "base_revision": plan.base_revision,
        **values,
        "combination": asdict(plan.combination) if plan.combination else None,
        "versions": versions(),
    }
