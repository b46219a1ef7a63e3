"""What holds of every diagnosis that is listed."""

import subprocess
import sys
from typing import get_args

import pytest

from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.diagnosis.base import Extent
from llmtune.evaluation.diagnosis.config import DIAGNOSES


@pytest.mark.parametrize("diagnosis", DIAGNOSES, ids=lambda diagnosis: diagnosis.name)
def test_a_diagnosis_has_a_file_a_name_in_reports_and_a_way_to_be_measured(diagnosis):
    assert f"{diagnosis.name}.json" == diagnosis.result.FILE_NAME
    assert diagnosis.what and diagnosis.measured_by.startswith("llmtune ")
    if diagnosis.knobs is not None:
        assert EvaluateConfig.model_fields[diagnosis.name].default is None
        assert EvaluateConfig.model_fields[diagnosis.name].description == diagnosis.help
    elif diagnosis.extent is None:
        assert diagnosis.command and diagnosis.name not in EvaluateConfig.model_fields
    else:
        assert diagnosis.extent in get_args(Extent)
        assert EvaluateConfig.model_fields[diagnosis.name].description.startswith(diagnosis.help)


def test_no_two_diagnoses_share_a_name_or_a_number():
    names = [diagnosis.name for diagnosis in DIAGNOSES]
    numbers = [number for diagnosis in DIAGNOSES for number in diagnosis.number_names]
    assert len(set(names)) == len(names) and len(set(numbers)) == len(numbers)


def test_tasks_and_diagnoses_are_listed_without_a_heavy_library():
    program = (
        "import sys; import llmtune.evaluation.config; import llmtune.evaluation.tasks.config; "
        "print([name for name in ('numpy', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
