"""rsLoRA (arXiv:2312.03732): scaling = alpha / sqrt(rank), which keeps high ranks learning."""

from typing import Literal

from llmtune.adapters.base import LowRankAdapter


class RsLoraAdapter(LowRankAdapter):
    """Rank-stabilized LoRA."""

    method: Literal["rslora"] = "rslora"

    def scaling(self, rank: int, alpha: float) -> float:
        """Return alpha / sqrt(rank)."""
        return alpha / rank**0.5

    def _peft_method(self) -> dict[str, bool]:
        return {"use_rslora": True}
