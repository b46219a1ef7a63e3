"""The `evaluate` section: which suites, on which arms, how much more, and how sure it is."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from llmtune.schema import Section

Extent = Literal["none", "quick", "full"]
EXTENTS: tuple[Extent, ...] = ("none", "quick", "full")

MEASURED_FROM: dict[str, Extent] = {
    "divergence": "quick",
    "stops": "quick",
    "contamination": "quick",
    "few_shot": "full",
    "probe": "full",
    "shift": "full",
    "memorisation": "full",
}
"""The smallest extent that makes each measurement where its own key leaves it to the extent."""

DIAGNOSES = tuple(name for name in MEASURED_FROM if name != "few_shot")
"""The measurements that leave a file `diagnostics/NAME.json`."""

STRENGTHS: dict[Extent, tuple[float, ...]] = {
    "none": (),
    "quick": (0.5,),
    "full": (0.25, 0.5, 0.75),
}
Toggle = bool | None
BY_EXTENT = "null leaves it to `extent`."


class FewShotConfig(Section):
    """The base with worked examples from the training data before every question."""

    measure: Toggle = Field(default=None, description=f"Whether it is measured; {BY_EXTENT}")
    shots: int = Field(
        default=8, ge=1, description="Examples at most; fewer where the context ends."
    )
    draws: int = Field(default=3, ge=1, le=20, description="Times other examples are drawn.")
    seed: int = Field(default=0, ge=0, description="Seed of the draws.")
    limit: int | None = Field(
        default=300, ge=1, description="Items per suite at most; null takes all."
    )


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
    extent: Extent = Field(
        default="quick",
        description="Beside the arms: nothing, what costs little, or all that is cheap to redo.",
    )
    few_shot: FewShotConfig = FewShotConfig()
    prompts: dict[str, Path] = Field(
        default={},
        description="Your own prompts: a name and a Jinja file around {{ prompt }}.",
    )
    predictions: dict[str, Path] = Field(
        default={},
        description="Another model's answers: a name and a JSONL file of {id, prediction}.",
    )
    strengths: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        default=None, description=f"Shares of the adapter to measure; {BY_EXTENT}"
    )
    probe: Toggle = Field(
        default=None, description=f"A linear probe on the frozen base's states; {BY_EXTENT}"
    )
    divergence: Toggle = Field(
        default=None, description=f"KL and changed first choices against the base; {BY_EXTENT}"
    )
    stops: Toggle = Field(default=None, description=f"Whether answers still end; {BY_EXTENT}")
    contamination: Toggle = Field(
        default=None, description=f"Train rows among the suites' items; {BY_EXTENT}"
    )
    shift: Toggle = Field(
        default=None, description=f"How far train, evaluation and general text lie; {BY_EXTENT}"
    )
    memorisation: Toggle = Field(
        default=None, description=f"Whether train rows are told from held-out ones; {BY_EXTENT}"
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

    @field_validator("prompts", "predictions")
    @classmethod
    def _require_plain_names(cls, files: dict[str, Path]) -> dict[str, Path]:
        for name in files:
            if not re.fullmatch(r"\w[\w-]*", name):
                raise ValueError(f"{name!r} cannot name results: letters, digits, `_` and `-`")
        return files

    @field_validator("strengths")
    @classmethod
    def _require_different(cls, strengths: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if strengths is not None and len(set(strengths)) != len(strengths):
            raise ValueError("name each strength once")
        return strengths

    def measures(self, name: str) -> bool:
        """Return whether one of MEASURED_FROM is made: by its own key, else by the extent."""
        chosen = self.few_shot.measure if name == "few_shot" else getattr(self, name)
        if chosen is not None:
            return chosen
        return EXTENTS.index(self.extent) >= EXTENTS.index(MEASURED_FROM[name])

    def measuring_knobs(self) -> dict[str, Any]:
        """Return as JSON what decides the numbers, but for the extent and contents of files."""
        return self.model_dump(mode="json", exclude={"extent", "bootstrap_samples", "token_budget"})

    @property
    def measured_strengths(self) -> tuple[float, ...]:
        """The strengths that are measured, smallest first."""
        chosen = STRENGTHS[self.extent] if self.strengths is None else self.strengths
        return tuple(sorted(chosen))
