"""The evaluate section accepts what it documents and refuses the rest."""

import pytest
from pydantic import ValidationError

from llmtune.evaluation.config import EvaluateConfig


def test_the_defaults_measure_every_arm_at_95_percent():
    config = EvaluateConfig()
    assert config.arms == ("original", "base", "tuned", "merged")
    assert (config.confidence, config.bootstrap_samples) == (0.95, 10_000)


@pytest.mark.parametrize(
    "values",
    [
        {"arms": []},
        {"arms": ["base", "base"]},
        {"arms": ["bace"]},
        {"limit": 0},
        {"token_budget": "many"},
        {"confidence": 1.0},
        {"bootstrap_samples": 10},
        {"suite": "x"},
    ],
)
def test_values_that_mean_nothing_are_refused(values):
    with pytest.raises(ValidationError):
        EvaluateConfig(**values)
