"""The diagnoses that there are, in the order of the report: a new one is its file and its entry."""

from typing import Any

from llmtune.evaluation.diagnosis.base import Alternative, Diagnosis
from llmtune.evaluation.diagnosis.contamination import Contamination
from llmtune.evaluation.diagnosis.divergence import DivergenceFromBase
from llmtune.evaluation.diagnosis.learning_curve import LearningCurve
from llmtune.evaluation.diagnosis.memorization import Memorization
from llmtune.evaluation.diagnosis.pairwise import Pairwise
from llmtune.evaluation.diagnosis.probe import Probe
from llmtune.evaluation.diagnosis.shift import Shift
from llmtune.evaluation.diagnosis.stops import Stops

DIAGNOSES: tuple[Diagnosis[Any], ...] = (
    DivergenceFromBase(),
    Stops(),
    Pairwise(),
    LearningCurve(),
    Contamination(),
    Memorization(),
    Shift(),
    Probe(),
)

ALTERNATIVES: dict[str, Alternative] = {
    each.alternative.arm: each.alternative for each in DIAGNOSES if each.alternative is not None
}
"""What diagnoses offer in place of tuning, by the name of its results."""
