"""The `adapter` section: which method, with which knobs. A new method is one entry here."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field

from llmtune.adapters.adalora import AdaLoraAdapter
from llmtune.adapters.base import Adapter, SavedConfig
from llmtune.adapters.dora import DoraAdapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.other_bases import BoftAdapter, FourierAdapter, OftAdapter
from llmtune.adapters.products import LoHaAdapter, LoKrAdapter, MissAdapter
from llmtune.adapters.rslora import RsLoraAdapter
from llmtune.adapters.vectors import Ia3Adapter, ShiraAdapter, VeraAdapter
from llmtune.adapters.whole_layers import LayersAdapter
from llmtune.errors import LlmtuneError

DEFAULT_ADAPTER = LoraAdapter()


VIRTUAL_TOKENS = (
    "it puts virtual tokens before every text, which no merged model and no GGUF file can hold; "
    "adapter.method: ia3 and lora with rank: 1 are about as small"
)
STARTS = "it is a start of LoRA: write adapter.method: lora and adapter.init: {}"
UNOFFERED: Mapping[str, str] = {
    "qlora": "QLoRA is LoRA over a base that is kept in 4 bits: write adapter.method: lora, and "
    "choose the 4 bits with model.quantization.method",
    "pissa": STARTS.format("pissa"),
    "olora": STARTS.format("olora"),
    "loraplus": "LoRA+ is LoRA with a learning rate of its own for B: write adapter.method: lora "
    "and train.learning_rates: {lora_B: ...}",
    "eva": STARTS.format("eva"),
    "corda": STARTS.format("corda"),
    "loftq": "its factors hold what quantization lost, so they are wrong over any other weights "
    "than the quantized ones; adapter.init: pissa also starts from the weights, over 4 bits too",
    "prompt_tuning": VIRTUAL_TOKENS,
    "prefix_tuning": VIRTUAL_TOKENS,
    "p_tuning": VIRTUAL_TOKENS,
}
"""Methods that people look for, and what to use in their place."""


def _with_method(section: Any) -> Any:
    """Read a section that names no method as one of the default method."""
    if not isinstance(section, dict):
        return section
    advice = UNOFFERED.get(str(section.get("method")).lower())
    if advice is not None:
        raise ValueError(f"method={section['method']}: {advice}")
    return {"method": DEFAULT_ADAPTER.method, **section}


AdapterConfig = Annotated[
    LoraAdapter
    | RsLoraAdapter
    | DoraAdapter
    | Ia3Adapter
    | LoHaAdapter
    | LoKrAdapter
    | VeraAdapter
    | OftAdapter
    | BoftAdapter
    | MissAdapter
    | FourierAdapter
    | ShiraAdapter
    | AdaLoraAdapter
    | LayersAdapter,
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
