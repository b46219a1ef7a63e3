"""From the scores of several trainings to a learning curve: an item's loss, and the two laws."""

from collections.abc import Sequence

import numpy as np

from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.curve_fit import Measured, fit_curve
from llmtune.evaluation.diagnosis.learning_curve import CurvePoint, LearningCurveResult
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import hash_json

Trained = tuple[int, int, ArmResult]
"""Rows, seed and what the training scored."""


def summarize_curve(
    suite: Suite,
    trained: Sequence[Trained],
    *,
    target_score: float | None = None,
    confidence: float = 0.95,
) -> LearningCurveResult:
    """Fit the law of the loss and that of the error to trainings on different numbers of rows.

    The loss of an item is -log p(right choice among the choices) for a choice suite, which tells
    more than right or wrong; for the other suites it is the error. The error is 1 - score, or the
    score itself where lower is better.

    Raises:
        LlmtuneError: the results are not of the same items.
    """
    results = [result for _, _, result in trained]
    _require_same_items(suite, results)
    losses = [_measure(suite, rows, result, is_error=False) for rows, _, result in trained]
    errors = [_measure(suite, rows, result, is_error=True) for rows, _, result in trained]
    higher = results[0].higher_is_better
    target = target_score if target_score is None or not higher else 1.0 - target_score
    law = fit_curve(losses, confidence=confidence)
    error_law = fit_curve(errors, target=target, confidence=confidence)
    return LearningCurveResult(
        inputs={
            "base": str(results[-1].model.get("base")),
            "adapter": str(results[-1].model.get("adapter")),
            "items": suite.items_fingerprint,
            "trainings": hash_json([result.model.get("adapter") for result in results]),
        },
        seconds=sum(result.seconds for result in results),
        suite=suite.name,
        metric=results[0].metric,
        loss_name=suite.config.loss_name,
        points=tuple(
            CurvePoint(rows, seed, measured.mean, result.mean, result.n)
            for (rows, seed, result), measured in zip(trained, losses, strict=True)
        ),
        fit=law.law,
        score_fit=error_law.law,
        refused=law.refused,
    )


def _measure(suite: Suite, rows: int, result: ArmResult, *, is_error: bool) -> Measured:
    values = []
    for item, score in zip(suite.items, result.items, strict=True):
        loss = None if is_error else suite.config.item_loss(item, score)
        if loss is None:
            loss = 1.0 - score.score if result.higher_is_better else score.score
        values.append(loss)
    weights = np.array([score.weight for score in result.items])
    return Measured(rows, np.array(values), weights)


def _require_same_items(suite: Suite, results: Sequence[ArmResult]) -> None:
    for result in results:
        if result.recipe.get("items") != suite.items_fingerprint:
            raise LlmtuneError(
                f"{suite.name}: a result of the learning curve is of other items than the suite "
                "has now; evaluate the run again: llmtune eval RUN --force"
            )
