"""LoRA (arXiv:2106.09685): scaling = alpha / rank."""

from typing import Literal

from llmtune.adapters.base import LowRankAdapter


class LoraAdapter(LowRankAdapter):
    """Low-rank adaptation as first published."""

    method: Literal["lora"] = "lora"
