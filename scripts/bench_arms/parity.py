"""The gate before any time is printed: does llmtune compute what stock training computes?"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

LARGEST_ERROR_RATIO = 1.25
LARGEST_LOSS_DIFFERENCE = 2e-3


@dataclass(frozen=True)
class Parity:
    """How far an arm is from stock.

    A tensor's gradient error is ||g - g_fp32|| / ||g_fp32||, its gradients of several batches laid
    end to end: in 16 bits a single batch's error is mostly chance in the first layers. Errors are
    given as a share of the stock arm's own. Loss differences are of the steps, in nats a token.
    """

    error_ratio: float
    """The largest over all adapter tensors."""
    median_error_ratio: float
    loss_difference: float
    """The median over the steps."""
    largest_loss_difference: float

    @property
    def holds(self) -> bool:
        return (
            self.error_ratio <= LARGEST_ERROR_RATIO
            and self.loss_difference <= LARGEST_LOSS_DIFFERENCE
        )

    def describe(self) -> str:
        return (
            f"{'holds' if self.holds else 'BROKEN'}: gradient errors at most "
            f"{self.error_ratio:.2f} of stock's (median {self.median_error_ratio:.2f}), losses "
            f"differ by {self.loss_difference:.1e} (largest {self.largest_loss_difference:.1e})"
        )


def compare_losses(arm: Sequence[float], stock: Sequence[float]) -> tuple[float, float]:
    """Return the median and the largest difference between two arms' step losses."""
    differences = [abs(one - other) for one, other in zip(arm, stock, strict=True)]
    return statistics.median(differences), max(differences)


def compare_gradients(arm: Path, stock: Path, reference: Path) -> dict[str, float]:
    """Return, for every adapter tensor, the arm's gradient error as a share of stock's."""
    exact = load_file(reference)
    errors, stock_errors = (_squared_errors(load_file(file), exact) for file in (arm, stock))
    return {name: (errors[name] / max(stock_errors[name], 1e-30)) ** 0.5 for name in stock_errors}


def _squared_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Sum over the batches; the files' names are `BATCH NAME`."""
    errors: dict[str, float] = defaultdict(float)
    for name, wanted in exact.items():
        errors[name.split(" ", 1)[1]] += (found[name] - wanted).square().sum().item()
    return errors
