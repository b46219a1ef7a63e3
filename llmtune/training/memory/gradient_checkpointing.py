"""Recomputing activations in the backward pass, layer by layer (gradient checkpointing)."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llmtune.errors import LlmtuneError


def recomputable_layers(model: PeftModel) -> list[nn.Module]:
    """Return the layers whose activations can be recomputed, in the order of the forward pass."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def recomputing(model: PeftModel, num_layers: int) -> Iterator[None]:
    """Recompute the activations of the first `num_layers` layers inside.

    transformers 5.23 calls the switch `activation_checkpointing_enable`; before it was
    `gradient_checkpointing_enable`. This is the one place that knows.

    Raises:
        LlmtuneError: the architecture does not offer it.
    """
    if num_layers == 0:
        yield
        return
    base: PreTrainedModel = model.get_base_model()
    layers = recomputable_layers(model)
    if not base.supports_gradient_checkpointing or not layers:
        raise LlmtuneError(
            f"{type(base).__name__} offers no gradient checkpointing: set "
            "train.gradient_checkpointing=false and a smaller train.micro_batch_size"
        )
    options = {"use_reentrant": False}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Not needed without reentrant checkpointing, and it would make the embeddings' output a leaf.
    base.disable_input_require_grads()
    for layer in layers[num_layers:]:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        if hasattr(base, "activation_checkpointing_disable"):
            base.activation_checkpointing_disable()
        else:
            base.gradient_checkpointing_disable()
