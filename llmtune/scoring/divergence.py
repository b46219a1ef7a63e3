"""How far a tuned model's next-token distributions have moved from its base's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmtune.scoring.batches import (
    adapter_disabled,
    batch_by_length,
    inference,
    model_device,
    pad_rows,
    require_positions,
    rows_budget,
    run_forward,
)

CHUNK_POSITIONS = 128
"""Positions whose float32 distributions over the whole vocabulary are held at once."""


@dataclass(frozen=True)
class Divergence:
    """KL(base || tuned) in nats per token, and the share of equal most likely next tokens."""

    kl: float
    top1_agreement: float
    num_tokens: int


def measure_divergence(
    model: nn.Module, sequences: Sequence[Sequence[int]], *, token_budget: int
) -> Divergence:
    """Compare a PeftModel with itself without the adapter, on every position of `sequences`.

    Args:
        sequences: token ids as the model would read them (BOS included where it has one).
        token_budget: padded tokens in one batch; cut further so that the logits fit in memory.

    Raises:
        LlmtuneError: the model has no adapter, or a sequence exceeds the model's positions.
    """
    require_positions(model, max((len(ids) for ids in sequences), default=0))
    kl, agreements, tokens = 0.0, 0, 0
    with inference(model):
        budget = rows_budget(model, token_budget)
        for indices in batch_by_length([len(ids) for ids in sequences], budget):
            batch = pad_rows([sequences[i] for i in indices], model_device(model), left=False)
            tuned_logits = run_forward(model, batch).logits
            with adapter_disabled(model):
                base_logits = run_forward(model, batch).logits
            mask = batch.attention_mask.bool()
            part = compare_distributions(base_logits, tuned_logits, mask)
            kl, agreements, tokens = kl + part[0], agreements + part[1], tokens + part[2]
    if tokens == 0:
        return Divergence(0.0, 1.0, 0)
    return Divergence(kl / tokens, agreements / tokens, tokens)


def compare_distributions(
    base_logits: torch.Tensor, tuned_logits: torch.Tensor, mask: torch.Tensor
) -> tuple[float, int, int]:
    """Return the sum of KL(base || tuned) in nats, the top-1 agreements and the tokens compared.

    KL at one position is sum_v p_base(v) * (log p_base(v) - log p_tuned(v)), in float32, a few
    positions at a time so that no float32 copy of all logits exists.

    Args:
        base_logits, tuned_logits: [B, T, V].
        mask: [B, T], true where a position counts.
    """
    base, tuned = base_logits[mask], tuned_logits[mask]
    kl, agreements = 0.0, 0
    for start in range(0, len(base), CHUNK_POSITIONS):
        base_part = base[start : start + CHUNK_POSITIONS].float().log_softmax(-1)
        tuned_part = tuned[start : start + CHUNK_POSITIONS].float().log_softmax(-1)
        kl += nn.functional.kl_div(tuned_part, base_part, reduction="sum", log_target=True).item()
        agreements += int((base_part.argmax(-1) == tuned_part.argmax(-1)).sum())
    return kl, agreements, len(base)
