"""Diagnostics survive the disk, know what they were made from, and damage is named."""

import json

import pytest

from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.base import read_diagnostic, write_diagnostic
from llmtune.evaluation.diagnosis.contamination import (
    ContaminatedItem,
    ContaminationResult,
    SuiteContamination,
)
from llmtune.evaluation.diagnosis.divergence import (
    DivergenceResult,
    StrengthDivergence,
    TextDivergence,
)
from llmtune.evaluation.diagnosis.learning_curve import (
    CurvePoint,
    Forecast,
    LearningCurveResult,
    PowerLaw,
)
from llmtune.evaluation.diagnosis.memorization import MemorizationResult
from llmtune.evaluation.diagnosis.probe import ProbeResult
from llmtune.evaluation.diagnosis.probe_fit import ProbeCell
from llmtune.evaluation.diagnosis.shift import PairShift, ShiftResult, TextSet
from llmtune.evaluation.diagnosis.stops import StopCount, StopsResult

INPUTS = {"base": "b", "adapter": "a", "items": "i"}
TEXT = TextDivergence(0.25, 0.1, 100, 4, (0.2, 0.3))
FOUND = ContaminatedItem("x", "exact", "f:1")
CELL = ProbeCell(20, "mean", 1.0, 0.9)
LAW = PowerLaw(
    0.1, 2.0, 0.5, Forecast(8, 1.0, (0.9, 1.1)), Forecast(16, 0.8, (0.6, 1.0)),
    Forecast(32, 0.7, (0.4, 1.0)), 0.2, (0.1, 0.3),
)  # fmt: skip
EXAMPLES = [
    DivergenceResult(
        inputs=INPUTS, general=TEXT, target=None,
        by_strength={"1.0": StrengthDivergence(TEXT, None)},
    ),
    StopsResult(
        inputs=INPUTS,
        base=StopCount(1, 4, 60.0),
        tuned=StopCount(4, 4, 2.0),
        trained_stop_share=1.0,
        max_new_tokens=64,
    ),
    ContaminationResult(
        inputs={"items": "i"},
        suites={"s": SuiteContamination(1, 0, 0, 4, ("x",), (FOUND,))},
        n_train_rows=9,
    ),
    ShiftResult(
        inputs={"base": "b"},
        sets={"train": TextSet(4, 3.0, 1.0, 1.3, (1, 2, 3, 4, 5))},
        pairs={"train-general": PairShift(0.1, 0.2, 1.5, (1.0, 2.0), 0.1, 0.2, 0.002, 4, 4)},
        layer=15,
    ),
    MemorizationResult(
        inputs=INPUTS, gap_nats=0.1, gap_interval=(0.0, 0.2), auc=0.6, auc_interval=(0.5, 0.7),
        n_train=4, n_held_out=4,
    ),
    ProbeResult(
        inputs={"base": "b"}, table=(CELL,), chosen=CELL, labels=("no", "yes"), majority=0.5,
        train_rows=8,
    ),
    LearningCurveResult(
        inputs=INPUTS, suite="s", metric="accuracy", loss_name="l",
        points=(CurvePoint(8, 0, 1.0, 0.5, 4),), fit=LAW, score_fit=None, refused="too few",
    ),
]  # fmt: skip


@pytest.mark.parametrize("result", EXAMPLES, ids=lambda r: r.FILE_NAME)
def test_what_is_written_is_read_again(tmp_path, result):
    path = write_diagnostic(result, tmp_path / "diagnostics")
    assert path.name == result.FILE_NAME
    assert read_diagnostic(type(result), tmp_path / "diagnostics") == result
    assert json.loads(path.read_text())["fingerprint"] == result.fingerprint


def test_what_was_not_measured_is_none(tmp_path):
    assert read_diagnostic(ShiftResult, tmp_path) is None


def test_a_damaged_file_names_itself_and_the_place(tmp_path):
    path = write_diagnostic(EXAMPLES[4], tmp_path)
    path.write_text(path.read_text().replace('"auc": 0.6', '"auc": "high"'))
    with pytest.raises(LlmtuneError, match="memorization.json.*auc: .*number"):
        read_diagnostic(MemorizationResult, tmp_path)


def test_a_result_of_other_models_is_known():
    tuned, contamination = EXAMPLES[0], EXAMPLES[2]
    assert tuned.is_of(base="b", adapter="a")
    assert not tuned.is_of(base="b", adapter="another")
    assert not EXAMPLES[3].is_of(base="another", adapter="a")
    assert EXAMPLES[3].is_of(base="b", adapter="whichever")
    assert contamination.is_of(base=None, adapter=None)
