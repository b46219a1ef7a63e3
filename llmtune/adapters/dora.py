"""DoRA (arXiv:2402.09353): LoRA on the direction of each weight row, and its length trained too."""

from typing import Literal

from llmtune.adapters.base import LowRankAdapter


class DoraAdapter(LowRankAdapter):
    """Weight-decomposed LoRA: W' = m * (W + scaling * B A) / ||W + scaling * B A||, by rows."""

    method: Literal["dora"] = "dora"

    def why_no_experts(self) -> str | None:
        """DoRA has no form for fused expert weights."""
        return "DoRA cannot adapt them (adapter.method=lora can)"

    def _parameters_of(self, rank: int, num_out: int, num_in: int) -> int:
        return rank * (num_out + num_in) + num_out

    def _peft_method(self) -> dict[str, bool]:
        return {"use_dora": True}
