"""rsLoRA (arXiv:2312.03732): scaling = alpha / sqrt(rank), which keeps high ranks learning."""

import math
from typing import Literal

from llmtune.adapters.base import SavedConfig
from llmtune.adapters.low_rank import LowRankAdapter


class RsLoraAdapter(LowRankAdapter):
    """Rank-stabilized LoRA."""

    method: Literal["rslora"] = "rslora"

    @classmethod
    def scaling(cls, rank: int, alpha: float) -> float:
        """Return alpha / sqrt(rank)."""
        return alpha / math.sqrt(rank)

    @classmethod
    def owns(cls, config: SavedConfig) -> bool:
        """Whether it is LoRA with this scaling."""
        return (
            super().owns(config)
            and bool(config.get("use_rslora"))
            and not bool(config.get("use_dora"))
        )

    def _peft_method(self) -> dict[str, bool]:
        return {"use_rslora": True}
