"""Wrap a base in peft's model class, and ask a wrapped one for its method."""

import warnings

from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from transformers import PreTrainedModel

from llmtune.adapters.base import Adapter
from llmtune.adapters.config import method_of

# peft reads a property that transformers renamed, and corrects fan_in_fan_out itself if
# Linear and Conv1D are both targets.
UNWANTED = (
    (r".is_gradient_checkpointing. is deprecated", FutureWarning),
    (r"fan_in_fan_out is set to", UserWarning),
)


def attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Return `model` (changed in place) with freshly initialized adapter layers, in float32.

    Raises:
        ValueError: the config's modules are not in the model.
    """
    with warnings.catch_warnings():
        for message, category in UNWANTED:
            warnings.filterwarnings("ignore", message=message, category=category)
        return PeftModelForCausalLM(model, config, autocast_adapter_dtype=True)


def live_method(model: PeftModel) -> type[Adapter]:
    """Return the method of a live model's adapter, or of the first of several.

    Raises:
        LlmtuneError: it is not a method that llmtune has.
    """
    return method_of(next(iter(model.peft_config.values())).to_dict())
