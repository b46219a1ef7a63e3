"""Whatever training changes about the model besides its adapter, put back afterwards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel


@contextmanager
def borrowed(model: PeftModel) -> Iterator[None]:
    """Give the model back as it came: forward methods, configs, tags and mode, not the weights.

    trl replaces the base model's `forward` on the instance and tags it, accelerate may wrap the
    outer one, and transformers writes `use_cache` and special tokens into the configs.
    """
    base = model.get_base_model()
    holders = (model, base, base.config, base.config.get_text_config())
    attributes = [_copy_attributes(holder) for holder in holders]
    generation_config = copy.deepcopy(base.generation_config)
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for holder, saved in zip(holders, attributes, strict=True):
            holder.__dict__.clear()
            holder.__dict__.update(saved)
        base.generation_config = generation_config
        for module, is_training in modes:
            module.training = is_training
        model.zero_grad(set_to_none=True)


def _copy_attributes(holder: object) -> dict:
    """Return an object's attributes; lists are copied, because trl appends to them."""
    return {
        name: list(value) if type(value) is list else value
        for name, value in holder.__dict__.items()
    }
