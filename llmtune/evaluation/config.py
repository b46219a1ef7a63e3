"""The `evaluate` section: which suites, on which arms, and how sure the intervals are."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from llmtune.schema import Section


class EvaluateConfig(Section):
    """What is measured after training, always on the same items for every arm."""

    suites: tuple[str, ...] = Field(
        default=(),
        description="Suite files, or names of suites that ship with llmtune (`general`).",
    )
    arms: tuple[Literal["base", "tuned", "merged"], ...] = Field(
        default=("base", "tuned", "merged"),
        description="Models to score: the adapter off, on, and the merged checkpoint.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Items per suite at most (chosen by a seeded shuffle); null takes all.",
    )
    token_budget: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Padded tokens in one scoring batch; auto chooses by the device.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the item shuffle and the bootstrap.")
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1.0, description="Probability mass of every interval."
    )
    bootstrap_samples: int = Field(
        default=10_000, ge=100, description="Resamples of the paired bootstrap."
    )

    @field_validator("arms")
    @classmethod
    def _require_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        if not arms or len(set(arms)) != len(arms):
            raise ValueError("name at least one arm, each once: base, tuned, merged")
        return arms
