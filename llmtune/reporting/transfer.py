"""The transfer report: read a run directory, decide, and write report.json and report.html."""

from collections.abc import Mapping
from typing import Any

from llmtune.evaluation.compare import Resampling
from llmtune.manifest import Manifest, read_manifest
from llmtune.reporting.caveats import find_caveats, find_training_caveats
from llmtune.reporting.current import current_results, is_finished
from llmtune.reporting.facts import find_fingerprints
from llmtune.reporting.html import render_html
from llmtune.reporting.measure import measure_suites
from llmtune.reporting.numbers import finite
from llmtune.reporting.report import Cost, Report
from llmtune.reporting.sources import (
    LossCurve,
    read_generations,
    read_loss_curve,
    weights_bytes,
)
from llmtune.reporting.suites import SuiteReport
from llmtune.reporting.verdict import Evidence, Thresholds, decide
from llmtune.run_dir import RunDir, atomic_write_json, atomic_write_text

TIMED_STAGES = ("train", "merge", "evaluate")


def build_report(run: RunDir, *, thresholds: Thresholds | None = None) -> Report:
    """Read what a run has left on disk and decide; what is not there is listed in `missing`.

    Args:
        thresholds: how much general ability may be lost; the stated defaults if None.

    Raises:
        LlmtuneError: it is not a run, or a file of it is damaged or made by another recipe.
    """
    manifest = read_manifest(run)
    resampling = _resampling(manifest.config)
    thresholds = thresholds or Thresholds()
    suites = measure_suites(
        run.evaluations_dir, resampling, is_wanted=current_results(run, manifest)
    )
    evidence = Evidence(suites, thresholds, resampling.confidence)
    curve, generations = read_loss_curve(run.metrics_path), read_generations(run)
    merge = _result(manifest, "merge")
    return Report(
        name=run.path.resolve().name,
        verdict=decide(evidence),
        caveats=find_training_caveats(_result(manifest, "train")) + find_caveats(evidence),
        suites=suites,
        manifest=manifest,
        curve=curve,
        generations=generations,
        cost=_measure_cost(run, manifest),
        merge=merge,
        fingerprints=_fingerprints(manifest),
        missing=(
            *_find_missing(suites, curve, merge=bool(merge), generations=bool(generations)),
            *_find_unfinished(run, manifest),
        ),
        resampling=resampling,
        thresholds=thresholds,
    )


def write_report(report: Report, run: RunDir) -> None:
    """Write report.json and report.html into the run directory, each whole or not at all."""
    page = render_html(report)
    atomic_write_json(run.report_json_path, report.as_json())
    atomic_write_text(run.report_html_path, page)


def _resampling(config: Mapping[str, Any]) -> Resampling:
    section, default = config.get("evaluate") or {}, Resampling()
    return Resampling(
        confidence=section.get("confidence", default.confidence),
        samples=section.get("bootstrap_samples", default.samples),
        seed=section.get("seed", default.seed),
    )


def _result(manifest: Manifest, stage: str) -> Mapping[str, Any]:
    return manifest.stages.get(stage, {}).get("result") or {}


def _find_unfinished(run: RunDir, manifest: Manifest) -> tuple[str, ...]:
    begun = {stage for stage in TIMED_STAGES if stage in manifest.stages}
    if any(run.evaluations_dir.glob("*.json")):
        begun.add("evaluate")
    names = {stage: f"the end of {stage}" for stage in TIMED_STAGES}
    names["evaluate"] = "evaluation is not finished"
    open_stages = [s for s in TIMED_STAGES if s in begun and not is_finished(manifest, s)]
    return tuple(names[stage] for stage in open_stages)


def _measure_cost(run: RunDir, manifest: Manifest) -> Cost:
    training = _result(manifest, "train")
    tokens, train_seconds = finite(training.get("tokens")), finite(training.get("seconds"))
    return Cost(
        seconds=_of_stages(manifest, "seconds"),
        peak_bytes={name: int(size) for name, size in _of_stages(manifest, "peak_bytes").items()},
        training_gpu_peak_bytes=_gpu_peak(training),
        steps=training.get("steps"),
        tokens=training.get("tokens"),
        trained_tokens=training.get("trained_tokens"),
        tokens_per_second=tokens / train_seconds if tokens and train_seconds else None,
        adapter_bytes=weights_bytes(run.adapter_dir),
        merged_bytes=weights_bytes(run.merged_dir),
    )


def _gpu_peak(training: Mapping[str, Any]) -> int | None:
    peak = finite(training.get("peak_bytes"))
    on_gpu = str(training.get("device", "")).startswith("cuda")
    return int(peak) if on_gpu and peak is not None else None


def _of_stages(manifest: Manifest, key: str) -> dict[str, float]:
    found = {name: finite(manifest.stages.get(name, {}).get(key)) for name in TIMED_STAGES}
    return {name: value for name, value in found.items() if value is not None}


def _fingerprints(manifest: Manifest) -> dict[str, str]:
    stages = {name: stage for name, stage in manifest.stages.items() if name in TIMED_STAGES}
    places = {"base": manifest.base, "data": manifest.data, "stages": stages}
    return find_fingerprints(places)


def _find_missing(
    suites: tuple[SuiteReport, ...], curve: LossCurve, *, merge: bool, generations: bool
) -> tuple[str, ...]:
    arms = {name for suite in suites for name in suite.arms}
    absent = {
        "evaluation of the base model": "base" not in arms,
        "evaluation of the tuned model": "tuned" not in arms,
        "evaluation of the merged model": "merged" not in arms,
        "a suite of general ability": not any(suite.role == "general" for suite in suites),
        "loss curve": curve.is_empty,
        "example generations": not generations,
        "merge check": not merge,
    }
    return tuple(name for name, is_absent in absent.items() if is_absent)
