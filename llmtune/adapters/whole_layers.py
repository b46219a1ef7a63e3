"""Chosen layers trained whole: the classic way to tune a part of a model and freeze the rest."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmtune.adapters.base import Adapter, SavedConfig
from llmtune.adapters.low_rank_saved import NO_TARGETS
from llmtune.adapters.update import ModuleTensors, Part, Place, WeightUpdate, Widths

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    from llmtune.adapters.starts import Sample

Trained = Literal["weights", "norms", "biases"]


class LayersAdapter(Adapter):
    """The weights of the targets themselves: `layers: last-4` trains the linears of four layers.

    In peft it is an adapter that only has `modules_to_save`. Trained in float32, saved in the
    base's precision, and merged by putting the weights in their place.

    Biases alone are those of a LoRA with `lora_bias` whose factors stay at no effect: the base's
    weights are not copied, and a quantized base can be trained over.
    """

    PEFT_TYPE: ClassVar[str] = "LORA"
    TENSOR_MARK: ClassVar[str] = ".whole_layer."  # no tensor is the method's own

    method: Literal["layers"] = "layers"
    parameters: Annotated[tuple[Trained, ...], Field(min_length=1)] = ("weights",)
    """What of the chosen layers is trained: weights (of the targets, with their biases), norms
    (with theirs; with `layers: all` the one after the last layer too), or biases (of the targets
    alone)."""

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        if {"weights", "biases"} <= self.trained_parts:
            raise ValueError(
                "parameters: weights are trained with the biases of the same layers: leave biases "
                "out"
            )
        return self

    @property
    def trained_parts(self) -> frozenset[str]:
        """The knob's."""
        return frozenset(self.parameters)

    @property
    def is_whole(self) -> bool:
        """Whether no bias is trained beside a frozen weight."""
        return "biases" not in self.parameters

    def to_peft(
        self,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        *,
        fan_in_fan_out: bool = False,
    ) -> "PeftConfig":
        """Return peft's config of a LoRA on nothing, beside which these modules are saved.

        Of biases it is one of rank 1 on the layers that have them.
        """
        from peft import LoraConfig

        if not self.is_whole:
            return LoraConfig(
                task_type="CAUSAL_LM",
                r=1,
                lora_alpha=1,
                target_modules=list(target_modules),
                modules_to_save=list(self.modules_to_save) or None,
                fan_in_fan_out=fan_in_fan_out,
                lora_bias=True,
            )
        return LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=NO_TARGETS,
            modules_to_save=[*target_modules, *self.modules_to_save],
        )

    def why_no_layer(self, layer: "nn.Module") -> str | None:
        """Quantized weights have no gradient."""
        if "weights" not in self.parameters:
            return None
        if layer.get_parameter("weight").is_floating_point():
            return None
        return (
            "its weight is quantized, and a quantized weight cannot be trained itself; set "
            "model.quantization=null"
        )

    def num_parameters(
        self, shapes: Mapping[str, tuple[int, ...]], *, biased: Collection[str] = ()
    ) -> int:
        """Return the numbers of the norms, and of the targets' weights and biases."""
        return sum(
            shape[0]
            if len(shape) == 1
            else self.parameters_of(name, *shape) + (shape[0] if name in biased else 0)
            for name, shape in shapes.items()
        )

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the weight's own numbers, if it is trained."""
        return num_out * num_in if "weights" in self.parameters else 0

    def trains(self, name: str) -> bool:
        """The biases, where they stand beside factors; what is whole is peft's own to mark."""
        return ".lora_B." in name and name.endswith(".bias")

    def begin(self, layers: "Mapping[str, BaseTunerLayer]", sample: "Sample | None") -> None:
        """Keep the factors beside the biases at no effect."""
        for layer in layers.values():
            for factors in (layer.lora_A, layer.lora_B):
                for factor in factors.values():
                    factor.weight.requires_grad_(False).zero_()

    @classmethod
    def owns(cls, config: SavedConfig) -> bool:
        """Whether it is a LoRA on nothing."""
        return super().owns(config) and config.get("target_modules") == NO_TARGETS

    @classmethod
    def check_settings(cls, directory: object, config: SavedConfig) -> None:
        """No setting of a LoRA means anything without a target."""

    @classmethod
    def part_of(cls, name: str) -> Part | None:
        """Every tensor takes the place of the base's."""
        return None

    @classmethod
    def widths(cls, tensors: ModuleTensors) -> Widths:
        """Not asked: no tensor is a part."""
        raise NotImplementedError

    @classmethod
    def plan_updates(
        cls, tensors: ModuleTensors, place: Place, config: SavedConfig, strength: float
    ) -> dict[str, WeightUpdate]:
        """Not asked: no tensor is a part."""
        raise NotImplementedError
