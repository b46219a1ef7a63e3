"""Chosen layers trained whole: the classic way to tune a part of a model and freeze the rest."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from llmtune.adapters.base import Adapter, SavedConfig
from llmtune.adapters.low_rank_saved import NO_TARGETS
from llmtune.adapters.update import ModuleTensors, Part, Place, WeightUpdate, Widths

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


class LayersAdapter(Adapter):
    """The weights of the targets themselves: `layers: last-4` trains the linears of four layers.

    In peft it is an adapter that only has `modules_to_save`. Trained in float32, saved in the
    base's precision, and merged by putting the weights in their place.
    """

    PEFT_TYPE: ClassVar[str] = "LORA"
    TENSOR_MARK: ClassVar[str] = ".whole_layer."  # no tensor is the method's own
    IS_WHOLE: ClassVar[bool] = True

    method: Literal["layers"] = "layers"

    def to_peft(
        self,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        *,
        fan_in_fan_out: bool = False,
    ) -> "PeftConfig":
        """Return peft's config of a LoRA on nothing, beside which these modules are saved."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=NO_TARGETS,
            modules_to_save=[*target_modules, *self.modules_to_save],
        )

    def why_no_layer(self, layer: "nn.Module") -> str | None:
        """Quantized weights have no gradient."""
        if layer.get_parameter("weight").is_floating_point():
            return None
        return (
            "its weight is quantized, and a quantized weight cannot be trained itself; set "
            "model.quantization=null"
        )

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the weight's own numbers."""
        return num_out * num_in

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
