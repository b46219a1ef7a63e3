"""The learning rate rises from above zero to its peak once and then takes its course."""

from types import SimpleNamespace
from typing import cast, get_args

import pytest
import torch
from pydantic import ValidationError

from llmtune.errors import LlmtuneError
from llmtune.io.run_dir import RunDir
from llmtune.training.config import Schedule
from llmtune.training.optimizers import learning_rate_factor
from llmtune.training.setup import Setup
from llmtune.training.trainer import build_arguments
from tests.training.tiny_runs import make_config


def course(total_steps=20, **knobs):
    config = make_config(max_steps=total_steps, **knobs)
    return [learning_rate_factor(config, step, total_steps) for step in range(total_steps)]


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.2}, {"warmup_steps": 4}])
def test_the_peak_is_reached_exactly_after_the_warm_up(schedule, warmup):
    factors = course(schedule=schedule, **warmup)
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(factors) == 1.0
    assert min(factors) > 0


def test_cosine_and_linear_are_at_half_in_the_middle():
    assert course(schedule="cosine", warmup_ratio=0)[10] == pytest.approx(0.5)
    assert course(schedule="linear", warmup_ratio=0)[10] == pytest.approx(0.5)


def test_constant_stays_at_the_peak():
    assert course(schedule="constant")[-1] == 1.0


def test_stable_then_decay_falls_on_a_line_at_the_end():
    factors = course(schedule="warmup_stable_decay", warmup_ratio=0, decay_ratio=0.5)
    assert factors[:11] == [1.0] * 11
    assert factors[11:] == pytest.approx([0.1 * left for left in range(9, 0, -1)])


def test_restarts_begin_at_the_peak():
    factors = course(schedule="cosine_with_restarts", warmup_ratio=0, num_cycles=2)
    assert factors[:10] == pytest.approx(factors[10:])
    assert factors == pytest.approx(2 * course(10, schedule="cosine", warmup_ratio=0))


def test_the_lowest_rate_is_kept():
    factors = course(schedule="linear", warmup_ratio=0, min_lr_ratio=0.1)
    assert factors[-1] == pytest.approx(0.1 + 0.9 / 20)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"decay_ratio": 0.5}, "belongs to schedule=warmup_stable_decay"),
        ({"num_cycles": 2}, "belongs to schedule=cosine_with_restarts"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "constant never falls"),
        ({"warmup_steps": 20, "max_steps": 20}, "never reach its peak"),
    ],
)
def test_knobs_that_cannot_work_together_are_refused(knobs, message):
    with pytest.raises((ValidationError, LlmtuneError), match=message):
        make_config(**knobs)


def test_a_warm_up_as_long_as_the_passes_is_refused():
    config = make_config(max_steps=None, num_epochs=2, batch_size=4, warmup_steps=4)
    assert config.total_steps(12) == 6
    with pytest.raises(LlmtuneError, match="the run has 4 steps"):
        config.total_steps(8)


def test_the_trainer_is_on_the_device_of_the_model(tmp_path, monkeypatch):
    placed = []
    monkeypatch.setattr(torch.cuda, "set_device", placed.append)
    second = torch.device("cuda", 1)
    setup = cast(Setup, SimpleNamespace(device=second, autocast_dtype=torch.bfloat16))
    arguments = build_arguments(make_config(), RunDir(tmp_path), setup, num_rows=(8, 0), seed=0)
    assert arguments.device == second
    assert placed[-1:] == [second]
