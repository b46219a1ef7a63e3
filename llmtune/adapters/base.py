"""What every adapter method says of itself: its knobs, its cost, its saved form, its arithmetic."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from llmtune.adapters.update import Factors, ModuleTensors, Part, Place, WeightUpdate, Widths
from llmtune.errors import LlmtuneError
from llmtune.schema import Section

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor, nn

    from llmtune.adapters.starts import Sample

SavedConfig = Mapping[str, Any]
"""The content of an `adapter_config.json`."""


class Adapter(Section):
    """A small change of chosen layers that is trained while the base stays frozen.

    The methods of an instance serve a config: injecting, then planning. The class methods serve an
    adapter that exists, whoever made it: first a live one, then a saved one, whose method
    `adapters.config.method_of` finds.
    """

    PEFT_TYPE: ClassVar[str]
    """What peft calls it in `peft_type`."""
    TENSOR_MARK: ClassVar[str]
    """What the names of its own tensors hold and no other name does."""
    USED_SETTINGS: ClassVar[frozenset[str]] = frozenset()
    """Settings of a saved config whose meaning `plan_updates` carries out."""
    INERT_SETTINGS: ClassVar[frozenset[str]] = frozenset()
    """Settings that change nothing about what the saved tensors do to the base."""
    REFUSED_SETTINGS: ClassVar[Mapping[str, str]] = {}
    """Settings with which no single set of weights equals the adapter, and why."""
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {}
    """What must be equal for a saved adapter to be a start: {peft's name: the config's}."""
    ZERO_SETTINGS: ClassVar[frozenset[str]] = frozenset()
    """Settings that are 0 where other methods have a size."""
    CHOICE_SETTINGS: ClassVar[frozenset[str]] = frozenset()
    """Settings that list which parts of a module are there, where other methods have numbers."""
    KEPT_OUTPUTS: ClassVar[int] = 0
    """Results as wide as the layer's output that its forward pass keeps for the backward pass."""
    DENSE_COPIES: ClassVar[int] = 0
    """Float32 tables of a weight's size that its forward pass makes."""
    STATE_NUMBERS: ClassVar[int] = 0
    """Float32 numbers that `after_step` keeps for each trained one."""

    method: str  # each method narrows it to its own name
    target_modules: str | list[str] = "all-linear"
    """all-linear (every linear layer but the head, and fused experts), names ([q_proj, v_proj];
    `experts` for fused expert weights), or one regex that matches whole names."""
    layers: Annotated[str, Field(pattern=r"^(all|last-[1-9]\d*)$")] | list[int] = "all"
    """all, the last N as last-N, or layer numbers counted from 0."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained whole beside the adapter and saved with it, such as lm_head."""
    init_from: Path | None = None
    """A saved adapter of the same shape to start from; null starts with no effect."""

    @abstractmethod
    def to_peft(
        self,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        *,
        fan_in_fan_out: bool = False,
    ) -> "PeftConfig":
        """Return peft's config for exactly these targets (full names or shared endings).

        Args:
            target_modules: the linear layers that `adapters.module_selection` chose.
            target_parameters: the fused expert weights it chose.
            fan_in_fan_out: the layers keep their weight as [in, out] (GPT-2's Conv1D).
        """

    def why_no_experts(self) -> str | None:
        """Say why fused expert weights cannot be adapted with these knobs; None if they can."""
        return f"adapter.method={self.method} cannot adapt them"

    def why_no_layer(self, layer: "nn.Module") -> str | None:
        """Say why this module of the base cannot be adapted; None if it can."""
        return None

    def why_no_decay(self) -> str | None:
        """Say why weight decay would spoil the adapter with these knobs; None if it would not."""
        return None

    @property
    def is_whole(self) -> bool:
        """Whether the targets' own weights are trained, beside no layer of peft's."""
        return False

    @property
    def trained_parts(self) -> frozenset[str]:
        """What of the base is changed: `weights` of linear layers, their `biases`, or `norms`."""
        return frozenset({"weights"})

    @property
    def token_rows(self) -> Sequence[int]:
        """The ids of tokens whose rows of the embedding are trained."""
        return ()

    @property
    def patterns(self) -> Mapping[str, Mapping[str, float]]:
        """The knobs that name modules by patterns: {knob: {pattern: value}}."""
        return {}

    @classmethod
    def attaching(cls) -> AbstractContextManager[None]:
        """Return what must be in force while peft makes the method's layers."""
        return nullcontext()

    @classmethod
    def fit(cls, layer: "BaseTunerLayer") -> None:
        """Put right what peft's fresh layer gets wrong over any weight."""

    @classmethod
    def fit_quantized(cls, layer: "BaseTunerLayer") -> None:
        """Put right what peft's fresh layer lacks over a quantized weight."""

    @classmethod
    def loading(cls, model: "PeftModel") -> AbstractContextManager[None]:
        """Return what must be in force while peft puts a file's values into a live model."""
        return nullcontext()

    def check_layer(self, name: str, layer: "BaseTunerLayer") -> None:
        """Assert that peft adapted the module of this full name as the knobs say."""

    @property
    def num_sampled(self) -> int:
        """How many training rows `begin` is shown."""
        return 0

    def begin(self, layers: "Mapping[str, BaseTunerLayer]", sample: "Sample | None") -> None:
        """Give freshly adapted layers {full name: layer} the start that peft does not give.

        `sample` is the training rows that were asked for, and the model; None without rows.
        """

    @classmethod
    def begin_steps(cls, model: "PeftModel", total_steps: int) -> None:
        """Prepare a live model for a run of so many optimizer steps, or for the rest of one."""

    @classmethod
    def penalty(cls, model: "PeftModel") -> "Tensor | None":
        """Return what a live model's adapter adds to the loss of every step; None if nothing."""
        return None

    @classmethod
    def after_step(cls, model: "PeftModel", step: int) -> None:
        """Do what the method does after an optimizer step (from 1), with its gradients there."""

    @classmethod
    def step_state(cls, model: "PeftModel") -> "dict[str, Tensor]":
        """Return what `after_step` continues from and the adapter's file does not hold."""
        return {}

    @classmethod
    def restore_step_state(cls, model: "PeftModel", state: "Mapping[str, Tensor]") -> None:
        """Continue from what `step_state` returned."""

    @classmethod
    def layer_settings(cls, layer: "BaseTunerLayer") -> dict[str, float]:
        """Return what a table should say of an adapted layer, by name; empty if nothing."""
        return {}

    def trains(self, name: str) -> bool:
        """Whether a live parameter of this name is one that the method trains."""
        return self.TENSOR_MARK in name

    def num_parameters(
        self, shapes: Mapping[str, tuple[int, ...]], *, biased: Collection[str] = ()
    ) -> int:
        """Return the trainable parameters for adapted weights {name: shape}.

        A shape is (out, in), (experts, out, in) for fused experts, or for a norm the number of its
        parameters alone; `biased` are the names of linear layers with a bias.
        """
        return sum(
            math.prod(shape[:-2]) * self.parameters_of(name, *shape[-2:])
            for name, shape in shapes.items()
        )

    def why_not_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return what is wrong with the knobs for adapted weights {name: shape}; [] if nothing."""
        return []

    @abstractmethod
    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the trainable parameters of one adapted weight [out, in]."""

    def thin_width(self, module: str) -> int:
        """Return the width of the product that a layer keeps beside its input; 0 without one."""
        return 0

    @property
    def kept_inputs(self) -> int:
        """How many tensors as wide as a layer's input it keeps in its place; 0: the input."""
        return 0

    @property
    def drops_inputs(self) -> bool:
        """Whether every layer drops some of its inputs while training."""
        return False

    @property
    def is_fusable(self) -> bool:
        """Whether training's own linears can stand in for peft's with these knobs."""
        return False

    def lighter(self) -> "tuple[str, Adapter] | None":
        """Return an override that needs less memory and the section with it; None without one."""
        return None

    @classmethod
    def why_not_fused(cls, layer: "BaseTunerLayer") -> str | None:
        """Say why training's own linear cannot stand in for this layer; None if it can."""
        return f"{type(layer).__name__} layers are not covered"

    @classmethod
    def factors_of(
        cls, layer: "BaseTunerLayer", adapter: str
    ) -> "tuple[Tensor, Tensor, float] | None":
        """Return A [rank, in], B [out, rank] and the scaling before B A; None if it is not that."""
        return None

    @classmethod
    def learns_at_once(cls, name: str) -> bool:
        """Whether a parameter of this name gets a gradient in the first step already."""
        return False

    @classmethod
    def weaken(cls, layer: "BaseTunerLayer", strength: float) -> Callable[[], None] | None:
        """Set a layer's strength and return what undoes it.

        None: the layer has no such switch, and its output must be blended with its base's.
        """
        return None

    @classmethod
    def weigh(cls, layer: "BaseTunerLayer", weights: Mapping[str, float]) -> None:
        """Multiply each named adapter's share of a layer by its weight, for good.

        Asked only of methods whose adapters can be combined (`why_only_alone`).
        """
        raise NotImplementedError

    @classmethod
    def rewritten_base(cls, config: SavedConfig) -> str | None:
        """Name the initialization that changed the base's weights; None if they are as they were.

        Without such an adapter the model is not its base.
        """
        return None

    @classmethod
    def owns(cls, config: SavedConfig) -> bool:
        """Whether a saved config is one of this method, whoever wrote it."""
        return config.get("peft_type") == cls.PEFT_TYPE

    @classmethod
    def check_settings(cls, directory: Path, config: SavedConfig) -> None:
        """Check that a saved adapter can be merged into one set of weights.

        Raises:
            LlmtuneError: names the setting that prevents it.
        """
        known = COMMON_SETTINGS | cls.USED_SETTINGS | cls.INERT_SETTINGS
        for setting, value in config.items():
            if setting in known or not value:
                continue
            reason = cls.REFUSED_SETTINGS.get(setting, "merging does not know this setting")
            raise LlmtuneError(f"{directory} cannot be merged: it sets {setting}, and {reason}")

    @classmethod
    def has_strength(cls, config: SavedConfig) -> bool:
        """Whether a live adapter of this saved config can be weakened."""
        return not config.get("trainable_token_indices")

    @classmethod
    def target_parameters(cls, config: SavedConfig) -> tuple[str, ...]:
        """Return the fused parameters that a saved adapter is on."""
        return ()

    @classmethod
    def neutral_value(cls, name: str) -> float | None:
        """Return the number that all of a saved tensor is while the adapter has no effect.

        None: the tensor alone says nothing.
        """
        return None

    @classmethod
    def counts(cls, name: str) -> bool:
        """Whether a saved tensor of this name holds whole numbers: places of others."""
        return False

    @classmethod
    def why_not_places(cls, values: "Tensor", num_out: int, num_in: int) -> str | None:
        """Say why a tensor that counts cannot be one of a weight [out, in]; None if it can."""
        return None

    @classmethod
    @abstractmethod
    def part_of(cls, name: str) -> Part | None:
        """Return which part of which module a saved tensor is; None if it is not the method's.

        Raises:
            ValueError: the name has the method's form, and no tensor of it has that name.
        """

    @classmethod
    def shared_part(cls, name: str) -> str | None:
        """Return the part that a tensor of the whole adapter is for every module; None if none."""
        return None

    @classmethod
    def missing_part(cls, tensors: ModuleTensors) -> str | None:
        """Name a part that a module's tensors lack; None if they are complete."""
        return None

    @classmethod
    @abstractmethod
    def widths(cls, tensors: ModuleTensors) -> Widths:
        """Return what the tensors' shapes say of the adapted layer's widths."""

    @classmethod
    def fits_experts(cls, tensors: ModuleTensors, place: Place, config: SavedConfig) -> bool:
        """Whether the tensors are those of a whole stack of experts of these widths."""
        return False

    @classmethod
    @abstractmethod
    def plan_updates(
        cls, tensors: ModuleTensors, place: Place, config: SavedConfig, strength: float
    ) -> dict[str, WeightUpdate]:
        """Return what the tensors do to the module's parameters, {`weight` or `bias`: update}.

        Raises:
            ValueError: the tensors contradict the config.
        """

    @classmethod
    def why_only_alone(cls, config: SavedConfig) -> str | None:
        """Say why a saved adapter cannot be combined with others; None if it can."""
        return f"an adapter of method {cls.name()} is not a delta that can be added to others"

    @classmethod
    def why_no_factors(cls, tensors: ModuleTensors) -> str | None:
        """Name what a module has beside (or instead of) low-rank factors; None if nothing."""
        return f"{cls.name()} tensors"

    @classmethod
    def factors(cls, tensors: ModuleTensors, config: SavedConfig) -> Factors:
        """Return a module's low-rank factors, if `why_no_factors` names nothing else."""
        raise NotImplementedError

    @classmethod
    def usual_alpha(cls, config: SavedConfig) -> float:
        """Return the alpha of most modules, for formats that have one for all factors."""
        raise NotImplementedError

    @classmethod
    def name(cls) -> str:
        """Return the method's name."""
        return str(cls.model_fields["method"].default)


COMMON_SETTINGS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "modules_to_save",
        "trainable_token_indices",
    }
)
"""Settings of every peft method that adapts layers of a model, which merging itself carries out."""


def matches_pattern(pattern: str, module: str) -> bool:
    """Whether peft applies a rank or alpha pattern to the module: it must match up to the end."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
