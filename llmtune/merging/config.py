"""The knobs of the merge."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from llmtune.schema import Section

MergeBase = Literal["original", "dequantized", "auto"]
MERGE_BASES: tuple[MergeBase, ...] = ("original", "dequantized", "auto")
MERGE_DTYPES = ("float32", "float16", "bfloat16")
FORMAT_WISHES = frozenset({"format", "quantization", "quantize", "save_method", "bits"})
"""Keys with which other tools ask for a merged model that is quantized."""


@dataclass(frozen=True)
class MergeSettings:
    """What may be asked of one merge and is not a property of a run."""

    dtype: str | None = None
    """float32, float16 or bfloat16 for the merged weights; None is the base's own."""
    device: str = "cpu"
    """Where the sum is computed: cpu, cuda, or one GPU such as cuda:1."""


NO_SETTINGS = MergeSettings()
"""Nothing is asked for beyond the run's own config."""

Method = Literal["linear", "cat", "ties", "dare", "svd"]
METHODS: tuple[Method, ...] = ("linear", "cat", "ties", "dare", "svd")
DENSE_METHODS = frozenset({"ties", "dare", "svd"})
"""Methods that see a whole delta at once; the others are sums of low-rank products."""


@dataclass(frozen=True)
class Combination:
    """How several deltas become one.

    `linear` and `cat` are the weighted sum; as an adapter both are its exact form, of the summed
    rank.
    """

    method: Method = "linear"
    density: float = 0.5
    """ties and dare: the share of a delta's numbers that is kept, above 0 and at most 1."""
    rank: int | None = None
    """svd: the rank of the result."""
    seed: int = 0
    """dare: what the random choice depends on, with the tensor's name."""

    @property
    def is_dense(self) -> bool:
        """Whether whole deltas are needed."""
        return self.method in DENSE_METHODS


class MergeConfig(Section):
    """How the adapter is added into its base model."""

    base: MergeBase = "original"
    """The weights the adapter is added to. `original`: the base checkpoint as it is on disk.
    `dequantized`: the same, but the weights that were quantized for training are taken as the
    quantized model computes with them. `auto`: both are merged and compared with the live
    quantized model and its adapter on held-out rows, and the closer one is kept."""

    strength: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How much of the adapter is added: 1 is all of it, 0 gives the base back."""

    max_kl: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    """Largest KL(base + adapter || merged), in nats per token, with which a merge is kept.
    Rounding the sum to 16 bits alone costs about 0.01 on a 135M model and less on larger ones."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_formats(cls, values: Any) -> Any:
        wished = FORMAT_WISHES & values.keys() if isinstance(values, dict) else ()
        if wished:
            raise ValueError(
                f"{', '.join(sorted(wished))}: a merged model is written in 16 or 32 bits (llmtune "
                "merge RUN --dtype), never back into a quantized format, which would round "
                "every weight again (docs/bases.md); for fewer bits export what was merged: "
                "llmtune export --help"
            )
        return values
