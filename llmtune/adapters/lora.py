"""LoRA (arXiv:2106.09685): scaling = alpha / rank."""

from typing import Literal

from llmtune.adapters.base import SavedConfig
from llmtune.adapters.low_rank import LowRankAdapter


class LoraAdapter(LowRankAdapter):
    """Low-rank adaptation as first published."""

    method: Literal["lora"] = "lora"

    @classmethod
    def owns(cls, config: SavedConfig) -> bool:
        """Whether it is LoRA and none of its variants."""
        return super().owns(config) and not (config.get("use_rslora") or config.get("use_dora"))
