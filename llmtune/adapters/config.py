"""The `adapter` section: which method, with which knobs. A new method is one entry here."""

from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from llmtune.adapters.base import Adapter, SavedConfig
from llmtune.adapters.dora import DoraAdapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.rslora import RsLoraAdapter
from llmtune.errors import LlmtuneError

DEFAULT_ADAPTER = LoraAdapter()


def _with_method(section: Any) -> Any:
    """Read a section that names no method as one of the default method."""
    if not isinstance(section, dict):
        return section
    if section.get("method") == "qlora":
        raise ValueError(
            "QLoRA is LoRA over a base that is kept in 4 bits: write adapter.method: "
            f"{DEFAULT_ADAPTER.method}, and choose the 4 bits with model.quantization.method"
        )
    return {"method": DEFAULT_ADAPTER.method, **section}


AdapterConfig = Annotated[
    LoraAdapter | RsLoraAdapter | DoraAdapter,
    Field(discriminator="method"),
    BeforeValidator(_with_method),
]
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
