"""What a suite of choices says beside its score: per class, how calibrated, and as written."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmtune.evaluation.results import ItemScore
from llmtune.io.fingerprint import JsonObject

MOST_CLASSES = 30
"""With more, classes are not broken down: a confusion matrix would not be read."""
BINS = 10
"""Bins of equal width in the calibration error."""
NOTHING = ""
"""The column of a confusion matrix for answers that name no choice."""


@dataclass(frozen=True)
class ClassScore:
    """How one class was answered; None if it was never given, asked, or either."""

    label: str
    n: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class ClassScores:
    """The classes of a suite.

    `confusion` has a row for each right label and a column for each given one; the last column is
    answers that name none of the labels. Macro-F1 is over the classes that were asked or answered.
    """

    macro_f1: float | None
    classes: list[ClassScore]
    confusion: list[list[int]]


@dataclass(frozen=True)
class ReliabilityBin:
    """The items whose confidence falls in one bin: how many, how sure, how often right."""

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How the confidence of answers fits their accuracy."""

    calibration_error: float
    brier: float
    reliability: list[ReliabilityBin]


def describe_choices(scores: Sequence[ItemScore], labels: Sequence[str]) -> JsonObject:
    """Return the secondary scores of a choice suite as JSON values.

    Args:
        labels: the choices that all items have; empty if each item has its own.
    """
    found: dict[str, Any] = {}
    if labels and len(labels) <= MOST_CLASSES:
        pairs = [(each.answer or "", each.prediction or "") for each in scores]
        found |= asdict(describe_classes(pairs, labels))
    calibrated = [each.details["probabilities"] for each in scores if _has_probabilities(each)]
    if len(calibrated) == len(scores):
        answers = [each.details["right"] for each in scores]
        found |= asdict(describe_calibration(calibrated, answers))
    written = [each.details["written"] for each in scores if "written" in each.details]
    if len(written) == len(scores):
        found["written_accuracy"] = sum(one["score"] for one in written) / len(written)
        found["written_unparseable"] = sum(one["choice"] is None for one in written)
        found["written_agrees"] = sum(
            one["choice"] == each.prediction for one, each in zip(written, scores, strict=True)
        ) / len(written)
    return found


def describe_classes(pairs: Sequence[tuple[str, str]], labels: Sequence[str]) -> ClassScores:
    """Return macro-F1, precision, recall and F1 per class, and the confusion matrix.

    Args:
        pairs: the right and the given label of each item.
    """
    known = set(labels)
    counts = Counter((right, given if given in known else NOTHING) for right, given in pairs)
    classes = []
    for label in labels:
        hits = counts[label, label]
        asked = sum(n for (right, _), n in counts.items() if right == label)
        given = sum(n for (_, answer), n in counts.items() if answer == label)
        classes.append(
            ClassScore(
                label=label,
                n=asked,
                precision=hits / given if given else None,
                recall=hits / asked if asked else None,
                f1=2 * hits / (asked + given) if asked + given else None,
            )
        )
    scored = [each.f1 for each in classes if each.f1 is not None]
    return ClassScores(
        macro_f1=sum(scored) / len(scored) if scored else None,
        classes=classes,
        confusion=[[counts[right, given] for given in (*labels, NOTHING)] for right in labels],
    )


def describe_calibration(
    probabilities: Sequence[Sequence[float]], answers: Sequence[int]
) -> Calibration:
    """Return the expected calibration error, the Brier score, and the bins of a reliability chart.

    The error is the mean distance of confidence and accuracy over ten bins of equal width,
    weighted by their items (Guo et al. 2017). The Brier score sums the squared error over the
    choices of an item (Brier 1950): 0 is best, 2 worst.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    brier = 0.0
    for each, answer in zip(probabilities, answers, strict=True):
        confidence = max(each)
        is_right = list(each).index(confidence) == answer
        bins[min(BINS - 1, int(confidence * BINS))].append((confidence, is_right))
        brier += sum((p - (place == answer)) ** 2 for place, p in enumerate(each))
    shown = [
        ReliabilityBin(
            n=len(members),
            confidence=math.fsum(confidence for confidence, _ in members) / len(members),
            accuracy=sum(is_right for _, is_right in members) / len(members),
        )
        for members in bins
        if members
    ]
    total = len(answers)
    error = math.fsum(one.n * abs(one.confidence - one.accuracy) for one in shown) / total
    return Calibration(calibration_error=error, brier=brier / total, reliability=shown)


def _has_probabilities(score: ItemScore) -> bool:
    return "probabilities" in score.details and "right" in score.details
