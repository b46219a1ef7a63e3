"""The `adapter` section: which method, with which knobs. A new method is one entry here."""

from typing import Annotated, get_args

from pydantic import Field

from llmtune.adapters.base import Adapter, SavedConfig
from llmtune.adapters.dora import DoraAdapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.rslora import RsLoraAdapter
from llmtune.errors import LlmtuneError

AdapterConfig = Annotated[LoraAdapter | RsLoraAdapter | DoraAdapter, Field(discriminator="method")]

DEFAULT_ADAPTER = LoraAdapter()
METHODS: tuple[type[Adapter], ...] = get_args(get_args(AdapterConfig)[0])


def method_of(config: SavedConfig) -> type[Adapter]:
    """Return the method that describes a saved `adapter_config.json`, whoever wrote it.

    Raises:
        LlmtuneError: no method does.
    """
    for method in METHODS:
        if method.owns(config):
            return method
    kinds = ", ".join(dict.fromkeys(method.PEFT_TYPE for method in METHODS))
    names = ", ".join(method.name() for method in METHODS)
    raise LlmtuneError(
        f"an adapter of type {config.get('peft_type')}; llmtune reads {kinds}. Give an adapter of "
        f"one of the methods {names}"
    )
