"""The stages of a run in order; each leaves an artifact on disk and can be rerun alone."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config import RunConfig, anchor_paths
from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.evaluation.config import Extent
from llmtune.io.run_dir import RunDir
from llmtune.merging.config import MergeSettings
from llmtune.models.identity import base_fingerprint
from llmtune.models.resolve import resolve_base
from llmtune.runs.first_checks import check_evaluation_files, warn_of_leaks
from llmtune.runs.ledger import Ledger, open_ledger, refuse_unusable
from llmtune.runs.stage_inputs import (
    complete_inputs,
    deciding_knobs_of,
    take_config_hash,
    train_inputs,
)
from llmtune.stages.sources import (
    evaluate_inputs,
    evaluation_results,
    kept_extent,
    load_suites,
    prepare_data,
    refuse_other_inputs,
    trained_adapter,
)

if TYPE_CHECKING:
    from llmtune.evaluation.scores import Scores
    from llmtune.planning.plan import Plan
    from llmtune.reporting.report import Report

NO_SETTINGS = MergeSettings()


def run(config: RunConfig, *, force: bool = False) -> "Report":
    """Train, merge, evaluate, report, export; what is finished on unchanged inputs is skipped.

    With `force` everything is done again. After a failure the same call continues where it failed.

    Raises:
        LlmtuneError: the input is wrong; nothing was lost.
        RunInterrupted: stopped by Ctrl-C or SIGTERM after saving a checkpoint.
    """
    suites = load_suites(config)
    check_evaluation_files(config.evaluate, suites)
    if force or not config.run.adapter_dir.is_dir():
        warn_of_leaks(config.evaluate, config.data, suites)
    train(config, force=force)
    merge(config)
    evaluate(config)
    built = report(config.run_dir)
    export(config)
    return built


def train(config: RunConfig, *, force: bool = False) -> Mapping[str, Any]:
    """Fit an adapter and save it in `run_dir/adapter`; go on from a checkpoint if there is one.

    Everything that can be wrong with the input is found before the base model is loaded.

    Returns:
        What the manifest records of the stage: steps, tokens, trained_tokens, seconds, peak_bytes,
        final_loss, adapter_bytes, choices and more.
    """
    from llmtune.training.reporters import check_reporters

    config = anchor_paths(config)
    check_reporters(config.train.report_to)
    refuse_unusable(config.run, config.model_dump(mode="json"), deciding_knobs_of, force=force)
    source = resolve_base(config.model)
    for kind in config.export.to:
        from llmtune.exporting.preflight import check_exportable

        template, type = config.model.chat_template, config.export.type_for(kind)
        check_exportable(source.dir, kind, type, chat_template=template)
    data = prepare_data(config, source)
    inputs = train_inputs(config, source.dir, data)
    interruptions: list[str] = []

    def work() -> Mapping[str, Any]:
        from llmtune.stages.train import TrainInputs, run_train_stage

        result = run_train_stage(
            config,
            TrainInputs(source, data["train"], data["evaluation"], inputs, data.get("protect")),
        )
        interruptions.extend(filter(None, [result.pop("interrupted_by")]))
        return result

    with _open(config, force=force, is_recorded=True) as ledger:
        has_adapter = config.run.adapter_dir.is_dir()
        record = ledger.manifest.stages.get("train", {})
        if ledger.has_training:
            inputs = take_config_hash(inputs, record)
        if has_adapter:
            refuse_other_inputs(config.run, record, inputs)
        ledger.describe(
            base={**ledger.manifest.base, **source.as_dict(), "fingerprint": inputs["base"]},
            data={name: prepared.report.to_json() for name, prepared in data.items()},
        )
        result = ledger.stage("train", inputs, work, is_there=has_adapter)
        precision = {"dtype": result["dtype"], "quantization": config.model.quantization_method}
        ledger.describe(base={**ledger.manifest.base, **precision})
    if interruptions:
        raise RunInterrupted(
            f"stopped by {interruptions[0]} after the last step; the adapter is saved. The same "
            "command goes on from here."
        )
    return result


def plan(config: RunConfig, *, gpu: str | None = None, measure: bool = False) -> "Plan":
    """Say what a run needs and whether it fits; nothing is loaded and torch is not imported.

    Args:
        gpu: a device to plan for, as `--gpu` takes it; None is this machine's.
        measure: time this CPU's matrix products for the time estimate.
    """
    from llmtune.planning.devices import find_device, given_gpu
    from llmtune.planning.plan import make_plan
    from llmtune.planning.workload import PlanRequest

    device = find_device(config.model.device) if gpu is None else given_gpu(gpu)
    return make_plan(
        PlanRequest(
            model=config.model,
            adapter=config.adapter,
            data=config.data,
            train=config.train,
            run_dir=config.run_dir,
            seed=config.seed,
            device=device,
            measure=measure,
        )
    )


def merge(
    config: RunConfig, *, force: bool = False, settings: MergeSettings = NO_SETTINGS
) -> Mapping[str, Any]:
    """Add the run's adapter into its base, and check it against the live adapter.

    Raises:
        CheckFailed: the merged model differs from base + adapter; nothing is left in `merged/`.
    """
    config = anchor_paths(config)
    adapter = trained_adapter(config)

    def work() -> Mapping[str, Any]:
        from llmtune.stages.merge import run_merge_stage
        from llmtune.stages.merge_apart import request_of_run

        return run_merge_stage(request_of_run(config, config.run.merged_dir, settings))

    with _open(config) as ledger:
        inputs = {
            "adapter": adapter,
            "base": base_fingerprint(resolve_base(config.model).dir),
            "merge": config.merge.model_dump(mode="json"),
        }
        inputs |= {"dtype": settings.dtype} if settings.dtype else {}
        is_there = config.run.merged_dir.is_dir()
        return ledger.stage(
            "merge", inputs, work, complete=complete_inputs, is_there=is_there, force=force
        )


def evaluate(config: RunConfig, *, force: bool = False) -> "Scores":
    """Score the arms on the run's suites and measure what `evaluate.extent` asks for beside them.

    The base is the same loaded model with its adapter switched off. What is finished for the same
    model and recipe is read, not measured again; what an earlier call measured to a larger extent
    on the same inputs stays part of the run.

    Returns:
        For each suite by name: n, metric, majority, the arms' means, and under `comparison` the
        difference of tuned and base with its interval.
    """
    from llmtune.evaluation.compare import Resampling
    from llmtune.evaluation.scores import read_scores

    config = anchor_paths(config)
    suites = load_suites(config)
    check_evaluation_files(config.evaluate, suites)
    source = resolve_base(config.model)
    adapter = trained_adapter(config)
    if "merged" in config.evaluate.arms and not config.run.merged_dir.is_dir():
        raise LlmtuneError(
            f"{config.run.path}: has no merged model; make it with: llmtune merge "
            f"{config.run.path}, or leave it out with evaluate.arms='[base, tuned]'"
        )

    def work() -> Mapping[str, Any]:
        from llmtune.stages.evaluate import run_evaluate_stage

        return run_evaluate_stage(config, suites, force=force)

    with _open(config) as ledger:
        stages = ledger.manifest.stages
        merged = stages.get("merge", {}).get("fingerprint")
        inputs = evaluate_inputs(config, suites, source, adapter=adapter, merge=merged)
        extent = kept_extent(stages.get("evaluate", {}), inputs, config)
        config = config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"extent": extent})}
        )
        inputs["extent"] = extent
        made = stages.get("evaluate", {}).get("result") or {}
        is_there = all(path.is_file() for path in evaluation_results(config, suites, made))
        ledger.stage(
            "evaluate", inputs, work, complete=complete_inputs, is_there=is_there, force=force
        )
    chosen = config.evaluate
    return read_scores(
        config.run.evaluations_dir,
        [suite.name for suite in suites],
        Resampling(chosen.confidence, chosen.bootstrap_samples, chosen.seed),
        arms=chosen.arms,
    )


def measure(run_dir: str | Path, extent: Extent) -> "Scores":
    """Make what is missing of a run's measurements for an extent; what is there is read.

    The cost is logged before anything is measured. `report` shows the result.

    Raises:
        LlmtuneError: the run was not trained, or not merged although its merged model is an arm.
    """
    from llmtune.runs.targets import load_run_config

    return evaluate(load_run_config(Path(run_dir), [f"evaluate.extent={extent}"]))


def report(run_dir: str | Path) -> "Report":
    """Build `report.json` and `report.html` from what the run left on disk."""
    from llmtune.reporting.transfer import build_report, write_report

    run = RunDir(Path(run_dir))
    built = build_report(run)
    write_report(built, run)
    return built


def export(config: RunConfig, *, force: bool = False) -> dict[str, Any]:
    """Make what the config's `export` section names, and check each file.

    Returns:
        kind -> the exporter's result: `out`, `num_bytes`, `notices` and more.

    Raises:
        LlmtuneError: there is no merged model, or it cannot be exported so.
        CheckFailed: a file's answers are not the model's; it is not kept.
    """
    config = anchor_paths(config)
    run_dir = str(config.run.path)
    results: dict[str, Any] = {}
    for kind in config.export.to:

        def work(kind: str = kind) -> Mapping[str, Any]:
            from llmtune.exporting.config import ExportSettings
            from llmtune.stages.export import export_target

            settings = ExportSettings(to=kind, type=config.export.type_for(kind), force=True)
            return export_target(run_dir, (), settings)

        with _open(config) as ledger:
            stages = ledger.manifest.stages
            made_from = "train" if kind == "adapter-gguf" else "merge"
            inputs = {
                made_from: stages.get(made_from, {}).get("fingerprint"),
                "type": config.export.type_for(kind),
            }
            earlier = stages.get(f"export {kind}", {}).get("result") or {}
            results[kind] = ledger.stage(
                f"export {kind}",
                inputs,
                work,
                is_there=bool(earlier) and Path(earlier["out"]).exists(),
                force=force,
            )
    return results


def verify(path: str | Path, against: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reload a model directory or a GGUF file and compare it with what it was made from.

    Args:
        path: a merged or 4-bit model directory, or a `.gguf` file.
        against: the run, its config, an adapter or a model.
        overrides: `key.path=value` of the run's config.

    Raises:
        CheckFailed: they differ by more than allowed; the message says in what.
    """
    from llmtune.stages.verify import VerifySettings, require_passed, verify_target

    result = verify_target(Path(path), str(against), overrides, VerifySettings())
    require_passed(result)
    return result


def _open(
    config: RunConfig, *, force: bool = False, is_recorded: bool = False
) -> AbstractContextManager[Ledger]:
    return open_ledger(
        config.run,
        config.model_dump(mode="json"),
        deciding=deciding_knobs_of,
        is_recorded=is_recorded,
        force=force,
    )
