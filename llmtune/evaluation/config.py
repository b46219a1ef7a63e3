"""The `evaluate` section: which suites, on which arms, how much more, and how sure it is."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model, field_validator, model_validator

from llmtune.evaluation.diagnosis.base import EXTENTS, Extent
from llmtune.evaluation.diagnosis.config import DIAGNOSES
from llmtune.evaluation.endpoint import EndpointConfig
from llmtune.evaluation.main_arms import MAIN_ARMS, MainArm
from llmtune.evaluation.tasks.base import ABILITIES, Ability
from llmtune.io.fingerprint import JsonObject
from llmtune.schema import Section

MEASURED_FROM: dict[str, Extent] = {
    "few_shot": "full",
    **{each.name: each.extent for each in DIAGNOSES if each.extent is not None},
}
"""The smallest extent that makes each measurement if its own key leaves it to the extent."""

STRENGTHS: dict[Extent, tuple[float, ...]] = {
    "none": (),
    "quick": (0.5,),
    "full": (0.25, 0.5, 0.75),
}
NO_NUMBERS = {"extent", "keep", "bootstrap_samples", "token_budget", "reuse_base"}
"""Knobs that change no score."""
Toggle = bool | None
Named = TypeVar("Named", bound=Mapping[str, object])
BY_EXTENT = "null leaves it to `extent`."


class FewShotConfig(Section):
    """The base with worked examples from the training data before every question."""

    measure: Toggle = None
    """Whether it is measured; null leaves it to `extent`."""
    shots: int = Field(default=8, ge=1)
    """Examples at most; fewer if the context ends."""
    draws: int = Field(default=3, ge=1, le=20)
    """Times other examples are drawn."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""
    limit: int | None = Field(default=300, ge=1)
    """Items per suite at most; null takes all."""


class _Arms(Section):
    """The suites, and the arms that are scored on them."""

    suites: tuple[str, ...] = ()
    """Suite files, or names of suites that ship with llmtune (`general`)."""
    arms: tuple[MainArm, ...] = MAIN_ARMS
    """Models to score: the base before quantization, the adapter off, on, and the merged model."""
    keep: tuple[Ability, ...] = ABILITIES
    """What must not be lost in general suites: knowledge, text, chat. The rest is given up."""
    extent: Extent = "quick"
    """Beside the arms: none; quick: cheap diagnostics; full: all of them (slow)."""
    few_shot: FewShotConfig = FewShotConfig()
    prompts: dict[str, Path] = Field(default={})
    """Your own prompts: a name and a Jinja file around {{ prompt }}."""
    predictions: dict[str, Path] = Field(default={})
    """Another model's answers: a name and a JSONL file of {id, prediction}."""
    endpoints: dict[str, EndpointConfig] = Field(default={})
    """Models behind OpenAI-compatible endpoints: a name and where it answers. None by default."""
    strengths: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = None
    """Shares of the adapter to measure; null leaves it to `extent`."""


if TYPE_CHECKING:
    _Measured = _Arms
else:
    _Measured = create_model(
        "_Measured",
        __base__=_Arms,
        **{
            each.name: (Toggle, Field(default=None, description=f"{each.help}; {BY_EXTENT}"))
            for each in DIAGNOSES
            if each.extent is not None
        },
        **{
            each.name: (each.knobs | None, Field(default=None, description=each.help))
            for each in DIAGNOSES
            if each.knobs is not None
        },
    )
"""With one key for each diagnosis that an evaluation can make."""


class EvaluateConfig(_Measured):
    """What is measured after training, always on the same items for every arm."""

    limit: int | None = Field(default=None, ge=1)
    """Items per suite at most (chosen by a seeded shuffle); null takes all."""
    token_budget: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Padded tokens in one scoring batch; auto chooses by the device."""
    reuse_base: bool = True
    """Take over what an earlier run measured of the very same base, items, precision and code, and
    keep what this one measures (in the cache directory). Arms with the adapter are never kept."""
    seed: int = Field(default=0, ge=0)
    """Seed of the item shuffle and the bootstrap."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Probability mass of every interval."""
    bootstrap_samples: int = Field(default=10_000, ge=1000)
    """Resamples of the paired bootstrap, 1,000 at least."""

    @model_validator(mode="before")
    @classmethod
    def _read_former_names(cls, values: Any) -> Any:
        """Take the keys that earlier versions had for diagnoses under other names."""
        if not isinstance(values, dict):
            return values
        now = {each.former_name: each.name for each in DIAGNOSES if each.former_name}
        return {now.get(key, key): value for key, value in values.items()}

    @field_validator("arms")
    @classmethod
    def _require_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        if not arms or len(set(arms)) != len(arms):
            raise ValueError("name at least one arm, each once: " + ", ".join(MAIN_ARMS))
        return arms

    @field_validator("prompts", "predictions", "endpoints")
    @classmethod
    def _require_plain_names(cls, files: Named) -> Named:
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
        """Return whether one is made: by its own key, else by MEASURED_FROM."""
        chosen = self.few_shot.measure if name == "few_shot" else getattr(self, name)
        if name not in MEASURED_FROM:
            return chosen is not None
        if chosen is not None:
            return bool(chosen)
        return EXTENTS.index(self.extent) >= EXTENTS.index(MEASURED_FROM[name])

    def measuring_knobs(self) -> JsonObject:
        """Return as JSON what decides the numbers, but for the extent and contents of files."""
        return self.model_dump(mode="json", exclude=NO_NUMBERS)

    @property
    def measured_strengths(self) -> tuple[float, ...]:
        """The strengths that are measured, smallest first."""
        chosen = STRENGTHS[self.extent] if self.strengths is None else self.strengths
        return tuple(sorted(chosen))
