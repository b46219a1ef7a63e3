"""Whether a model's positions see those after them, as no causal language model's do."""

from collections.abc import Sequence

from torch import nn

from llmtune.scoring.batches import inference, model_device, pad_rows, run_forward, vocabulary_size

MAX_SHARE = 0.05
"""Of what the last token changes at its own position: rounding changes earlier ones by less."""


def sees_later_tokens(model: nn.Module, input_ids: Sequence[int]) -> bool:
    """Change the last token, and return whether the logits of earlier positions change with it.

    A single token has no earlier position: False.
    """
    *before, last = input_ids
    if not before:
        return False
    rows = [[*before, last], [*before, (last + 1) % vocabulary_size(model)]]
    device = model_device(model)
    with inference(model):
        one, other = (
            run_forward(model, pad_rows([ids], device, left=False)).logits[0].float()
            for ids in rows
        )
    changed = (one - other).square().mean(dim=-1).sqrt()
    return bool(changed[:-1].max() > MAX_SHARE * changed[-1])
