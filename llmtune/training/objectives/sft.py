"""Supervised fine-tuning: the cross-entropy of the tokens that the rows mark as trained."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from llmtune.training.objectives.base import MicroBatch, Objective, OpenSums

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor

    from llmtune.training.loss import LossPath


class SftObjective(Objective):
    """The mean cross-entropy of the trained tokens."""

    method: Literal["sft"] = "sft"

    def loss(self, model: "PeftModel", micro_batch: MicroBatch, loss_path: "LossPath") -> "Tensor":
        """Return the weighted sum of the cross-entropies (nats)."""
        from llmtune.training.loss import summed_loss

        return summed_loss(model, micro_batch, loss_path)

    def metrics(self, sources: Mapping[int, str], device: "torch.device") -> "SourceLosses":
        """Return the loss of every source, if there are several."""
        return SourceLosses(sources, device)


class SourceLosses:
    """Collects each token's loss under its row's source; with one source it does nothing.

    The sums are weighted as the step's loss is, so the sources' means, weighted by their shares,
    make up the loss of the same line of metrics.
    """

    def __init__(self, names: Mapping[int, str], device: "torch.device") -> None:
        import torch

        self._names = dict(names) if len(names) > 1 else {}
        # [loss, weight] by source; float32, because not every device has float64
        self._sums = torch.zeros(2, max(self._names, default=0) + 1, device=device)

    def prepare(self, micro_batch: MicroBatch) -> None:
        """Put `token_losses` [N] into the micro-batch, for `summed_loss` to fill."""
        if self._names:
            weights = micro_batch["target_weights"]
            micro_batch["token_losses"] = weights.new_zeros(weights.shape)

    def add(self, micro_batch: MicroBatch) -> None:
        """Add what `summed_loss` left in `token_losses`."""
        if self._names:
            weights = micro_batch["target_weights"]
            values = weights.new_empty(2, len(weights))
            values[0] = micro_batch["token_losses"] * weights
            values[1] = weights
            self._sums.index_add_(1, micro_batch["target_sources"], values)

    def take(self) -> dict[str, float]:
        """Return `loss/<source>`, the mean since the last call (nats/token), and begin again.

        A source of which no row was seen is left out. This waits for the device.
        """
        if not self._names:
            return {}
        losses, weights = self._sums.tolist()
        self._sums.zero_()
        return {
            f"loss/{name}": losses[index] / weights[index]
            for index, name in self._names.items()
            if weights[index] > 0
        }

    def open_sums(self) -> OpenSums:
        """Return the sums since `take`."""
        sums: OpenSums = self._sums.tolist()
        return sums

    def restore(self, sums: OpenSums) -> None:
        """Continue from these sums."""
        self._sums.copy_(self._sums.new_tensor(sums))
