"""Whatever training changes about the model besides its adapter, put back afterwards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn


@contextmanager
def borrowed(model: PeftModel) -> Iterator[None]:
    """Give the model back as it came: forward methods, configs and mode, but not the weights.

    trl replaces the base model's `forward` on the instance, accelerate may wrap the outer one, and
    transformers writes `use_cache` and special tokens into the configs.
    """
    base = model.get_base_model()
    instances: tuple[nn.Module, ...] = (model, base)
    forwards = [instance.__dict__.get("forward") for instance in instances]
    configs = (base.config, base.config.get_text_config())
    settings = [dict(config.__dict__) for config in configs]
    generation_config = copy.deepcopy(base.generation_config)
    was_training = model.training
    try:
        yield
    finally:
        for instance, forward in zip(instances, forwards, strict=True):
            instance.__dict__.pop("forward", None)
            instance.__dict__.pop("_original_forward", None)
            if forward is not None:
                instance.__dict__["forward"] = forward
        for config, setting in zip(configs, settings, strict=True):
            config.__dict__.clear()
            config.__dict__.update(setting)
        base.generation_config = generation_config
        model.train(was_training)
        model.zero_grad(set_to_none=True)
