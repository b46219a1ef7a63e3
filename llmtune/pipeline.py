"""The stages of a run in order; each leaves an artifact on disk and can be rerun alone."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.config import RunConfig, anchor_paths
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.prepare import PreparedData, prepare_examples
from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.evaluation.config import DIAGNOSES, EXTENTS, Extent
from llmtune.evaluation.results import arm_result_path
from llmtune.fingerprint import hash_file
from llmtune.first_checks import check_evaluation_files, warn_of_leaks
from llmtune.ledger import Ledger, open_ledger
from llmtune.merging.config import MergeConfig, MergeSettings
from llmtune.merging.provenance import PROVENANCE_FILE
from llmtune.models.identity import base_fingerprint
from llmtune.models.resolve import BaseSource, resolve_base
from llmtune.models.tokenizer import load_tokenizer
from llmtune.run_dir import RunDir
from llmtune.stage_inputs import (
    complete_inputs,
    deciding_knobs_of,
    take_config_hash,
    train_inputs,
)

if TYPE_CHECKING:
    from llmtune.evaluation.scores import Scores
    from llmtune.evaluation.suite import Suite
    from llmtune.planning.plan import Plan
    from llmtune.reporting.report import Report
    from llmtune.stages.merge_adapters import CombineRequest
    from llmtune.stages.merge_plan import MergeRequest
    from llmtune.targets import Target

log = logging.getLogger("llmtune")

MERGE_DEFAULTS = MergeConfig()
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
    source = resolve_base(config.model)
    for kind in config.export.to:
        from llmtune.exporting.preflight import check_exportable

        template, type = config.model.chat_template, config.export.type_for(kind)
        check_exportable(source.dir, kind, type, chat_template=template)
    data = _prepare_data(config, source)
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
            _refuse_other_inputs(config.run, record, inputs)
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
    request_of = partial(_merge_request, config, config.run.merged_dir, settings)
    adapter = _trained_adapter(config)

    def work() -> Mapping[str, Any]:
        from llmtune.stages.merge import run_merge_stage

        return run_merge_stage(request_of())

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


def merge_into(
    target: "Target",
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
    from llmtune.stages.merge import run_merge_stage

    request = _request_of_target(target, out_dir, knobs, settings)
    _refuse_to_replace(out_dir, (request.source.dir, request.adapter_dir), force=force)
    return run_merge_stage(request)


def plan_merges(
    target: "Target",
    out_dir: Path | None = None,
    *,
    knobs: MergeConfig = MERGE_DEFAULTS,
    settings: MergeSettings = NO_SETTINGS,
) -> Mapping[str, Any]:
    """Say what a merge would change, and what it needs on the disk; nothing is written.

    Raises:
        LlmtuneError: there is no adapter, or it cannot be merged.
    """
    from llmtune.stages.merge_plan import describe_plans, plan_candidates

    if out_dir is None and target.config is not None:
        out_dir = target.config.run.merged_dir
    request = _request_of_target(target, out_dir or Path(), knobs, settings)
    return describe_plans(plan_candidates(request), request.out_dir)


def combine(request: "CombineRequest", *, force: bool = False) -> Mapping[str, Any]:
    """Combine several adapters into a model or a new adapter; see `stages.merge_adapters`."""
    from llmtune.stages import merge_adapters

    _refuse_to_replace(request.out_dir, (), force=force)
    return merge_adapters.combine(request)


def plan_combination(request: "CombineRequest") -> Mapping[str, Any]:
    """Say what a combined merge would change; nothing is written."""
    from llmtune.stages.merge_adapters import describe_combination

    return describe_combination(request)


def _request_of_target(
    target: "Target", out_dir: Path, knobs: MergeConfig, settings: MergeSettings
) -> "MergeRequest":
    from llmtune.stages.merge_plan import MergeRequest

    if target.adapter_dir is None:
        raise LlmtuneError(f"{target.name}: has no adapter to merge")
    if target.config is not None:
        return _merge_request(anchor_paths(target.config), out_dir, settings)
    source = resolve_base(target.model, allow_quantized=True)
    return MergeRequest(target.model, source, target.adapter_dir, out_dir, knobs, settings=settings)


def _merge_request(config: RunConfig, out_dir: Path, settings: MergeSettings) -> "MergeRequest":
    from llmtune.stages.merge_plan import MergeRequest
    from llmtune.stages.reference import held_out_rows

    source = resolve_base(config.model)
    tokenizer = load_tokenizer(source.dir, chat_template=config.model.chat_template)
    return MergeRequest(
        model=config.model,
        source=source,
        adapter_dir=config.run.adapter_dir,
        out_dir=out_dir,
        knobs=config.merge,
        sequences=held_out_rows(config, tokenizer),
        suites=load_suites(config),
        settings=settings,
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
    adapter = _trained_adapter(config)
    if "merged" in config.evaluate.arms and not config.run.merged_dir.is_dir():
        raise LlmtuneError(
            f"{config.run.path}: has no merged model; make it with: llmtune merge "
            f"{config.run.path}, or leave it out with evaluate.arms='[base, tuned]'"
        )

    def work() -> Mapping[str, Any]:
        from llmtune.stages.evaluate import run_evaluate_stage

        return run_evaluate_stage(config, suites, force=force)

    with _open(config) as ledger:
        inputs = {
            "adapter": adapter,
            "base": base_fingerprint(source.dir),
            "merge": ledger.manifest.stages.get("merge", {}).get("fingerprint"),
            "evaluate": config.evaluate.measuring_knobs(),
            "suites": {suite.name: suite.fingerprint for suite in suites},
            "files": {str(path): hash_file(path) for path in _evaluation_files(config)},
        }
        extent = _kept_extent(ledger.manifest.stages.get("evaluate", {}), inputs, config)
        config = config.model_copy(
            update={"evaluate": config.evaluate.model_copy(update={"extent": extent})}
        )
        inputs["extent"] = extent
        made = ledger.manifest.stages.get("evaluate", {}).get("result") or {}
        is_there = all(path.is_file() for path in _evaluation_results(config, suites, made))
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
    from llmtune.targets import load_run_config

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


def load_suites(config: RunConfig) -> "list[Suite]":
    """Read the run's suites with all their items; what is wrong in them is found here."""
    from llmtune.evaluation.suite import load_suite

    return [
        load_suite(name, seed=config.evaluate.seed, limit=config.evaluate.limit)
        for name in config.evaluate.suites
    ]


def _prepare_data(config: RunConfig, source: BaseSource) -> dict[str, PreparedData]:
    tokenizer = load_tokenizer(source.dir, chat_template=config.model.chat_template)
    prepared = {
        "train": prepare_examples(config.mixed_data, tokenizer, split="train", seed=config.seed),
        "evaluation": prepare_examples(
            config.data, tokenizer, split="evaluation", seed=config.seed
        ),
    }
    penalty = config.protect.kl_to_base
    if penalty is not None and isinstance(penalty.source, SourceConfig):
        general = DataConfig(train=[penalty.source], cache=config.data.cache)
        prepared["protect"] = prepare_examples(general, tokenizer, split="train", seed=config.seed)
    for name, data in prepared.items():
        for line in data.report.lines():
            log.info("%s data: %s", name, line)
    return prepared


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


def _refuse_other_inputs(run: RunDir, record: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    known = record.get("inputs", inputs)
    other = [name for name in inputs if known.get(name) != inputs[name]]
    if other:
        raise LlmtuneError(
            f"{run.path}: its adapter was trained on another {' and '.join(other)} (compared by "
            "content); choose another run_dir, or redo this one with --force"
        )


def _refuse_to_replace(out_dir: Path, used: Sequence[Path], *, force: bool) -> None:
    place = out_dir.resolve()
    for path in used:
        if place == path.resolve() or place in path.resolve().parents:
            raise LlmtuneError(f"{out_dir}: holds what is merged; choose another --out")
    if not out_dir.exists():
        return
    if not force:
        raise LlmtuneError(f"{out_dir}: exists already; choose another --out, or give --force")
    if not (out_dir / PROVENANCE_FILE).is_file():
        raise LlmtuneError(f"{out_dir}: is no merged model of llmtune, so it is not replaced")


def _evaluation_results(
    config: RunConfig, suites: "Sequence[Suite]", made: Mapping[str, Any]
) -> Iterator[Path]:
    """Yield every file that the evaluate stage leaves; `made` is its result, where it has one."""
    run, knobs = config.run, config.evaluate
    for suite in suites:
        arms = {arm for arm in knobs.arms if arm != "merged" or suite.role == "target"}
        for arm in arms | set(made.get("suites", {}).get(suite.name, {})):
            yield arm_result_path(run.evaluations_dir, suite.name, arm)
    for name in DIAGNOSES:
        if knobs.measures(name) and name not in made.get("left_out", {}):
            yield run.diagnostics_dir / f"{name}.json"


def _evaluation_files(config: RunConfig) -> list[Path]:
    """Return the user's prompt and prediction files."""
    return [*config.evaluate.prompts.values(), *config.evaluate.predictions.values()]


def _kept_extent(record: Mapping[str, Any], inputs: Mapping[str, Any], config: RunConfig) -> Extent:
    """Return the larger of the extent asked for and the one measured before on equal inputs."""
    asked = config.evaluate.extent
    known = complete_inputs(record.get("inputs") or {})
    measured = known.get("extent")
    is_same = record.get("finished") and all(known.get(key) == inputs[key] for key in inputs)
    if measured not in EXTENTS or not is_same:
        return asked
    return max(asked, measured, key=EXTENTS.index)


def _trained_adapter(config: RunConfig) -> str:
    if not config.run.adapter_dir.is_dir():
        raise LlmtuneError(
            f"{config.run.path}: has no trained adapter yet; make it with: llmtune train CONFIG"
        )
    return adapter_fingerprint(config.run.adapter_dir)
