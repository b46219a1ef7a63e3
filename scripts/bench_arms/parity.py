"""The gate before any time is printed: does llmtune compute what stock training computes?"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

LARGEST_ERROR_RATIO = 1.25
TOKEN_NOISE = 2**-4
"""Nats, for one token's loss: half a step of bfloat16 between 16 and 32, the most by which it
rounds a logit of that size. Measured over SmolLM2-135M: 0.0085 of 32 tokens, as if 0.05 of one.
Losses of tokens are nats apart, so one that is missing in each row shows."""
USUAL_TRAINED_TOKENS = 960
"""In a step of the chat mix; what is rounded alike in all tokens is not averaged away by more."""
SMALLEST_ERROR = 1e-30
"""Stands for an error of nothing, so that a share can be taken."""


@dataclass(frozen=True)
class Parity:
    """How far an arm is from stock.

    A tensor's gradient error is ||g - g_fp32|| / ||g_fp32||, of each batch as a share of the stock
    arm's own; the geometric mean of the batches' shares counts 8 and 1/8 alike. In 16 bits a single
    share is mostly chance, up to 8 in the first layer on equal ground, so a mean of the errors
    themselves, or gradients laid end to end, would be decided by one batch. Loss differences are of
    the steps, in nats a token.
    """

    error_ratio: float
    """The largest over all adapter tensors."""
    median_error_ratio: float
    loss_difference: float
    """The median over the steps."""
    largest_loss_difference: float
    allowed_loss_difference: float

    @property
    def holds(self) -> bool:
        return (
            self.error_ratio <= LARGEST_ERROR_RATIO
            and self.loss_difference <= self.allowed_loss_difference
        )

    def describe(self) -> str:
        return (
            f"{'holds' if self.holds else 'BROKEN'}: gradient errors at most "
            f"{self.error_ratio:.2f} of stock's (median {self.median_error_ratio:.2f}), losses "
            f"differ by {self.loss_difference:.1e} (allowed {self.allowed_loss_difference:.1e}; "
            f"largest {self.largest_loss_difference:.1e})"
        )


def allowed_loss_difference(trained_tokens: float) -> float:
    """Return by how much the losses of steps of so many trained tokens may differ.

    They are means over tokens that round independently.
    """
    return TOKEN_NOISE / min(trained_tokens, USUAL_TRAINED_TOKENS) ** 0.5  # 0.002 for 960


def compare_losses(arm: Sequence[float], stock: Sequence[float]) -> tuple[float, float]:
    """Return the median and the largest difference between two arms' step losses."""
    differences = [abs(one - other) for one, other in zip(arm, stock, strict=True)]
    return statistics.median(differences), max(differences)


def compare_gradients(arm: Path, stock: Path, reference: Path) -> dict[str, float]:
    """Return, for every adapter tensor, the arm's gradient error as a share of stock's.

    The files' names are `BATCH NAME`.
    """
    exact = load_file(reference)
    errors, stock_errors = (_errors(load_file(file), exact) for file in (arm, stock))
    shares: dict[str, list[float]] = defaultdict(list)
    for batch_and_name, error in errors.items():
        name = batch_and_name.split(" ", 1)[1]
        shares[name].append(error / stock_errors[batch_and_name])
    return {name: statistics.geometric_mean(of_batches) for name, of_batches in shares.items()}


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Absolute errors: in a share of the same batch's, the gradient's size cancels."""
    return {
        name: max((found[name] - wanted).norm().item(), SMALLEST_ERROR)
        for name, wanted in exact.items()
    }
