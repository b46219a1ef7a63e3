"""The knobs of the merge."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from llmtune.schema import Section

MergeBase = Literal["original", "dequantized", "auto"]
MERGE_BASES: tuple[MergeBase, ...] = ("original", "dequantized", "auto")
MERGE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class MergeSettings:
    """What may be asked of one merge and is no property of a run."""

    dtype: str | None = None
    """float32, float16 or bfloat16 for the merged weights; None is the base's own."""
    device: str = "cpu"
    """Where the sum is computed: cpu, cuda, or one GPU such as cuda:1."""


class MergeConfig(Section):
    """How the adapter is added into its base model."""

    base: MergeBase = "original"
    """The weights the adapter is added to. `original`: the base checkpoint as it lies on disk.
    `dequantized`: the same, but the weights that were quantized for training are taken as the
    quantized model computes with them. `auto`: both are merged and compared with the live
    quantized model and its adapter on held-out rows, and the closer one is kept."""

    strength: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How much of the adapter is added: 1 is all of it, 0 gives the base back."""

    max_kl: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    """Largest KL(base + adapter || merged), in nats per token, with which a merge is kept.
    Rounding the sum to 16 bits alone costs about 0.01 on a 135M model and less on larger ones."""
