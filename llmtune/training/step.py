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

from llmtune.training.batch import SMALLEST_WEIGHT, StepRows, move_to
from llmtune.training.objectives.base import OpenSums
from llmtune.training.setup import Setup

REMEMBERED_STEPS = 4
# Rows that evaluation deals with at a time; micro-batches divide them like a training step's.
EVALUATION_ROWS = 64


@dataclass(frozen=True)
class StepRecord:
    """A step that was just done: its rows and losses, one entry a micro-batch."""

    step: int
    rows: list[list[int]]
    losses: list[Tensor]


class TrainingStep:
    """Runs rows through the model: forward and backward to train, forward alone to evaluate.

    The collator splits a step into micro-batches and divides by the step's trained tokens, so the
    result does not depend on how it was split (see `StepCollator`).
    """

    def __init__(self, setup: Setup, sources: Mapping[int, str]) -> None:
        self.setup = setup
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
        losses = []
        for micro_batch in inputs["micro_batches"]:
            micro_batch = move_to(micro_batch, setup.device)
            self._tally.prepare(micro_batch)
            loss = setup.loss(micro_batch)
            self._tally.add(micro_batch)
            backward(loss)
            losses.append(loss.detach())
        if setup.protection is not None:
            setup.protection.add_gradients(steps_done, setup.autocast, scale=loss_scale)
        self.recent.append(StepRecord(steps_done + 1, inputs["rows"], losses))
        return torch.stack(losses).sum()

    def take_metrics(self) -> dict[str, float]:
        """Return what objective and penalties measured since the last call; this waits."""
        protection = self.setup.protection
        return self._tally.take() | ({} if protection is None else protection.take())

    def open_metrics(self) -> dict[str, OpenSums]:
        """Return what `take_metrics` would be made of, as JSON values; this waits."""
        protection = self.setup.protection
        return {
            "objective": self._tally.open_sums(),
            "protection": [] if protection is None else protection.open_sums(),
        }

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
        losses: list[float] = []
        weights: list[float] = []
        tokens = 0
        with torch.no_grad():
            for rows in groups.values():
                result = self._evaluate_rows(rows, is_interrupted)
                if result is None:
                    return None
                losses.append(result.loss / result.weight)
                weights.append(result.weight)
                tokens += result.tokens
        metrics = {
            "eval_loss": sum(map(operator.mul, losses, weights)) / sum(weights),
            "eval_tokens": tokens,
        }
        if len(groups) > 1:
            metrics |= {f"eval_loss/{name}": one for name, one in zip(groups, losses, strict=True)}
        return metrics

    def _evaluate_rows(
        self, rows: Sequence[int], is_interrupted: Callable[[], bool]
    ) -> "_Evaluated | None":
        setup = self.setup
        summed = torch.zeros((), device=setup.device, dtype=torch.float64)
        weight, tokens = 0.0, 0
        for start in range(0, len(rows), EVALUATION_ROWS):
            if is_interrupted():
                return None
            inputs = setup.collator.collate(rows[start : start + EVALUATION_ROWS])
            for micro_batch in inputs["micro_batches"]:
                loss = setup.loss(move_to(micro_batch, setup.device))
                summed += loss.double() * inputs["target_weight"]
            weight += inputs["target_weight"]
            tokens += inputs["trained_tokens"]
        return _Evaluated(summed.item(), max(weight, SMALLEST_WEIGHT), tokens)


class _Evaluated(NamedTuple):
    """The summed loss of some rows, its weight, and the tokens it is over."""

    loss: float
    weight: float
    tokens: int
