"""Merges that are no stage of a run: into another place, of a bare adapter, or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune.checks.prompts import HeldOut
from llmtune.checks.provenance import PROVENANCE_FILE
from llmtune.config import RunConfig, anchor_paths
from llmtune.errors import LlmtuneError
from llmtune.merging.combined_adapter import COMBINED_FILE
from llmtune.merging.config import MergeConfig, MergeSettings
from llmtune.models.resolve import resolve_base
from llmtune.runs.evaluate import load_suites
from llmtune.runs.targets import Target
from llmtune.stages import merge_adapters
from llmtune.stages.merge import run_merge_stage
from llmtune.stages.merge_adapters import CombineRequest
from llmtune.stages.merge_plan import MergeRequest, describe_plans, plan_candidates

MERGE_DEFAULTS = MergeConfig()
NO_SETTINGS = MergeSettings()
# What --force may replace: the file that marks it, and what it is called.
MERGED_MODEL = (PROVENANCE_FILE, "merged model")
NEW_ADAPTER = (COMBINED_FILE, "adapter that --to adapter made")


def merge_into(
    target: Target,
    out_dir: Path,
    *,
    knobs: MergeConfig = MERGE_DEFAULTS,
    settings: MergeSettings = NO_SETTINGS,
    force: bool = False,
) -> Mapping[str, Any]:
    """Merge an adapter that belongs to no run, or a run's into another place, and check it.

    Args:
        knobs: base, strength and bound of an adapter that is no run's; a run has its own.
        force: replace an earlier merged model in `out_dir`; nothing else is ever replaced.

    Raises:
        LlmtuneError: there is no adapter, or `out_dir` may not be written.
        CheckFailed: the merged model differs from base + adapter; `out_dir` is not made.
    """
    request = _request_of_target(target, out_dir, knobs, settings)
    _refuse_to_replace(out_dir, (request.source.directory, request.adapter_dir), force=force)
    return run_merge_stage(request)


def plan_merges(
    target: Target,
    out_dir: Path | None = None,
    *,
    knobs: MergeConfig = MERGE_DEFAULTS,
    settings: MergeSettings = NO_SETTINGS,
) -> Mapping[str, Any]:
    """Say what a merge would change, and what it needs on the disk; nothing is written.

    Raises:
        LlmtuneError: there is no adapter, or it cannot be merged.
    """
    if out_dir is None and target.config is not None:
        out_dir = target.config.run.merged_dir
    request = _request_of_target(target, out_dir or Path(), knobs, settings)
    return describe_plans(plan_candidates(request), request.out_dir)


def combine(request: CombineRequest, *, force: bool = False) -> Mapping[str, Any]:
    """Combine several adapters into a model or a new adapter; see `stages.merge_adapters`.

    Args:
        force: replace an earlier result of the same kind in `out_dir`; nothing else ever is.

    Raises:
        LlmtuneError: as `stages.merge_adapters.combine`, or `out_dir` may not be written.
    """
    if request.out_dir.exists():
        used = merge_adapters.used_dirs(request)
        kind = NEW_ADAPTER if request.to_adapter else MERGED_MODEL
        _refuse_to_replace(request.out_dir, used, force=force, kind=kind)
    return merge_adapters.combine(request)


def plan_combination(request: CombineRequest) -> Mapping[str, Any]:
    """Say what a combined merge would change; nothing is written."""
    return merge_adapters.describe_combination(request)


def request_of_run(config: RunConfig, out_dir: Path, settings: MergeSettings) -> MergeRequest:
    """Return a merge of a run's adapter, checked on its held-out rows and its suites."""
    source = resolve_base(config.model)
    return MergeRequest(
        model=config.model,
        source=source,
        adapter_dir=config.run.adapter_dir,
        out_dir=out_dir,
        knobs=config.merge,
        held_out=HeldOut(config.data, config.seed, tuple(load_suites(config.evaluate))),
        settings=settings,
    )


def _request_of_target(
    target: Target, out_dir: Path, knobs: MergeConfig, settings: MergeSettings
) -> MergeRequest:
    if target.adapter_dir is None:
        raise LlmtuneError(f"{target.name}: has no adapter to merge")
    if target.config is not None:
        return request_of_run(anchor_paths(target.config), out_dir, settings)
    source = resolve_base(target.model, allow_quantized=True)
    return MergeRequest(target.model, source, target.adapter_dir, out_dir, knobs, settings=settings)


def _refuse_to_replace(
    out_dir: Path, used: Sequence[Path], *, force: bool, kind: tuple[str, str] = MERGED_MODEL
) -> None:
    """Refuse a place that holds what is read, or anything but a result of this kind."""
    marker, name = kind
    place = out_dir.resolve()
    for path in used:
        if place == path.resolve() or place in path.resolve().parents:
            raise LlmtuneError(f"{out_dir}: holds what is merged; choose another --out")
    if not out_dir.exists():
        return
    if not force:
        raise LlmtuneError(f"{out_dir}: exists already; choose another --out, or give --force")
    if not (out_dir / marker).is_file():
        raise LlmtuneError(
            f"{out_dir}: is no {name} (there is no {marker}), so it is not replaced; choose "
            "another --out"
        )
