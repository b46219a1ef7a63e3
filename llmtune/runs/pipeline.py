"""The stages of a run in order; each leaves an artifact on disk and can be rerun alone."""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError, MergeRefused
from llmtune.evaluation.diagnosis.base import Extent
from llmtune.evaluation.suite import load_suites
from llmtune.exporting.config import find_route
from llmtune.io.fingerprint import JsonObject
from llmtune.io.manifest import ExportRecord, MergeRecord, TrainRecord
from llmtune.io.processes import Processes
from llmtune.io.run_dir import RunDir
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import SourcedTree
from llmtune.merging.config import NO_SETTINGS, MergeSettings
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.resolve import resolve_base
from llmtune.runs.evaluate import (
    EvaluateOrder,
    EvaluateStage,
    check_evaluation_files,
    check_item_lengths,
    warn_of_leaks,
)
from llmtune.runs.export import ExportStage
from llmtune.runs.merge import MergeStage
from llmtune.runs.stage import Stage
from llmtune.runs.train import TrainOrder, TrainStage, plan_request

if TYPE_CHECKING:
    from llmtune.evaluation.scores import Scores
    from llmtune.merging.planned import PlannedMerges
    from llmtune.planning.plan import Plan
    from llmtune.planning.scaling import Spread
    from llmtune.reporting.report import Report

log = logging.getLogger("llmtune")


def run(config: RunConfig, *, force: bool = False) -> "Report":
    """Train, merge, evaluate, report, export; what is finished on unchanged inputs is skipped.

    With `force` everything is done again. After a failure the same call continues where it failed.

    Raises:
        LlmtuneError: the input is wrong; nothing was lost.
        RunInterrupted: stopped by Ctrl-C or SIGTERM after saving a checkpoint.
    """
    opened = _check_evaluation(config, force=force)
    if _trains(config, force=force):
        MergeStage(config, opened=opened).plan_before_training()
    for stage in _stages_before_report(config, opened, force=force):
        stage.do()
        _release_memory()  # the next one loads its own models
    built = report(config.run_dir)
    _export(config, opened)
    return built


def _release_memory() -> None:
    if "torch" in sys.modules:  # else every stage was skipped, and no model was loaded
        from llmtune.models.hardware import release_memory

        release_memory()


def _check_evaluation(config: RunConfig, *, force: bool) -> Checkpoint:
    """Find what the evaluation of a training would refuse, and return the opened base."""
    suites = load_suites(config.evaluate)
    check_evaluation_files(config.evaluate, suites)
    opened = TrainStage(config, force=force).source
    if _trains(config, force=force):
        check_item_lengths(opened, suites)
        warn_of_leaks(config.evaluate, config.data, suites)
    return opened


def _trains(config: RunConfig, *, force: bool) -> bool:
    """Whether there is no adapter yet, or it is made again."""
    return force or not config.run.adapter_dir.is_dir()


def _stages_before_report(
    config: RunConfig, opened: Checkpoint, *, force: bool
) -> Iterator[Stage[Any]]:
    """Yield the stages in order; only training needs `force`, with which it clears the run."""
    yield TrainStage(config, force=force, opened=opened)
    yield MergeStage(config, opened=opened)
    yield EvaluateStage(config, opened=opened)


def train(config: RunConfig, *, force: bool = False) -> TrainRecord:
    """Fit an adapter and save it in `run_dir/adapter`; continue from a checkpoint if there is one.

    Everything that can be wrong with the input is found before the base model is loaded.

    Returns:
        What the manifest records of the stage.
    """
    opened = _check_evaluation(config, force=force)
    if _trains(config, force=force):
        _plan_merge_of_training(config, opened)
    return TrainStage(config, force=force, opened=opened).do()


def _plan_merge_of_training(config: RunConfig, opened: Checkpoint) -> None:
    """Find what the merge would refuse; training alone continues unless exports need the merge."""
    try:
        MergeStage(config, opened=opened).plan_before_training()
    except MergeRefused as error:
        if config.export.to:
            raise
        log.warning("%s", error)


def plan_merge(config: RunConfig) -> "PlannedMerges | None":
    """Say how the adapter that a training would make is merged; torch is needed for that.

    Raises:
        LlmtuneError: it could not be merged.
    """
    return MergeStage(config).plan_before_training()


def plan(
    config: RunConfig,
    *,
    gpu: str | None = None,
    measure: bool = False,
    spread: "Spread | None" = None,
) -> "Plan":
    """Say what a run needs and whether it fits; nothing is loaded and torch is not imported.

    Args:
        gpu: a device to plan for, as `--gpu` takes it; None is this machine's.
        measure: time this CPU's matrix products for the time estimate.
        spread: the GPUs that share its steps; None is one.

    Raises:
        LlmtuneError: several GPUs are asked for, and the device is a CPU.
    """
    from llmtune.planning.devices import find_device, given_gpu
    from llmtune.planning.plan import make_plan

    device = find_device(config.model.device) if gpu is None else given_gpu(gpu)
    if spread is not None and device.kind == "cpu":
        raise LlmtuneError(
            "--gpus, --nodes: plan several GPUs, and the device is this machine's CPU; say which "
            "GPU with --gpu 80GB"
        )
    return make_plan(plan_request(config, device, measure=measure), spread)


def plan_exports(config: RunConfig) -> tuple[str, ...]:
    """Say how each export of the config will be made, one line each; nothing is loaded.

    Raises:
        LlmtuneError: one of them cannot be made of this base, which training refuses too.
    """
    if not config.export.to:
        return ()
    from llmtune.planning.base import read_base

    directory = read_base(config.model).tokenizer_dir
    base = None if directory is None else Checkpoint.open(directory, template=config.model.template)
    if base is None or base.is_quantized:
        when = "is checked before training, when the dense checkpoint of the base is there"
        return tuple(f"{settings.to}: {when}" for settings in config.export.exports())
    return tuple(find_route(base, settings) for settings in config.export.exports())


def read_spread(
    gpus: int | None, nodes: int | None, link: float | None, step_seconds: float | None
) -> "Spread | None":
    """Return the GPUs that a plan is asked for; None is one.

    Args:
        link: GB/s of the slowest link between them.
        step_seconds: a step on one of them, measured.

    Raises:
        LlmtuneError: what is known of several is given, and not how many there are.
    """
    if gpus is None and nodes is None:
        if link is not None or step_seconds is not None:
            raise LlmtuneError("--link, --step-seconds: are for several GPUs; give --gpus as well")
        return None
    from llmtune.planning.scaling import Spread

    return Spread(gpus or 1, nodes or 1, link, step_seconds)


def merge(
    config: RunConfig, *, force: bool = False, settings: MergeSettings = NO_SETTINGS
) -> MergeRecord:
    """Add the run's adapter into its base, and check it against the live adapter.

    Raises:
        CheckFailed: the merged model differs from base + adapter; nothing is left in `merged/`.
    """
    return MergeStage(config, force=force, settings=settings).do()


def evaluate(config: RunConfig, *, force: bool = False) -> "Scores":
    """Score the arms on the run's suites and measure what `evaluate.extent` asks for beside them.

    The base is the same loaded model with its adapter switched off. What is finished for the same
    model and recipe is read, not measured again; what an earlier call measured to a larger extent
    on the same inputs stays part of the run.

    Returns:
        For each suite by name: n, metric, majority, the arms' means, and under `comparison` the
        difference of tuned and base with its interval.
    """
    stage = EvaluateStage(config, force=force)
    stage.do()
    return stage.scores()


def measure(run_dir: str | Path, extent: Extent) -> "Scores":
    """Make what is missing of a run's measurements for an extent; what is there is read.

    The cost is logged before anything is measured. `report` shows the result.

    Raises:
        LlmtuneError: the run was not trained, or not merged although its merged model is an arm.
    """
    from llmtune.runs.targets import load_run_config

    return evaluate(load_run_config(Path(run_dir), [f"evaluate.extent={extent}"]))


def follow_orders(processes: Processes) -> None:
    """Do this process's share of each stage that the first process orders, until it ends."""
    for each in processes.orders():
        order = cast(EvaluateOrder | TrainOrder, each)
        tree = SourcedTree(dict(order["config"]), {(): "the first process"})
        config = validate_section(RunConfig, tree)
        opened = replace(resolve_base(config.model), template_date=order["date"])
        if order["stage"] == EvaluateStage.name:
            EvaluateStage(config, opened=opened).follow(cast(EvaluateOrder, order), processes)
        else:
            TrainStage(config, opened=opened).follow(cast(TrainOrder, order), processes)
        _release_memory()  # the first process needs it


def report(run_dir: str | Path) -> "Report":
    """Build `report.json` and `report.html` from what the run left on disk."""
    from llmtune.reporting.build import build_report, write_report

    run = RunDir(Path(run_dir))
    built = build_report(run)
    write_report(built, run)
    return built


def export(config: RunConfig, *, force: bool = False) -> dict[str, ExportRecord]:
    """Make what the config's `export` section names, and check each file.

    Returns:
        kind -> the exporter's result: `out`, `num_bytes`, `notices` and more.

    Raises:
        LlmtuneError: there is no merged model, or it cannot be exported so.
        CheckFailed: a file's answers are not the model's; it is not kept.
    """
    return _export(config, None, force=force)


def _export(
    config: RunConfig, opened: Checkpoint | None, *, force: bool = False
) -> dict[str, ExportRecord]:
    return {
        settings.to: ExportStage(config, settings.to, force=force, opened=opened).do()
        for settings in config.export.exports()
    }


def verify(path: str | Path, against: str | Path, overrides: Sequence[str] = ()) -> JsonObject:
    """Reload a model directory or a GGUF file and compare it with what it was made from.

    Args:
        path: a merged or 4-bit model directory, or a `.gguf` file.
        against: the run, its config, an adapter or a model.
        overrides: `key.path=value` of the run's config.

    Raises:
        CheckFailed: they differ by more than allowed; the message says in what.
    """
    from llmtune.checks.verification import Tolerances
    from llmtune.runs.verify import verify_target

    verified = verify_target(Path(path), str(against), overrides, Tolerances())
    verified.require_passed()
    return verified.to_dict()
