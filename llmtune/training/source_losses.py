"""The training loss of every source, summed on the device while nothing waits for it."""

from collections.abc import Mapping

import torch


class SourceLosses:
    """Collects each token's loss under its row's source; with one source it does nothing.

    The sums are weighted as the step's loss is, so the sources' means, weighted by their shares,
    make up the loss of the same line of metrics.
    """

    def __init__(self, names: Mapping[int, str], device: torch.device) -> None:
        self._names = dict(names) if len(names) > 1 else {}
        # [loss, weight] by source; float32, because not every device has float64
        self._sums = torch.zeros(2, max(self._names, default=0) + 1, device=device)

    def prepare(self, micro_batch: dict) -> None:
        """Put `token_losses` [N] into the micro-batch, for `summed_loss` to fill."""
        if self._names:
            micro_batch["token_losses"] = torch.zeros_like(micro_batch["target_weights"])

    def add(self, micro_batch: dict) -> None:
        """Add what `summed_loss` left in `token_losses`."""
        if self._names:
            weights = micro_batch["target_weights"]
            values = torch.stack([micro_batch["token_losses"] * weights, weights])
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
