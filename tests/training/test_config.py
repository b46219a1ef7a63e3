"""The training section: how long a run is, and which combinations are refused."""

import pytest
from pydantic import ValidationError

from llmtune.errors import LlmtuneError
from llmtune.training.config import TrainConfig, check_reporters, suggest_learning_rate


def test_giving_both_lengths_is_refused():
    with pytest.raises(ValidationError, match="max_steps .10. and num_epochs .2. both"):
        TrainConfig(max_steps=10, num_epochs=2)


def test_a_run_without_a_length_is_one_epoch():
    assert TrainConfig(batch_size=8).total_steps(17) == 3


def test_epochs_count_their_short_last_step():
    assert TrainConfig(batch_size=8, num_epochs=2).total_steps(17) == 6
    assert TrainConfig(batch_size=8, num_epochs=0.5).total_steps(32) == 2


def test_max_steps_decides_alone():
    assert TrainConfig(max_steps=60).total_steps(10) == 60


@pytest.mark.parametrize(
    ("family", "width", "rate"),
    [
        ("llama", 2048, 4.9e-4),  # Llama 3.2 1B
        ("llama", 4096, 2.9e-4),  # 8B
        ("llama", 8192, 1.7e-4),  # 70B
        ("qwen3", 4096, 4.7e-4),  # 8B
        ("llama", 576, 4.9e-4),  # narrower than what the rule was fitted on
        ("gemma3", 2560, 2e-4),  # no rule is published
    ],
)
def test_the_suggested_rate_is_the_published_one(family, width, rate):
    found = suggest_learning_rate(family, width)
    assert found.learning_rate == rate
    assert ("published rule for" in found.reason) == (rate != 2e-4)


def test_early_stopping_without_evaluations_is_refused():
    with pytest.raises(ValidationError, match="eval_every"):
        TrainConfig(early_stopping={"patience": 2})


def test_a_missing_tracker_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr("llmtune.training.config.find_spec", lambda name: None)
    with pytest.raises(LlmtuneError, match="trackio.*pip install trackio"):
        check_reporters(["trackio"])


def test_importing_the_section_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, llmtune.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_without_an_objective_in_its_config_has_the_default_one():
    assert "objective" not in TrainConfig().deciding_knobs()
    assert TrainConfig() == TrainConfig(objective={"method": "sft"})
