"""The course of the learning rate over a run."""

import math
from typing import Literal


def learning_rate_factor(
    schedule: Literal["cosine", "linear", "constant"],
    step: int,
    warmup_steps: int,
    total_steps: int,
) -> float:
    """Return the share of the peak learning rate that the step after `step` steps uses.

    The warm-up starts at 1 / (warmup_steps + 1), not at 0: no step is wasted. After it the rate
    stays, or falls on a line or half a cosine that would reach 0 right after the last step.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
