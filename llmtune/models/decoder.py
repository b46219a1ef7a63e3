"""The decoder of a causal LM: what gives the hidden states that its LM head reads."""

from torch import nn
from transformers import PreTrainedModel

NAME = "model"
"""Where a few models keep it whose `base_model_prefix` names something they do not have."""


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the text decoder, without the LM head and without what reads images around it."""
    decoder: nn.Module = model.get_decoder()
    if decoder is model:
        decoder = getattr(model, NAME, model)
    return decoder
