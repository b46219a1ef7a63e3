"""The knobs that all low-rank adapters share, and the arithmetic a planner needs of them."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import Field

from llmtune.schema import Section

if TYPE_CHECKING:
    from peft import LoraConfig

Number = TypeVar("Number", int, float)


class LowRankAdapter(Section):
    """W + scaling * B A, with A [rank, in] and B [out, rank]; W stays frozen (arXiv:2106.09685)."""

    method: str  # each method narrows it to its own name
    rank: Annotated[int, Field(gt=0)] = 16
    """Rows of A: the width of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Strength of the update before it is divided by (a function of) the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs dropped while training."""
    target_modules: str | list[str] = "all-linear"
    """all-linear (every linear layer but the head, and fused experts), names ([q_proj, v_proj];
    `experts` for fused expert weights), or one regex that matches whole names."""
    layers: Annotated[str, Field(pattern=r"^(all|last-[1-9]\d*)$")] | list[int] = "all"
    """all, the last N as last-N, or layer numbers counted from 0."""
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Another rank for some modules: {name or regex: rank}; the first match counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Another alpha for some modules: {name or regex: alpha}; the first match counts."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained whole beside the adapter and saved with it, such as lm_head."""
    init_from: Path | None = None
    """A saved adapter of the same shape to start from; null starts with no effect (B = 0)."""

    def scaling(self, rank: int, alpha: float) -> float:
        """Return the factor before B A."""
        return alpha / rank

    def rank_of(self, module: str) -> int:
        """Return the rank for the module of this full name."""
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return alpha for the module of this full name."""
        return _first_match(self.alpha_pattern, module, self.alpha)

    def why_no_experts(self) -> str | None:
        """Say why fused expert weights cannot be adapted with these knobs; None if they can."""
        return "they cannot have dropout (adapter.dropout=0)" if self.dropout > 0 else None

    def num_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the trainable parameters for adapted weights {name: shape}.

        A shape is (out, in), or (experts, out, in) for fused experts.
        """
        return sum(
            math.prod(shape[:-2]) * self._parameters_of(self.rank_of(name), *shape[-2:])
            for name, shape in shapes.items()
        )

    def to_peft(
        self,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        *,
        fan_in_fan_out: bool = False,
    ) -> "LoraConfig":
        """Return peft's config for exactly these targets (full names or shared endings).

        Args:
            target_modules: the linear layers that `adapters.targets` chose.
            target_parameters: the fused expert weights it chose.
            fan_in_fan_out: the layers keep their weight as [in, out] (GPT-2's Conv1D).
        """
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(target_modules),
            target_parameters=list(target_parameters) or None,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            modules_to_save=list(self.modules_to_save) or None,
            fan_in_fan_out=fan_in_fan_out,
            bias="none",
            **self._peft_method(),
        )

    def _parameters_of(self, rank: int, num_out: int, num_in: int) -> int:
        return rank * (num_out + num_in)

    def _peft_method(self) -> dict[str, bool]:
        return {}


def matches_pattern(pattern: str, module: str) -> bool:
    """Whether peft applies a rank or alpha pattern to the module: it must match up to the end."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first_match(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    for pattern, value in patterns.items():
        if matches_pattern(pattern, module):
            return value
    return otherwise
