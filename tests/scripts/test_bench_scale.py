"""The benchmark of several processes: what it counts, and what it says of it."""

import sys
import time
from pathlib import Path

import pytest
import torch

from llmtune.io.stopping import Interruption
from llmtune.training.reduction import Reduction, Stopping
from tests.processes import call_in_processes
from tests.training.tiny_runs import make_adapter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from bench_arms.job import Answer, Job, StepReduction
from bench_arms.reductions import timed_reductions
from bench_scale import show, summarize


def test_a_reduction_is_timed_without_the_wait_for_the_slower_process(tmp_path):
    def reduce_once(processes):
        model = make_adapter()
        reduction = Reduction(model, Stopping(processes, Interruption()))
        with processes.connected("cpu"), timed_reductions() as found:
            processes.meet()
            time.sleep(0.5 * processes.rank)
            reduction.add_up(torch.zeros(()))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return trained, found

    (trained, (first,)), (_, (second,)) = call_in_processes(tmp_path, 2, reduce_once)
    assert first.num_bytes == second.num_bytes == 4 * (trained + 1)
    assert first.waiting_seconds > 0.4 > first.seconds
    assert Reduction.add_up.__qualname__ == "Reduction.add_up"


def test_the_table_has_the_share_of_a_step_that_the_reduction_takes(capsys):
    job = Job("", "", "chat", "none", "cpu", 8, 512, 1, 2)
    alone = Answer([9.0, 4.0, 2.0, 4.0], [], [1.0], 0, 0, moved_bytes=[0, 0, 0, 0])
    slow = StepReduction(5.0, 5.0, 1)
    steps = [slow, StepReduction(0.03, 0.5, 1 << 20), StepReduction(0.05, 0.5, 1 << 20)]
    two = Answer([9.0, 2.0, 2.0], [], [1.0], 0, 0, moved_bytes=[7, 2 << 20, 2 << 20])
    measured = [
        summarize("llmtune", 1, 1, [alone]),
        summarize("llmtune", 2, 1, [Answer(**{**vars(two), "reductions": steps})]),
    ]
    assert measured[0].share is None
    assert measured[1].share == pytest.approx(0.02) and measured[1].reduced_bytes == 1 << 20
    show(job, measured, 1)
    assert " 2.00       2.0          1.0     40.0 ms       2.0%" in capsys.readouterr().out
