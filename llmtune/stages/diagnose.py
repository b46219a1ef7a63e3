"""The diagnoses of a run as measures of its evaluation: one file each in `diagnostics/`."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from llmtune.adapters.strength import adapter_strength
from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis import (
    contamination,
    divergence,
    memorisation,
    probe,
    shift,
    stops,
)
from llmtune.evaluation.diagnosis.plan import Diagnosis
from llmtune.evaluation.diagnosis.prepare import TrainedSteps, prepare_subject, shift_texts
from llmtune.evaluation.diagnosis.results import Diagnostic, write_diagnostic
from llmtune.evaluation.diagnosis.rows import read_row_texts
from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject
from llmtune.evaluation.results import arm_result_path, read_arm_result
from llmtune.evaluation.run import Progress
from llmtune.io.manifest import read_manifest
from llmtune.stages.measures import Evaluation, Plan, Work

log = logging.getLogger("llmtune")


def plan_divergence(evaluation: Evaluation) -> Diagnosis[Any]:
    """KL and changed first choices on general text and on the task's prompts."""
    model = evaluation.live.model
    strengths = evaluation.config.evaluate.measured_strengths
    return divergence.plan_divergence(
        evaluation_subject(evaluation),
        diagnosis_settings(evaluation),
        strengths={each: partial(adapter_strength, model, each) for each in strengths},
    )


def plan_stops(evaluation: Evaluation) -> Diagnosis[Any]:
    """Whether base and tuned model still end their answers."""
    return stops.plan_stops(evaluation_subject(evaluation), diagnosis_settings(evaluation))


def plan_contamination(evaluation: Evaluation) -> Diagnosis[Any]:
    """Train rows among the suites' items; no model is asked."""
    rows = read_row_texts(evaluation.config.data, "train")
    return contamination.plan_contamination(rows, evaluation.suites)


def plan_probe(evaluation: Evaluation) -> Diagnosis[Any]:
    """A linear probe on the base's states, also as an arm on suites of fixed choices."""
    return probe.plan_probe(
        evaluation_subject(evaluation), diagnosis_settings(evaluation), evaluation.keep
    )


def plan_shift(evaluation: Evaluation) -> Diagnosis[Any]:
    """How far the train texts lie from evaluation, general text and other domains."""
    data = evaluation.config.data
    rows = [read_row_texts(data, split) for split in ("train", "evaluation")]
    texts = shift_texts(rows[0], rows[1], evaluation.suites)
    return shift.plan_shift(evaluation.live.scored, texts, diagnosis_settings(evaluation))


def plan_memorisation(evaluation: Evaluation) -> Diagnosis[Any]:
    """Whether the rows that were trained on are told from rows that were not."""
    subject, settings = evaluation_subject(evaluation), diagnosis_settings(evaluation)
    return memorisation.plan_memorisation(subject, settings)


def evaluation_subject(evaluation: Evaluation) -> Subject:
    """Return the loaded model with its rows, prepared once."""
    if evaluation.subject is None:
        config = evaluation.config
        evaluation.subject = prepare_subject(
            evaluation.live.scored,
            evaluation.suites,
            config.data,
            config.mixed_data,
            trained_steps(config),
        )
    return evaluation.subject


def trained_steps(config: RunConfig) -> TrainedSteps:
    """Return how much the run trained, by its manifest, and on which rows."""
    result = read_manifest(config.run).stages.get("train", {}).get("result") or {}
    return TrainedSteps(
        result.get("steps", 0),
        config.train.batch_size,
        config.seed,
        num_sources=len(config.data.train),
        num_added=(result.get("protect") or {}).get("replayed_rows", 0),
    )


def diagnosis_settings(evaluation: Evaluation) -> DiagnosisSettings:
    """Return how diagnoses are made, with progress to the same log as the arms."""
    knobs, report = evaluation.config.evaluate, evaluation.settings.on_progress

    def advance(what: str, done: int, total: int) -> None:
        if report is not None:
            report(Progress(what, "diagnosis", done, total))

    budget = None if knobs.token_budget == "auto" else knobs.token_budget
    return DiagnosisSettings(budget, knobs.seed, knobs.confidence, advance)


def _as_measure(name: str, plan: Callable[[Evaluation], Diagnosis[Any]]) -> Plan:
    """Return the measure of one diagnosis: nothing where its file is of the same inputs."""

    def planned(evaluation: Evaluation) -> list[Work]:
        if not evaluation.config.evaluate.measures(name):
            return []
        diagnosis = plan(evaluation)
        if diagnosis.refused is not None:
            evaluation.leave_out(name, diagnosis.refused)
            return []
        directory = evaluation.config.run.diagnostics_dir
        known = None if evaluation.force else diagnosis.find(directory)
        if known is not None and _take_arms(evaluation, known):
            return []
        return [Work(diagnosis.tokens, lambda: _measure(evaluation, name, diagnosis))]

    return planned


def _measure(evaluation: Evaluation, name: str, diagnosis: Diagnosis[Any]) -> None:
    result = diagnosis.measure()
    write_diagnostic(result, evaluation.config.run.diagnostics_dir)
    if refused := getattr(result, "refused", None):
        evaluation.leave_out(name, refused)


def _take_arms(evaluation: Evaluation, known: Diagnostic) -> bool:
    """Take over the arms that a known diagnosis scored; False where one of them is gone."""
    suites = {suite.name: suite for suite in evaluation.suites}
    for name in getattr(known, "answered", ()):
        path = arm_result_path(evaluation.config.run.evaluations_dir, name, probe.PROBE_ARM)
        try:
            result = read_arm_result(path)
        except LlmtuneError:
            return False
        if result.recipe.get("items") != suites[name].items_fingerprint:
            return False
        evaluation.results[name][probe.PROBE_ARM] = result
    return True


DIAGNOSES: dict[str, Plan] = {
    name: _as_measure(name, plan)
    for name, plan in {
        "divergence": plan_divergence,
        "stops": plan_stops,
        "contamination": plan_contamination,
        "probe": plan_probe,
        "shift": plan_shift,
        "memorisation": plan_memorisation,
    }.items()
}
