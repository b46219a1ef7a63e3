"""The `adapter` section: which method, with which knobs. A new method is one entry here."""

from typing import Annotated

from pydantic import Field

from llmtune.adapters.dora import DoraAdapter
from llmtune.adapters.lora import LoraAdapter
from llmtune.adapters.rslora import RsLoraAdapter

AdapterConfig = Annotated[LoraAdapter | RsLoraAdapter | DoraAdapter, Field(discriminator="method")]
