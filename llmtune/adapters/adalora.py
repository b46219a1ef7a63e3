"""AdaLoRA (arXiv:2303.10512): LoRA as B diag(E) A, whose least useful directions are cut."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmtune.adapters.base import SavedConfig
from llmtune.adapters.peft_method import PeftMethod, SavedPart
from llmtune.io.fingerprint import JsonObject

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor

UNKNOWN_STEPS = 1000
"""peft's config wants the steps of a run before they are known; `begin_steps` sets them."""
RANK_EPSILON = 1e-5
"""What peft adds to the rank before it divides by it."""


class AdaLoraAdapter(PeftMethod):
    """W + scaling * B diag(E) A; E is set to zero where it matters least, to a rank on average."""

    PEFT_TYPE: ClassVar[str] = "ADALORA"
    PEFT_CONFIG: ClassVar[str] = "AdaLoraConfig"
    TENSOR_MARK: ClassVar[str] = ".lora_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (
        SavedPart("lora_A"),
        SavedPart("lora_B"),
        SavedPart("lora_E", 0.0),
    )
    UNSAVED_PARTS: ClassVar[frozenset[str]] = frozenset({"ranknum"})
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {
        "target_r": "rank",
        "init_r": "first_rank",
        "lora_alpha": "alpha",
    }
    CHOICE_SETTINGS: ClassVar[frozenset[str]] = frozenset({"rank_pattern"})
    TAKES_TRANSPOSED: ClassVar[bool] = True
    KEPT_OUTPUTS: ClassVar[int] = 1
    STATE_NUMBERS: ClassVar[int] = 3

    method: Literal["adalora"] = "adalora"
    rank: Annotated[int, Field(gt=0)] = 8
    """Directions that are left of a layer, on average over all layers."""
    first_rank: Annotated[int, Field(gt=1)] = 12
    """Directions that each layer begins with; the file keeps them, cut ones as zeros."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Strength of the update before it is divided by first_rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs dropped while training."""
    cut_from: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps before the first direction is cut."""
    cut_until: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of the steps after which no further one is."""
    orthogonality: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty that keeps the directions of A, and those of B, at right angles."""

    @model_validator(mode="after")
    def _check_course(self) -> Self:
        if self.rank >= self.first_rank:
            raise ValueError(
                f"adapter.rank={self.rank} must be below adapter.first_rank={self.first_rank}: "
                "ranks are cut from the one to the other"
            )
        if self.cut_from >= self.cut_until:
            raise ValueError(
                f"adapter.cut_from={self.cut_from} must be below adapter.cut_until={self.cut_until}"
            )
        return self

    def peft_settings(self, target_modules: Sequence[str]) -> JsonObject:
        """Return ranks and course, in steps of a run whose length is not known yet."""
        return {
            **super().peft_settings(target_modules),
            "lora_dropout": self.dropout,
            "tinit": round(self.cut_from * UNKNOWN_STEPS),
            "tfinal": UNKNOWN_STEPS - round(self.cut_until * UNKNOWN_STEPS),
            "total_step": UNKNOWN_STEPS,
            "orth_reg_weight": self.orthogonality,
        }

    def why_not_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """No layer can use more directions than its smaller width."""
        return [
            f"adapter.first_rank={self.first_rank} is more than {name} has directions, "
            f"{min(shape[-2:])}"
            for name, shape in shapes.items()
            if self.first_rank > min(shape[-2:])
        ][:1]

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the numbers in A, B and E."""
        return self.first_rank * (num_out + num_in + 1)

    def thin_width(self, module: str) -> int:
        """Return the rank: A's product is kept."""
        return self.first_rank

    @property
    def drops_inputs(self) -> bool:
        """Whether there is dropout."""
        return self.dropout > 0

    @classmethod
    def fit(cls, layer: "BaseTunerLayer") -> None:
        """Keep the rank a constant: over 16 bits peft rounds it and gives it a gradient."""
        for name, rank in getattr(layer, "ranknum", {}).items():
            rank.requires_grad_(False)
            rank.data = rank.data.float().fill_(float(layer.r[name]))

    @classmethod
    @contextmanager
    def loading(cls, model: "PeftModel") -> Iterator[None]:
        """Size the layers as a file without cut directions has them, in float32.

        peft does so as it loads one, and over 16 bits rounds every value of the file to them.
        """
        from llmtune.adapters.rank_budget import resize_layers

        config: Any = model.peft_config["default"]
        pattern = config.rank_pattern
        if pattern is None:
            yield
            return
        resize_layers(model)
        config.rank_pattern = None
        try:
            yield
        finally:
            config.rank_pattern = pattern

    @classmethod
    def begin_steps(cls, model: "PeftModel", total_steps: int) -> None:
        """Lay the course over this run's steps."""
        from llmtune.adapters.rank_budget import rank_budget

        rank_budget(model).spread_over(total_steps)

    @classmethod
    def after_step(cls, model: "PeftModel", step: int) -> None:
        """Weigh all directions, and cut those beyond the step's budget."""
        from llmtune.adapters.rank_budget import rank_budget

        rank_budget(model).after_step(step)

    @classmethod
    def penalty(cls, model: "PeftModel") -> "Tensor | None":
        """Return the penalty on directions that are not at right angles."""
        from llmtune.adapters.rank_budget import orthogonality_penalty

        return orthogonality_penalty(model)

    @classmethod
    def step_state(cls, model: "PeftModel") -> "dict[str, Tensor]":
        """Return what the directions have been worth so far, and which are cut for good."""
        from llmtune.adapters.rank_budget import rank_budget

        return rank_budget(model).state()

    @classmethod
    def restore_step_state(cls, model: "PeftModel", state: "Mapping[str, Tensor]") -> None:
        """Continue from what `step_state` returned."""
        from llmtune.adapters.rank_budget import rank_budget

        rank_budget(model).restore(state)

    @classmethod
    def settings_for(cls, config: SavedConfig, module: str) -> JsonObject:
        """Return a module's own rank if directions were left out of the file, and its scaling.

        The scaling is that of the rank which the layer began with.
        """
        kept = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
        if kept is None:
            return {"rank_pattern": None}
        rank, first = sum(kept), config.get("init_r", cls.model_fields["first_rank"].default)
        alpha = config.get("lora_alpha", 8)
        scaled = (alpha if alpha > 0 else first) * (rank + RANK_EPSILON) / (first + RANK_EPSILON)
        return {"rank_pattern": None, "init_r": rank, "lora_alpha": scaled}
