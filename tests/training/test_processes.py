"""Several processes train what one does: the same gradients, adapter, losses and evaluations."""

import json
import os
import signal
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch

from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.io.processes import ALONE
from llmtune.io.stopping import Interruption
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.load import load_model
from llmtune.training.grouping import deal_rows
from llmtune.training.protect.config import ProtectConfig
from llmtune.training.protect.penalties import ProtectionRequest
from llmtune.training.reduction import Reduction, Stopping
from llmtune.training.rows import name_sources
from llmtune.training.setup import add_protection, set_up
from llmtune.training.step import TrainingStep
from llmtune.training.train import train_adapter
from tests.processes import call_in_processes
from tests.tiny import make_model
from tests.training.fused.test_sharing import make_shared_rows
from tests.training.tiny_runs import (
    adapter_weights,
    add_lora,
    largest_difference,
    make_adapter,
    make_config,
    make_request,
    make_rows,
)

KL = {"kl_to_base": {"weight": 2.0, "rows": 3, "max_length": 32}, "l2": 0.01}
STEPS: dict[str, tuple[dict, dict, range]] = {
    # name -> (knobs of the training, changes of the request, rows of the step)
    "packed": ({}, {}, range(8)),
    "padded, two by two": ({"micro_batch_size": 2}, {"packing": "off"}, range(8)),
    "a process without rows": ({}, {}, range(1)),
    "noise": ({"neftune_alpha": 5.0}, {}, range(8)),
    "shared beginnings": ({}, {"train": make_shared_rows(8)}, range(8)),
    "penalties": ({}, {"protection": KL}, range(17, 20)),
    "4-bit": ({}, {"base": "nf4"}, range(8)),
    "16 bits": ({}, {"base": "bf16"}, range(8)),
}
NOISE = {"16 bits": 1e-2}
"""Of a gradient, in parts of the largest: sums in bfloat16 depend on which rows go together."""
IN_THREE = ("packed", "a process without rows", "penalties")
RUN = {
    "max_steps": 30,
    "eval_every": 5,
    "save_every": 9,
    "early_stopping": {"patience": 2, "min_delta": 0.4},
}
TIMED = ("tokens_per_second", "seconds", "peak_bytes", "eval_seconds")


def make_weighted_rows(count, seed=0):
    """Return rows of unequal lengths and weights from two sources."""
    return [
        replace(row, weight=0.5 + (row.line % 3), source_index=row.line % 2)
        for row in make_rows(count, seed=seed)
    ]


def shaken(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def load_nf4(directory):
    config = ModelConfig.model_validate(
        {"base": str(directory), "quantization": {"method": "nf4"}, "dtype": "float32"}
    )
    return add_lora(load_model(config, Checkpoint.open(directory)).model)


def take_step(case, directory, processes):
    """Return the gradients, the loss and the metrics of one step."""
    knobs, changes, rows = STEPS[case]
    changes = {"train": make_weighted_rows(20), "processes": processes} | changes
    if "protection" in changes:
        held = make_rows(5, seed=9)
        protect = ProtectConfig.model_validate(changes["protection"])
        changes["protection"] = ProtectionRequest(protect, held)
    base = changes.pop("base", None)
    if base == "nf4":
        model = load_nf4(directory.parent / "base")
    else:
        model = make_adapter(dtype=torch.bfloat16 if base == "bf16" else torch.float32)
    request = make_request(shaken(model), directory / "run", **changes)
    stopping = Stopping(processes, Interruption())
    with ExitStack() as stack:
        setup = add_protection(set_up(make_config(**knobs), request, stack), request)
        reduction = Reduction(model, stopping) if processes.are_many else None
        step = TrainingStep(setup, name_sources(request.train), processes, reduction)
        inputs = setup.collator([{"row": row} for row in rows])
        loss = step.run(inputs, 0, lambda one: one.backward(), loss_scale=1.0)
        metrics = step.take_metrics()
        assert len(rows) == sum(map(len, inputs["rows"]))
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    counts = (inputs["tokens"], inputs["trained_tokens"], setup.choices["shared beginnings"])
    return found, loss.item(), metrics, counts


@contextmanager
def stopped_before(step):
    """Have training hear a signal before a step; it ends after it, with a checkpoint."""
    run = TrainingStep.run

    def run_or_stop(self, inputs, steps_done, *rest, **options):
        if steps_done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, inputs, steps_done, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "run", run_or_stop)
        yield


def train_run(directory, processes, name="run"):
    model = make_adapter()
    request = make_request(
        model,
        directory / name,
        train=make_weighted_rows(20),
        evaluation=make_weighted_rows(5, seed=4),
        processes=processes,
    )
    result = train_adapter(make_config(batch_size=6, **RUN), request)
    return result, adapter_weights(model)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What two processes, three (the last ones) and one make of the same cases."""
    directory = tmp_path_factory.mktemp("processes")
    make_model("llama", directory / "base")
    load_nf4(directory / "base")  # the others find it quantized, as in a run

    def everything(processes):
        where = directory / str(processes.world_size)
        where.mkdir(exist_ok=True)
        with processes.connected("cpu"):
            steps = {case: take_step(case, where, processes) for case in STEPS}
        run = train_run(where, processes)
        if processes.are_many:
            with stopped_before(7), pytest.raises(RunInterrupted, match="after step 7"):
                train_run(where, processes, "stopped")
            continued = train_run(where, processes, "stopped")
            assert largest_difference(continued[1], run[1]) == 0, "not the same bits"
        with pytest.raises(LlmtuneError, match="dropout draws different") as refused:
            if processes.are_many:
                train_adapter(
                    make_config(),
                    make_request(make_adapter(dropout=0.1), where / "d", processes=processes),
                )
            raise LlmtuneError("dropout draws different numbers")
        assert "train in one process" in str(refused.value) or not processes.are_many
        return steps, run

    def some(processes):
        (directory / "3").mkdir(exist_ok=True)
        with processes.connected("cpu"):
            steps = {case: take_step(case, directory / "3", processes) for case in IN_THREE}
        return steps, train_run(directory / "3", processes)

    several = [*call_in_processes(directory, 2, everything), *call_in_processes(directory, 3, some)]
    return directory, several, everything(ALONE)


@pytest.mark.parametrize("case", STEPS)
def test_a_step_has_the_gradients_and_the_loss_of_one_process(both, case):
    _, several, alone = both
    wanted, loss, metrics, counts = alone[0][case]
    size = max(gradient.abs().max().item() for gradient in wanted.values())
    noise = NOISE.get(case, 1e-6)
    same = [each[0][case] for each in several if case in each[0]]
    assert len(same) == (5 if case in IN_THREE else 2)
    for found, found_loss, found_metrics, found_counts in same:
        assert largest_difference(found, wanted) <= noise * max(size, 1)
        assert found_loss == pytest.approx(loss, rel=noise)
        assert found_metrics == pytest.approx(metrics, rel=max(noise, 1e-5))
        assert found_counts == counts
    # every process has the very same ones
    assert largest_difference(same[0][0], same[1][0]) == 0
    assert largest_difference(same[-1][0], same[-2][0]) == 0


def test_a_run_ends_with_the_adapter_and_the_metrics_of_one_process(both):
    directory, several, alone = both
    result, weights = alone[1]
    assert result.stopped_by == "early_stopping"
    assert result.steps > 10
    for found, found_weights in (each[1] for each in several):
        assert largest_difference(found_weights, weights) < 1e-5
        for field in ("steps", "tokens", "trained_tokens", "stopped_by", "best_checkpoint"):
            assert getattr(found, field) == getattr(result, field)
    assert largest_difference(several[0][1][1], several[1][1][1]) == 0
    lines = [
        [
            {k: v for k, v in json.loads(line).items() if k not in TIMED}
            for line in (directory / count / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        for count in "123"
    ]
    for one, two, three in zip(*lines, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
        assert one == pytest.approx(three, rel=1e-4)


def test_weights_that_differ_in_their_order_alone_are_noticed(tmp_path):
    def compare(processes):
        reduction = Reduction(shaken(make_adapter()), Stopping(processes, Interruption()))
        with processes.connected("cpu"):
            reduction.require_equal(3)
            weight = reduction._trained[1].data
            weight.copy_(weight.roll(processes.rank))
            with pytest.raises(LlmtuneError, match="after step 3 the processes have different"):
                reduction.require_equal(3)

    call_in_processes(tmp_path, 2, compare)


def test_rows_are_dealt_out_by_tokens_and_stay_with_those_they_begin_like():
    rows = make_shared_rows(8)
    for by_beginning in (False, True):
        dealt = deal_rows(rows, 3, by_beginning=by_beginning)
        assert sorted(index for share in dealt for index in share) == list(range(8))
        tokens = [sum(len(rows[index].input_ids) for index in share) for share in dealt]
        assert max(tokens) - min(tokens) <= 2 * max(len(row.input_ids) for row in rows)
    assert deal_rows(rows[:1], 3, by_beginning=False) == [[0], [], []]
