"""The decoder of a causal LM, which gives the hidden states that its LM head reads; its widths."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

NAME = "model"
"""Where a few models keep it whose `base_model_prefix` names something they do not have."""


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the text decoder, without the LM head and without what reads images around it."""
    decoder: nn.Module = model.get_decoder()
    if decoder is model:
        decoder = getattr(model, NAME, model)
    return decoder


def config_number(config: PreTrainedConfig, name: str) -> int | None:
    """Return a number of a config, the largest where it varies by layer; None if it has none.

    transformers refuses to give such a number as an attribute.
    """
    said = config.to_dict()
    value = said[name] if name in said else getattr(config, name, None)
    numbers = value if isinstance(value, list | tuple) else [value]
    return max((one for one in numbers if isinstance(one, int)), default=None)


def rotary_switch(config: PreTrainedConfig) -> int | None:
    """Return the length after which all rows of a batch get other rotary frequencies; None if none.

    With `longrope` (Phi-3) one longer row changes every shorter one beside it.
    """
    said = config.to_dict()
    rope = said.get("rope_parameters") or {}
    for section in (rope, *(one for one in rope.values() if isinstance(one, dict))):
        if section.get("rope_type") == "longrope":
            found = said.get("original_max_position_embeddings")
            return found or section.get("original_max_position_embeddings")
    return None
