"""What every objective says itself: its micro-batches, their loss, and what is logged of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmtune.schema import Section

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor

    from llmtune.data.example import Example
    from llmtune.training.loss import LossPath

MicroBatch = dict[str, Any]
"""Tensors of rows that go through the model together: see `training.batch`."""


OpenSums = list[Any]
"""Numbers and lists of numbers, as JSON has them."""


class Tally(Protocol):
    """Sums up an objective's own metrics on the device, without waiting for it."""

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Put into the micro-batch what the loss is to fill."""

    def add(self, micro_batch: MicroBatch) -> None:
        """Add what the loss left in the micro-batch."""

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call by their names, and begin again."""
        ...

    def open_sums(self) -> OpenSums:
        """Return what was added since `take`, for a checkpoint."""
        ...

    def restore(self, sums: OpenSums) -> None:
        """Continue from what `open_sums` returned."""


class Objective(Section):
    """What a training step minimizes.

    The step's loss is the sum of its micro-batches' losses. `target_weights` of a micro-batch
    are divided by their sum over the whole step before `loss` sees them, so an objective that is
    linear in them does not depend on how a step is split.
    """

    method: str  # each objective narrows it to its own name

    def collate(
        self, examples: Sequence["Example"], lay: Callable[[Sequence["Example"]], MicroBatch]
    ) -> MicroBatch:
        """Return one micro-batch of rows.

        Args:
            examples: the rows of the dataset that go together.
            lay: packs or pads rows, with `target_positions`, `targets` and `target_weights` of
                their next tokens (see `training.batch.pack_rows`).
        """
        return lay(examples)

    def loss(self, model: "PeftModel", micro_batch: MicroBatch, loss_path: "LossPath") -> "Tensor":
        """Return the micro-batch's share of the step's loss (see `training.loss` for tools)."""
        raise NotImplementedError

    def metrics(self, sources: Mapping[int, str], device: "torch.device") -> Tally:
        """Return what sums up this objective's metrics; they join each line of `metrics.jsonl`.

        Args:
            sources: `Example.source_index` -> name, of the sources that are trained on.
            device: where the micro-batches are.
        """
        raise NotImplementedError
