"""Build the transfer report of a run directory, and write report.json, .html and .md."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from llmtune.evaluation.tasks.base import ABILITIES, Ability
from llmtune.io.manifest import Manifest, read_manifest
from llmtune.io.run_dir import RunDir, atomic_write_json, atomic_write_text
from llmtune.merging.config import MergeConfig
from llmtune.models.quantization.config import is_quantized
from llmtune.reporting.diagnostics import Diagnostics, read_diagnostics
from llmtune.reporting.html import render_html
from llmtune.reporting.markdown import render_markdown
from llmtune.reporting.measure import measure_suites
from llmtune.reporting.missing import Missing, Present, find_missing
from llmtune.reporting.report import Report
from llmtune.reporting.run_results import (
    Models,
    current_results,
    is_finished,
    read_resampling,
    read_results,
)
from llmtune.reporting.sections.generations import read_generations
from llmtune.reporting.sections.probabilities import measure_shifts
from llmtune.reporting.sections.record import find_fingerprints
from llmtune.reporting.sections.sequence import find_sequence
from llmtune.reporting.sections.strengths import measure_strengths
from llmtune.reporting.sections.training import TIMED_STAGES, measure_cost, read_loss_curve
from llmtune.reporting.suites import SuiteReport, Thresholds
from llmtune.reporting.verdict.caveats import find_caveats, find_training_caveats
from llmtune.reporting.verdict.evidence import Evidence
from llmtune.reporting.verdict.rules import decide


def build_report(run: RunDir, *, thresholds: Thresholds | None = None) -> Report:
    """Read what a run has left on disk and decide; what is not there is listed in `missing`.

    Args:
        thresholds: how much general ability may be lost; the stated defaults if None.

    Raises:
        LlmtuneError: it is not a run, or one of its files is damaged or of a different recipe.
    """
    manifest = read_manifest(run)
    resampling = read_resampling(manifest.config)
    thresholds = thresholds or Thresholds()
    models = Models.of_run(run, manifest)
    results = read_results(run.evaluations_dir, is_wanted=current_results(run, manifest, models))
    diagnostics = read_diagnostics(run, results, base=models.base, adapter=models.adapter)
    suites = measure_suites(results, resampling, leaks=diagnostics.leaks)
    bounds = {s.name: thresholds.general_bound(s.unit) for s in suites if s.role == "general"}
    strengths = measure_strengths(results, bounds, resampling, thresholds)
    evidence = _gather(manifest, suites, diagnostics, thresholds)
    evidence = replace(evidence, strengths=strengths)
    curve, generations = read_loss_curve(run.metrics_path), read_generations(run)
    training, merge = manifest.trained, manifest.merged
    present = Present(
        loss_curve=not curve.is_empty,
        generations=bool(generations),
        merge=bool(merge),
        judged=_read_judged(manifest),
        rows=bool(manifest.config.get("data")),
    )
    return Report(
        name=run.path.resolve().name,
        verdict=decide(evidence),
        caveats=find_training_caveats(training) + find_caveats(evidence),
        suites=suites,
        manifest=manifest,
        curve=curve,
        generations=generations,
        cost=measure_cost(run, manifest, results, diagnostics.seconds),
        merge=merge,
        fingerprints=find_fingerprints(manifest),
        missing=(
            *_find_unfinished(run, manifest),
            *find_missing(suites, diagnostics, present),
        ),
        diagnostics=diagnostics,
        strengths=strengths,
        shifts=measure_shifts(results),
        sequence=find_sequence(run, models.adapter),
        resampling=resampling,
        thresholds=thresholds,
    )


def gather_evidence(report: Report, suites: Sequence[SuiteReport]) -> Evidence:
    """Return what a verdict on these suites looks at, with what a report says beside them.

    Weaker forms of the adapter are left out.
    """
    return _gather(report.manifest, tuple(suites), report.diagnostics, report.thresholds)


def _gather(
    manifest: Manifest,
    suites: tuple[SuiteReport, ...],
    diagnostics: Diagnostics,
    thresholds: Thresholds,
) -> Evidence:
    return Evidence(
        suites,
        thresholds,
        read_resampling(manifest.config).confidence,
        diagnostics=diagnostics,
        keep=_read_keep(manifest),
        merge_base=_read_merge_base(manifest),
        is_judged=_read_judged(manifest) is not None,
    )


def write_report(report: Report, run: RunDir) -> None:
    """Write report.json, .html and .md into the run directory, each whole or not at all."""
    page = render_html(report)
    atomic_write_json(run.report_json_path, report.as_json())
    atomic_write_text(run.report_html_path, page)
    atomic_write_text(run.report_md_path, render_markdown(report))


def _read_keep(manifest: Manifest) -> tuple[Ability, ...]:
    return tuple((manifest.config.get("evaluate") or {}).get("keep", ABILITIES))


def _read_judged(manifest: Manifest) -> Literal["adapter", "model"] | None:
    """Return what was judged without a training of ours; None for a run."""
    judged = manifest.config.get("judged")
    if judged is None:
        return None
    return "adapter" if judged.get("adapter") else "model"


def _read_merge_base(manifest: Manifest) -> str | None:
    """Return the `merge.base` of a merge into a quantized base; None if there was no choice."""
    if not is_quantized(manifest.base.get("quantization")):
        return None
    result = manifest.merged
    configured = (manifest.config.get("merge") or {}).get("base")
    return str(result.get("base") or configured or MergeConfig().base)


def _find_unfinished(run: RunDir, manifest: Manifest) -> tuple[Missing, ...]:
    begun = {stage for stage in TIMED_STAGES if stage in manifest.stages}
    if any(run.evaluations_dir.glob("*.json")):
        begun.add("evaluate")
    names = {stage: f"the end of {stage}" for stage in TIMED_STAGES}
    names["evaluate"] = "evaluation is not finished"
    open_stages = [s for s in TIMED_STAGES if s in begun and not is_finished(manifest, s)]
    return tuple(Missing(names[stage], "llmtune run RUN") for stage in open_stages)
