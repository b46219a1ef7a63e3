"""One step of training from top to bottom: micro-batches, objective, backward, penalties.

trl's trainer feeds it (`trainer.py`): it asks the collator for the rows of a step, calls
`TrainingStep.run`, clips the gradients and lets the optimizer move the weights.
"""

import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmtune.adapters.live import live_method
from llmtune.io.processes import ALONE, Processes
from llmtune.training.batch import SMALLEST_WEIGHT, StepRows, move_to
from llmtune.training.objectives.base import OpenSums
from llmtune.training.reduction import Reduction
from llmtune.training.setup import Setup

REMEMBERED_STEPS = 4
# Rows that evaluation deals with at a time; micro-batches divide them like a training step's.
EVALUATION_ROWS = 64


@dataclass(frozen=True)
class StepRecord:
    """A step that was just done: its rows and losses, one entry a micro-batch.

    With several processes `rows` has one entry more: the others' rows.
    """

    step: int
    rows: list[list[int]]
    losses: list[Tensor]


class TrainingStep:
    """Runs rows through the model: forward and backward to train, forward alone to evaluate.

    The collator splits a step into micro-batches and divides by the step's trained tokens, so the
    result does not depend on how it was split (see `StepCollator`), nor on how many processes have
    a share of it.
    """

    def __init__(
        self,
        setup: Setup,
        sources: Mapping[int, str],
        processes: Processes = ALONE,
        reduction: Reduction | None = None,
    ) -> None:
        """Take the setup and the names of the sources; several processes need a reduction."""
        self.setup = setup
        self._processes = processes
        self._reduction = reduction
        self.recent: deque[StepRecord] = deque(maxlen=REMEMBERED_STEPS)
        self._tally = setup.objective.metrics(sources, setup.device)

    def run(
        self,
        inputs: StepRows,
        steps_done: int,
        backward: Callable[[Tensor], None],
        *,
        loss_scale: float,
    ) -> Tensor:
        """Add a step's gradients; returns its mean loss. Nothing here waits for the device.

        Args:
            inputs: the rows of the step as `StepCollator` returns them.
            steps_done: optimizer steps before this one.
            backward: sends a loss backward, scaled as the precision needs it.
            loss_scale: factor that `backward` puts on a loss.
        """
        setup = self.setup
        if setup.noise is not None:
            setup.noise.step = steps_done + 1
        losses = []
        num_idle = self._num_idle(inputs)
        for micro_batch in inputs["micro_batches"]:
            micro_batch = move_to(micro_batch, setup.device)
            self._tally.prepare(micro_batch)
            loss = setup.loss(micro_batch)
            self._tally.add(micro_batch)
            backward(loss)
            losses.append(loss.detach())
        for _ in range(num_idle):
            assert setup.idle is not None, "asked of sharded bases only"
            backward(setup.loss(setup.idle) * 0)
        if setup.protection is not None:
            setup.protection.add_gradients(steps_done, setup.autocast, scale=loss_scale)
        penalty = live_method(setup.model).penalty(setup.model)
        if penalty is not None and self._processes.is_first:
            (penalty * loss_scale).backward()
        self.recent.append(StepRecord(steps_done + 1, inputs["rows"], losses))
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=setup.device)
        return loss if self._reduction is None else self._reduction.add_up(loss)

    def _num_idle(self, inputs: StepRows) -> int:
        """Return the forward passes of others that this process must join after its own."""
        if self.setup.idle is None:
            return 0
        own = len(inputs["micro_batches"])
        return self._processes.largest([own])[0] - own

    def take_metrics(self) -> dict[str, float]:
        """Return what objective and penalties measured since the last call; this waits."""
        protection = self.setup.protection
        if self._processes.are_many:
            self.restore(self.open_metrics())
        return self._tally.take() | ({} if protection is None else protection.take())

    def open_metrics(self) -> dict[str, OpenSums]:
        """Return what `take_metrics` would be made of, as JSON values; this waits."""
        protection = self.setup.protection
        sums = {
            "objective": self._tally.open_sums(),
            "protection": [] if protection is None else protection.open_sums(),
        }
        if self._reduction is None:
            return sums
        return {name: self._reduction.add_up_sums(each) for name, each in sums.items()}

    def restore(self, metrics: Mapping[str, OpenSums]) -> None:
        """Continue from what `open_metrics` returned."""
        self._tally.restore(metrics["objective"])
        if self.setup.protection is not None:
            self.setup.protection.restore(metrics["protection"])

    def evaluate(
        self, groups: Mapping[str, Sequence[int]], is_interrupted: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Return the mean loss of a trained token, over all rows and by group; None if stopped.

        Args:
            groups: name -> rows, as the collator numbers them.
            is_interrupted: whether to stop after the current rows.
        """
        self.setup.model.eval()
        rank, world_size = self._processes.rank, self._processes.world_size
        results: list[_Evaluated | None] = []
        with torch.no_grad():
            for rows in groups.values():
                is_stopped = None in results
                own = rows[rank::world_size]
                most = len(rows[::world_size])  # what the first process has
                results.append(
                    None if is_stopped else self._evaluate_rows(own, most, is_interrupted)
                )
        stopped, *numbers = self._processes.total(
            [None in results, *(number for result in results for number in result or NOTHING)]
        )
        if stopped:
            return None
        weights = [max(weight, SMALLEST_WEIGHT) for weight in numbers[1::3]]
        losses = [loss / weight for loss, weight in zip(numbers[::3], weights, strict=True)]
        tokens = int(sum(numbers[2::3]))
        metrics = {
            "eval_loss": sum(map(operator.mul, losses, weights)) / sum(weights),
            "eval_tokens": tokens,
        }
        if len(groups) > 1:
            metrics |= {f"eval_loss/{name}": one for name, one in zip(groups, losses, strict=True)}
        return metrics

    def _evaluate_rows(
        self, rows: Sequence[int], most: int, is_interrupted: Callable[[], bool]
    ) -> "_Evaluated | None":
        """Evaluate this process's rows; no process has more than `most`."""
        setup = self.setup
        summed = torch.zeros((), device=setup.device, dtype=torch.float64)
        weight, tokens = 0.0, 0
        for start in range(0, len(rows) if setup.idle is None else most, EVALUATION_ROWS):
            if self._agree(is_interrupted()):
                return None
            inputs = setup.collator.collate(rows[start : start + EVALUATION_ROWS])
            num_idle = self._num_idle(inputs)
            for micro_batch in inputs["micro_batches"]:
                loss = setup.loss(move_to(micro_batch, setup.device))
                summed += loss.double() * inputs["target_weight"]
            for _ in range(num_idle):
                assert setup.idle is not None, "asked of sharded bases only"
                setup.loss(setup.idle)
            weight += inputs["target_weight"]
            tokens += inputs["trained_tokens"]
        return _Evaluated(summed.item(), weight, tokens)

    def _agree(self, is_interrupted: bool) -> bool:
        """Say whether to stop: all at the same place if a forward pass is one of all of them."""
        if self.setup.idle is None:
            return is_interrupted
        return bool(self._processes.largest([is_interrupted])[0])


class _Evaluated(NamedTuple):
    """The summed loss of some rows, its weight, and the tokens it is over."""

    loss: float
    weight: float
    tokens: int


NOTHING = _Evaluated(0.0, 0.0, 0)
