"""What an evaluation will cost, in forward tokens counted beforehand and in minutes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.evaluation.run import ArmPlan
from llmtune.io.manifest import MeasureJson
from llmtune.scoring.batches import inference, model_device, pad_rows, run_forward

TIMED_ROWS, TIMED_TOKENS = 8, 64
"""The rows of the trial that says how fast forward passes are, and their tokens."""


@dataclass(frozen=True)
class MeasureCost:
    """One measure: forward tokens (at most, where text is written), and seconds before and after.

    `seconds` is None until it was measured.
    """

    measure: str
    tokens: int
    estimated_seconds: float
    seconds: float | None = None

    def as_dict(self) -> MeasureJson:
        """Return the fields for JSON."""
        return {
            "measure": self.measure,
            "tokens": self.tokens,
            "estimated_seconds": round(self.estimated_seconds, 3),
            "seconds": None if self.seconds is None else round(self.seconds, 3),
        }


class TokenCounter:
    """Counts the forward tokens of arms on suites; what several arms share is counted once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, int, str], int] = {}

    def count(self, plan: ArmPlan, *, shared_tokens: int = 0) -> int:
        """Return the tokens of one arm on one suite, written ones as many as there may be.

        Args:
            shared_tokens: of demonstrations, which run once for all items.
        """
        prompt = plan.settings.prompt
        key = (plan.suite.name, len(plan.suite.items), prompt.name if prompt else "")
        if key not in self._known:
            suite = prompt.ask(plan.suite) if prompt else plan.suite
            self._known[key] = suite.config.count_tokens(self._tokenizer, suite)
        return self._known[key] + shared_tokens


def tokens_per_second(model: nn.Module) -> float:
    """Return how fast forward passes of this model are here and now, from a short trial."""
    device = model_device(model)
    batch = pad_rows([list(range(TIMED_TOKENS))] * TIMED_ROWS, device, left=False)
    with inference(model):
        for _ in range(2):  # the first pass also warms up
            started = time.perf_counter()
            run_forward(model, batch, logits_to_keep=1)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed = time.perf_counter() - started
    return TIMED_ROWS * TIMED_TOKENS / elapsed


def cost_lines(costs: Sequence[MeasureCost], train_seconds: float | None = None) -> list[str]:
    """Return a small table: what is still to be measured, its tokens, its minutes.

    Args:
        train_seconds: what training took; the total is then also given as a multiple of it.
    """
    if not costs:
        return ["nothing is left to measure"]
    lines = [f"{'measure':<14} {'forward tokens':>14} {'about':>9}"]
    for cost in costs:
        lines.append(_line(cost.measure, cost.tokens, cost.estimated_seconds))
    total = sum(cost.estimated_seconds for cost in costs)
    share = f", {total / train_seconds:.1f} x the training" if train_seconds else ""
    lines.append(_line("in all", sum(cost.tokens for cost in costs), total) + share)
    return lines


def _line(name: str, tokens: int, seconds: float) -> str:
    return f"{name:<14} {tokens:>14,} {seconds / 60:>5.1f} min"
