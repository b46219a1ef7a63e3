"""Merges that are not a stage of a run: into another place, of a bare adapter, or of several."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.adapters.manifest import CONFIG_NAME, read_adapter_config
from llmtune.checks.provenance import PROVENANCE_FILE
from llmtune.config import anchor_paths
from llmtune.errors import LlmtuneError
from llmtune.io.unfinished import refuse_to_replace
from llmtune.merging.changes import WeightedAdapter
from llmtune.merging.checked import CheckedMerge
from llmtune.merging.combined_adapter import COMBINED_FILE, combine_adapters
from llmtune.merging.config import NO_SETTINGS, Combination, MergeConfig, MergeSettings
from llmtune.merging.one_adapter import MergeRequest, merge_one, plan_one
from llmtune.merging.planned import PlannedMerges
from llmtune.merging.several_adapters import (
    CombinedMerge,
    NewAdapter,
    SeveralRequest,
    merge_several,
    plan_several,
    require_combinable,
)
from llmtune.runs.merge import request_of_run
from llmtune.runs.targets import Target, resolve_target

MERGE_DEFAULTS = MergeConfig()
RUNS_DIR = "runs"
ADAPTER_DIR = "adapter"
# What --force may replace: what it is called, and the file that marks it.
MERGED_MODEL = ("a merged model", PROVENANCE_FILE)
NEW_ADAPTER = ("an adapter that --to adapter made", COMBINED_FILE)


@dataclass(frozen=True)
class Combined:
    """Which adapters are combined how, by their names, and where the result goes."""

    adapters: Sequence[str]
    """`NAME_OR_PATH=WEIGHT` each: an adapter directory, a run, or the name of one in `runs/`."""
    overrides: Sequence[str]
    """`model.*=value`: how the base is found."""
    how: Combination
    out_dir: Path
    knobs: MergeConfig
    settings: MergeSettings


def merge_into(
    target: Target,
    out_dir: Path,
    *,
    knobs: MergeConfig = MERGE_DEFAULTS,
    settings: MergeSettings = NO_SETTINGS,
    force: bool = False,
) -> CheckedMerge:
    """Merge an adapter that belongs to no run, or a run's into another place, and check it.

    Args:
        knobs: base, strength and bound of an adapter that belongs to no run; a run has its own.
        force: replace an earlier merged model in `out_dir`; nothing else is ever replaced.

    Raises:
        LlmtuneError: there is no adapter, or `out_dir` may not be written.
        CheckFailed: the merged model differs from base + adapter; `out_dir` is not made.
    """
    request = _request_of_target(target, out_dir, knobs, settings)
    _refuse_to_replace(out_dir, (request.source.directory, request.adapter_dir), force=force)
    return merge_one(request)


def plan_merges(
    target: Target,
    out_dir: Path | None = None,
    *,
    knobs: MergeConfig = MERGE_DEFAULTS,
    settings: MergeSettings = NO_SETTINGS,
) -> PlannedMerges:
    """Say what a merge would change, and what it needs on the disk; nothing is written.

    Raises:
        LlmtuneError: there is no adapter, or it cannot be merged.
    """
    if out_dir is None and target.config is not None:
        out_dir = target.config.run.merged_dir
    return plan_one(_request_of_target(target, out_dir or Path(), knobs, settings))


def combine_into_model(combined: Combined, *, force: bool = False) -> CombinedMerge:
    """Combine several adapters into a model.

    Args:
        force: replace an earlier merged model in `out_dir`; nothing else is ever replaced.

    Raises:
        LlmtuneError: an adapter cannot be found or combined, is there twice, holds a number that
            is not finite, or has a different base; or `out_dir` may not be written.
        CheckFailed: the merged model differs from its adapters by more than `max_kl`.
    """
    adapters = [_find_adapter(item) for item in combined.adapters]
    if combined.out_dir.exists():
        used = _used_dirs(adapters)
        if adapters:
            used.append(Path(_base_of(adapters[0], combined).model.base).expanduser())
        _refuse_to_replace(combined.out_dir, used, force=force)
    return merge_several(_request_of_several(adapters, combined))


def combine_into_adapter(combined: Combined, *, force: bool = False) -> NewAdapter:
    """Combine several adapters into a new adapter.

    Args:
        force: replace an earlier combined adapter in `out_dir`; nothing else is ever replaced.

    Raises:
        LlmtuneError: as `combine_into_model`.
    """
    adapters = [_find_adapter(item) for item in combined.adapters]
    if combined.out_dir.exists():
        _refuse_to_replace(combined.out_dir, _used_dirs(adapters), force=force, kind=NEW_ADAPTER)
    require_combinable(adapters)
    made = combine_adapters(adapters, combined.how, combined.out_dir)
    return NewAdapter(made, tuple(adapters))


def plan_combination(combined: Combined) -> PlannedMerges:
    """Say what a model of several adapters would change; nothing is written.

    Raises:
        LlmtuneError: as `combine_into_model`.
    """
    adapters = [_find_adapter(item) for item in combined.adapters]
    return plan_several(_request_of_several(adapters, combined))


def _request_of_target(
    target: Target, out_dir: Path, knobs: MergeConfig, settings: MergeSettings
) -> MergeRequest:
    if target.adapter_dir is None:
        raise LlmtuneError(f"{target.name}: has no adapter to merge")
    if target.config is not None:
        config = anchor_paths(target.config)
        return request_of_run(config, target.dense_base, out_dir, settings)
    return MergeRequest(
        target.model, target.base, target.adapter_dir, out_dir, knobs, settings=settings
    )


def _request_of_several(adapters: Sequence[WeightedAdapter], combined: Combined) -> SeveralRequest:
    require_combinable(adapters)
    return SeveralRequest(
        base=_base_of(adapters[0], combined),
        adapters=tuple(adapters),
        how=combined.how,
        out_dir=combined.out_dir,
        knobs=combined.knobs,
        settings=combined.settings,
    )


def _base_of(adapter: WeightedAdapter, combined: Combined) -> Target:
    return resolve_target(str(adapter.directory), combined.overrides)


def _find_adapter(item: str) -> WeightedAdapter:
    name, separator, number = item.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not separator or not math.isfinite(weight):
        raise LlmtuneError(f"--adapters: {item!r} is not NAME_OR_PATH=WEIGHT, such as runs/a=0.6")
    for place in (Path(name), Path(RUNS_DIR) / name):
        for directory in (place, place / ADAPTER_DIR):
            if (directory / CONFIG_NAME).is_file():
                return WeightedAdapter(directory, weight)
    raise LlmtuneError(
        f"--adapters: {name!r} is neither an adapter directory nor a run, here or in {RUNS_DIR}/"
    )


def _used_dirs(adapters: Sequence[WeightedAdapter]) -> list[Path]:
    """Return the adapters' directories, and those of the bases that they name."""
    directories = [one.directory for one in adapters]
    bases = [read_adapter_config(one).get("base_model_name_or_path") for one in directories]
    return [*directories, *(Path(base).expanduser() for base in bases if base)]


def _refuse_to_replace(
    out_dir: Path, used: Sequence[Path], *, force: bool, kind: tuple[str, str] = MERGED_MODEL
) -> None:
    """Refuse a place that holds what is read, or anything but a result of this kind."""
    place = out_dir.resolve()
    for path in used:
        if place == path.resolve() or place in path.resolve().parents:
            raise LlmtuneError(f"{out_dir}: holds what is merged; choose another --out")
    product, marker = kind
    refuse_to_replace(
        out_dir,
        product=f"{product} (there is no {marker})",
        is_own=lambda out: (out / marker).is_file(),
        force=force,
    )
