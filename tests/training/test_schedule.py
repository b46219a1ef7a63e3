"""The learning rate rises from above zero to its peak once and then takes its course."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from llmtune.io.run_dir import RunDir
from llmtune.training.setup import Setup
from llmtune.training.trainer import build_arguments, learning_rate_factor
from tests.training.tiny_runs import make_config


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_peak_is_reached_exactly_after_the_warm_up(schedule):
    factors = [learning_rate_factor(schedule, step, 4, 20) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(factors) == 1.0
    assert min(factors) > 0


def test_cosine_and_linear_are_at_half_in_the_middle():
    assert learning_rate_factor("cosine", 10, 0, 20) == pytest.approx(0.5)
    assert learning_rate_factor("linear", 10, 0, 20) == pytest.approx(0.5)


def test_constant_stays_at_the_peak():
    assert learning_rate_factor("constant", 19, 4, 20) == 1.0


def test_the_trainer_is_on_the_device_of_the_model(tmp_path, monkeypatch):
    placed = []
    monkeypatch.setattr(torch.cuda, "set_device", placed.append)
    second = torch.device("cuda", 1)
    setup = cast(Setup, SimpleNamespace(device=second, autocast_dtype=torch.bfloat16))
    arguments = build_arguments(make_config(), RunDir(tmp_path), setup, num_rows=(8, 0), seed=0)
    assert arguments.device == second
    assert placed[-1:] == [second]
