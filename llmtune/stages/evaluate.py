"""The evaluate stage: what is missing is planned, its cost is told, then it is measured."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from llmtune.config import RunConfig
from llmtune.evaluation.cost import MeasureCost, cost_lines, tokens_per_second
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.manifest import read_manifest
from llmtune.stages.diagnose import DIAGNOSES
from llmtune.stages.measures import ARM_MEASURES, LAST_MEASURES, Evaluation, Plan, Work

log = logging.getLogger("llmtune")

MEASURES: dict[str, Plan] = {**ARM_MEASURES, **DIAGNOSES, **LAST_MEASURES}
"""All measures in their order; a new one is one function and one entry in its room's table."""


def run_evaluate_stage(
    config: RunConfig, suites: Sequence[Suite], *, force: bool = False
) -> dict[str, Any]:
    """Measure what the config asks for and lies not yet on disk for this model and recipe.

    The base is loaded once for everything but the merged model. With `force` everything is
    measured again.

    Returns:
        `suites`: the means by suite and arm; `extent`; `left_out`: what could not be measured and
        why; `measures`: what each cost, as it was told beforehand and as it was.
    """
    evaluation = Evaluation(config, suites, force=force)
    planned = {name: plan(evaluation) for name, plan in MEASURES.items()}
    costs = _estimate(evaluation, {name: work for name, work in planned.items() if work})
    train = read_manifest(config.run).stages.get("train", {}).get("result") or {}
    for line in cost_lines(costs, train.get("seconds")):
        log.info("evaluate: %s", line)
    done = [_measure(cost, planned[cost.measure]) for cost in costs]
    return {
        "extent": config.evaluate.extent,
        "suites": {
            name: {arm: result.mean for arm, result in by_arm.items()}
            for name, by_arm in evaluation.results.items()
        },
        "left_out": evaluation.left_out,
        "measures": [cost.as_dict() for cost in done],
    }


def _estimate(evaluation: Evaluation, planned: dict[str, list[Work]]) -> list[MeasureCost]:
    tokens = {name: sum(each.tokens for each in work) for name, work in planned.items()}
    if not any(tokens.values()):
        return [MeasureCost(name, 0, 0.0) for name in tokens]
    speed = tokens_per_second(evaluation.live.model)
    return [MeasureCost(name, count, count / speed) for name, count in tokens.items()]


def _measure(cost: MeasureCost, work: Sequence[Work]) -> MeasureCost:
    started = time.perf_counter()
    for each in work:
        each.run()
    seconds = time.perf_counter() - started
    log.info(
        "evaluate: %s took %.0f s (about %.0f told)", cost.measure, seconds, cost.estimated_seconds
    )
    return MeasureCost(cost.measure, cost.tokens, cost.estimated_seconds, seconds)
