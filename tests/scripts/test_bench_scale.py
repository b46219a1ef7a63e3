"""The benchmark of several processes: what it counts, and what it says of it."""

import sys
from pathlib import Path

import pytest
import torch

from llmtune.io.processes import ALONE, Processes
from llmtune.io.stopping import Interruption
from llmtune.training.reduction import Reduction, Stopping
from tests.training.tiny_runs import make_adapter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench_arms import reductions
from bench_arms.job import Answer, Job, StepReduction, Times
from bench_scale import show, summarize


def test_a_reduction_is_timed_without_the_wait_for_the_slower_process(monkeypatch):
    clock = [0.0]

    def wait(self, values):
        clock[0] += 5
        return list(values)

    def send(self, tensor):
        clock[0] += 1

    monkeypatch.setattr(reductions.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Processes, "largest", wait)
    monkeypatch.setattr(Processes, "add_up", send)
    model = make_adapter()
    reduction = Reduction(model, Stopping(ALONE, Interruption()))
    with reductions.timed_reductions() as found:
        reduction.add_up(torch.zeros(()))
        reduction.add_up(torch.zeros(()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == [StepReduction(1.0, 5.0, 4 * (trained + 1))] * 2
    assert Processes.largest is wait and Processes.add_up is send


def test_the_table_has_the_share_of_a_step_that_the_reduction_takes(capsys):
    job = Job("", "", "chat", "none", "cpu", 8, 512, 1, 2)
    alone = Answer(Times([9.0, 4.0, 2.0, 4.0], moved_bytes=[0, 0, 0, 0]), [], [1.0], 0, 0)
    slow = StepReduction(5.0, 5.0, 1)
    steps = [slow, StepReduction(0.03, 0.5, 1 << 20), StepReduction(0.05, 0.5, 1 << 20)]
    two = Answer(Times([9.0, 2.0, 2.0], moved_bytes=[7, 2 << 20, 2 << 20]), [], [1.0], 0, 0)
    measured = [
        summarize("llmtune", 1, 1, [alone]),
        summarize("llmtune", 2, 1, [Answer(**{**vars(two), "reductions": steps})]),
    ]
    assert measured[0].share is None
    assert measured[1].share == pytest.approx(0.02) and measured[1].reduced_bytes == 1 << 20
    show(job, measured, 1)
    assert " 2.00       2.0          1.0     40.0 ms       2.0%" in capsys.readouterr().out
