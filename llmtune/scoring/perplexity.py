"""Negative log-likelihood of passages in fixed windows, summed so that averages weigh by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from llmtune.adapters.fused import fused_inference
from llmtune.scoring.batches import (
    batch_by_length,
    inference,
    length_switch,
    model_device,
    pad_rows,
    require_positions,
    rows_budget,
    run_forward,
)
from llmtune.scoring.requests import cut_windows, encode_passage

TILE_POSITIONS = 32
"""Positions whose float32 logits exist at once on a CPU: what its cache holds."""


@dataclass(frozen=True)
class TextScore:
    """Sum of -log p in nats over `num_tokens` predicted tokens, `num_bytes` of UTF-8."""

    negative_log_likelihood: float
    num_tokens: int
    num_bytes: int


def score_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    max_length: int,
    token_budget: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[TextScore]:
    """Score whole texts; every token is predicted exactly once.

    A text is cut into windows of `max_length` tokens. Where the tokenizer puts a BOS before a text
    (as in pretraining), every window begins with it; where it does not, the first token of a text
    is context only and later windows begin with the last token of the window before.

    Args:
        max_length: tokens in one window, context token included; at least 2.
        token_budget: padded tokens in one batch; cut further so that all logits fit in memory.
        on_progress: called with the number of windows' texts finished so far.

    Raises:
        LlmtuneError: `max_length` exceeds the model's positions.
    """
    assert max_length >= 2
    passages = [encode_passage(tokenizer, text) for text in texts]
    windows = [
        (index, window)
        for index, passage in enumerate(passages)
        for window in cut_windows(passage, max_length)
    ]
    require_positions(model, max((len(ids) for _, ids in windows), default=0))
    sums = [0.0] * len(texts)
    waiting = [sum(1 for i, _ in windows if i == index) for index in range(len(texts))]
    with inference(model), fused_inference(model):
        budget = rows_budget(model, token_budget)
        lengths = [len(ids) for _, ids in windows]
        for batch in batch_by_length(lengths, budget, switch=length_switch(model)):
            losses = _window_losses(model, [windows[place][1] for place in batch])
            for place, loss in zip(batch, losses, strict=True):
                sums[windows[place][0]] += loss
                waiting[windows[place][0]] -= 1
            if on_progress is not None:
                on_progress(waiting.count(0))
    return [
        TextScore(total, max(0, len(passage.token_ids) - 1), passage.num_bytes)
        for total, passage in zip(sums, passages, strict=True)
    ]


def _window_losses(model: nn.Module, windows: Sequence[tuple[int, ...]]) -> list[float]:
    batch = pad_rows(windows, model_device(model), left=False)
    logits = run_forward(model, batch).logits
    losses = []
    for row, ids in enumerate(windows):
        targets = torch.tensor(ids[1:], device=logits.device)
        rows = TILE_POSITIONS if logits.device.type == "cpu" else max(1, len(targets))
        tiles = zip(logits[row, : len(targets)].split(rows), targets.split(rows), strict=True)
        losses.append(
            sum(
                nn.functional.cross_entropy(tile.float(), wanted, reduction="sum").item()
                for tile, wanted in tiles
            )
        )
    return losses
