"""An evaluation of a run: what is missing is planned, its cost is logged, then it is measured."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llmtune.data.template import template_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluation.cost import MeasureCost, cost_lines, tokens_per_second
from llmtune.evaluation.diagnosis.base import Diagnosis, Diagnostic, Planned, write_diagnostic
from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.evaluation.kept import NO_SCORES
from llmtune.evaluation.measures import ARM_MEASURES, LAST_MEASURES, Plan
from llmtune.evaluation.results import arm_result_path, read_arm_result
from llmtune.evaluation.session import NEEDS_ROWS, Evaluation, EvaluationRequest, Work
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.cached import cache_dir
from llmtune.io.environment import versions
from llmtune.io.fingerprint import hash_json
from llmtune.io.kept_json import read_kept, write_kept
from llmtune.io.manifest import EvaluateRecord
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel
from llmtune.models.probing import is_out_of_memory
from llmtune.models.template_date import template_date_of
from llmtune.scoring.live import as_arm

Load = Callable[[str], LiveModel]
log = logging.getLogger("llmtune")


def evaluate_run(request: EvaluationRequest, train_seconds: float | None = None) -> EvaluateRecord:
    """Measure what is asked for and not yet on disk for this model and recipe.

    The base is loaded once for everything but the merged model. With `force` everything is
    measured again.

    Args:
        train_seconds: what training took, for the table of costs.

    Returns:
        `suites`: the means by suite and arm; `extent`; `left_out`: what could not be measured and
        why; `measures`: what each cost, as it was estimated beforehand and as it was.
    """
    suites = take_base_answers(request.suites, request.base, request.load)
    evaluation = Evaluation(replace(request, suites=suites))
    planned = {name: plan(evaluation) for name, plan in MEASURES.items()}
    for arm, names in evaluation.reused().items():
        log.info(
            "evaluate: %s: scores of an earlier run on the same base are taken over: %s "
            "(evaluate.reuse_base=false measures them again)",
            arm,
            ", ".join(names),
        )
    costs = _estimate(evaluation, {name: work for name, work in planned.items() if work})
    for line in cost_lines(costs, train_seconds):
        log.info("evaluate: %s", line)
    done = [_measure(cost, planned[cost.measure]) for cost in costs]
    return {
        "extent": request.knobs.extent,
        "suites": {
            name: {arm: result.mean for arm, result in by_arm.items()}
            for name, by_arm in evaluation.results.items()
        },
        "left_out": evaluation.left_out,
        "measures": [cost.as_dict() for cost in done],
    }


def plan_diagnosis(diagnosis: Diagnosis[Any], evaluation: Evaluation) -> list[Work]:
    """Return the work of one diagnosis: none if its file is of the same inputs."""
    if not evaluation.knobs.measures(diagnosis.name):
        return []
    if diagnosis.needs_rows and not evaluation.has_rows:
        evaluation.leave_out(diagnosis.name, NEEDS_ROWS)
        return []
    if diagnosis.needs_adapter and not evaluation.request.has_adapter:
        evaluation.leave_out(diagnosis.name, "needs an adapter, to switch off and on")
        return []
    planned = diagnosis.plan(evaluation)
    if planned.refused is not None:
        evaluation.leave_out(diagnosis.name, planned.refused)
        return []
    known = None if evaluation.force else planned.find(evaluation.run.diagnostics_dir)
    if known is not None and _take_arms(evaluation, diagnosis, known):
        return []
    return [Work(planned.tokens, partial(_diagnose, evaluation, diagnosis, planned))]


MEASURES: dict[str, Plan] = {
    **ARM_MEASURES,
    **{
        each.name: partial(plan_diagnosis, each)
        for each in DIAGNOSES
        if each.is_evaluated and not each.needs_results
    },
    **LAST_MEASURES,
    **{
        each.name: partial(plan_diagnosis, each)
        for each in DIAGNOSES
        if each.is_evaluated and each.needs_results
    },
}
"""All measures in their order: arms, diagnoses of the model, what takes the base's place in memory,
and diagnoses of what all of them answered."""


def _diagnose(
    evaluation: Evaluation, diagnosis: Diagnosis[Any], planned: Planned[Diagnostic]
) -> None:
    result = planned.measure()
    write_diagnostic(result, evaluation.run.diagnostics_dir)
    if refused := diagnosis.refusal(result):
        evaluation.leave_out(diagnosis.name, refused)


def _take_arms(evaluation: Evaluation, diagnosis: Diagnosis[Any], known: Diagnostic) -> bool:
    """Take over the arms that a known diagnosis scored; False if one of them is gone."""
    suites = {suite.name: suite for suite in evaluation.suites}
    for name in diagnosis.answered(known):
        assert diagnosis.alternative is not None, "a diagnosis that answers suites names its arm"
        arm = diagnosis.alternative.arm
        path = arm_result_path(evaluation.run.evaluations_dir, name, arm)
        try:
            result = read_arm_result(path)
        except LlmtuneError:
            return False
        if result.recipe.get("items") != suites[name].items_fingerprint:
            return False
        evaluation.results[name][arm] = result
    return True


def _estimate(evaluation: Evaluation, planned: dict[str, list[Work]]) -> list[MeasureCost]:
    tokens = {name: sum(each.tokens for each in work) for name, work in planned.items()}
    if not any(tokens.values()):
        return [MeasureCost(name, 0, 0.0) for name in tokens]
    speed = tokens_per_second(evaluation.scored.model)
    return [MeasureCost(name, count, count / speed) for name, count in tokens.items()]


def _measure(cost: MeasureCost, work: Sequence[Work]) -> MeasureCost:
    started = time.perf_counter()
    for each in work:
        each.run()
    seconds = time.perf_counter() - started
    log.info(
        "evaluate: %s took %.0f s (estimated %.0f s)", cost.measure, seconds, cost.estimated_seconds
    )
    return MeasureCost(cost.measure, cost.tokens, cost.estimated_seconds, seconds)


def take_base_answers(suites: tuple[Suite, ...], base: Checkpoint, load: Load) -> tuple[Suite, ...]:
    """Return the suites, those held to the base with its answers as references.

    Answers are kept in the cache directory by the base's fingerprint, its template with all that it
    prints, the items, and the libraries' versions.

    Args:
        base: the checkpoint that the user gave.
        load: loads `original`, the base as it is, or if that does not fit `tuned`, which answers
            with its adapter off; both are given back here.
    """
    paths = {s.name: _kept_at(s, base) for s in suites if s.config.NEEDS_BASE_ANSWERS}
    answers = {name: read_kept(path) for name, path in paths.items()}
    left = [suite for suite in suites if suite.name in answers and answers[suite.name] is None]
    if left:
        live, is_kept = _load(load)
        with as_arm(live, "base") as untouched:
            for suite in left:
                log.info("evaluate: the untouched base answers %s, once", suite.name)
                written = suite.config.write_answers(untouched, suite)
                answers[suite.name] = written
                if is_kept:
                    write_kept(paths[suite.name], written, "the base's answers are")
        del live, untouched
        release_memory()
    return tuple(
        suite if (texts := answers.get(suite.name)) is None else suite.with_base_answers(texts)
        for suite in suites
    )


def _load(load: Load) -> tuple[LiveModel, bool]:
    """Load the original, or the quantized base if it does not fit; and whether to keep answers."""
    try:
        return load("original"), True
    except LlmtuneError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
    log.info("evaluate: the original base does not fit; the quantized base's answers are used")
    return load("tuned"), False


def _kept_at(suite: Suite, base: Checkpoint) -> Path:
    tokenizer = base.tokenizer
    key = hash_json(
        [
            base.fingerprint,
            template_fingerprint(tokenizer).to_json(),
            template_date_of(tokenizer),
            suite.config.model_dump(mode="json", exclude=NO_SCORES),
            suite.items_fingerprint,
            versions(),
        ]
    )
    return cache_dir() / "answers" / f"{key[:32]}.json"
