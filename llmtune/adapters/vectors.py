"""Methods that train single numbers: IA3 and VeRA scale something fixed, SHiRA picks weights."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmtune.adapters.base import SavedConfig
from llmtune.adapters.peft_method import PeftMethod, SavedPart
from llmtune.adapters.update import ModuleTensors
from llmtune.io.fingerprint import JsonObject

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor, nn


class Ia3Adapter(PeftMethod):
    """(IA)^3 (arXiv:2205.05638): a trained number for every output, or input, of a layer."""

    PEFT_TYPE: ClassVar[str] = "IA3"
    PEFT_CONFIG: ClassVar[str] = "IA3Config"
    TENSOR_MARK: ClassVar[str] = ".ia3_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (SavedPart("ia3_l", 1.0),)
    TAKES_TRANSPOSED: ClassVar[bool] = True
    KEPT_OUTPUTS: ClassVar[int] = 1

    method: Literal["ia3"] = "ia3"
    feedforward_modules: list[str] = Field(default_factory=list)
    """Target modules whose inputs are scaled, not their outputs; the paper's is down_proj."""

    @classmethod
    def fit_quantized(cls, layer: "BaseTunerLayer") -> None:
        """Keep peft's layer from giving float32 to a model that computes in 16 bits."""
        from llmtune.adapters.over_quantized import keep_dtype

        keep_dtype(layer)

    def peft_settings(self, target_modules: Sequence[str]) -> JsonObject:
        """Return which of the targets are scaled by inputs."""
        chosen = [name for name in target_modules if self._is_feedforward(name)]
        return {"feedforward_modules": chosen}

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return one for each output, or for each input."""
        return num_in if self._is_feedforward(module) else num_out

    @property
    def patterns(self) -> Mapping[str, Mapping[str, float]]:
        """The modules that are scaled by inputs; each must be a target."""
        return {"feedforward_modules": dict.fromkeys(self.feedforward_modules, 1.0)}

    def _is_feedforward(self, module: str) -> bool:
        return any(
            module == name or module.endswith(f".{name}") for name in self.feedforward_modules
        )

    @classmethod
    def changed_leaves(cls, tensors: ModuleTensors, config: SavedConfig) -> tuple[str, ...]:
        """Return the bias too, if outputs are scaled: the vector is then a column."""
        scale = tensors.parts["ia3_l"]
        return ("weight", "bias") if scale.shape[-1] == 1 else ("weight",)

    @classmethod
    def settings_for(cls, config: SavedConfig, module: str) -> JsonObject:
        """Return whether this module is scaled by its inputs, as peft reads the saved names."""
        import re

        named = config.get("feedforward_modules") or []
        if isinstance(named, str):
            is_named = re.fullmatch(named, module) is not None
        else:
            is_named = any(module.endswith(name) for name in named)
        return {"feedforward_modules": [module] if is_named else []}


class ShiraAdapter(PeftMethod):
    """SHiRA (arXiv:2406.13175): single numbers of a weight, as many as a LoRA of the rank has."""

    PEFT_TYPE: ClassVar[str] = "SHIRA"
    PEFT_CONFIG: ClassVar[str] = "ShiraConfig"
    TENSOR_MARK: ClassVar[str] = ".shira_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (
        SavedPart("shira_weight", 0.0),
        SavedPart("shira_indices", is_late=True),
    )
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {"r": "rank"}
    PEFT_CONSTANTS: ClassVar[JsonObject] = {"random_seed": 0}
    """Which numbers it draws is saved too."""
    DENSE_COPIES: ClassVar[int] = 2
    """The weight and what is added to it."""

    method: Literal["shira"] = "shira"
    rank: Annotated[int, Field(gt=0)] = 16
    """Trained numbers of a layer, in parts of the sum of its widths."""

    def to_peft(
        self,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        *,
        fan_in_fan_out: bool = False,
    ) -> "PeftConfig":
        """Return peft's config, with its own choice of numbers where there are weights."""
        from peft import ShiraConfig
        from peft.tuners.shira.mask_functions import random_mask

        config = super().to_peft(target_modules, target_parameters, fan_in_fan_out=fan_in_fan_out)
        assert isinstance(config, ShiraConfig)

        def choose(layer: "nn.Module", r: int, **kwargs: Any) -> "Tensor | None":
            is_skeleton = layer.get_parameter("weight").is_meta
            return None if is_skeleton else random_mask(layer, r, **kwargs)

        config.mask_fn = choose
        return config

    @classmethod
    def counts(cls, name: str) -> bool:
        """The chosen numbers' rows and columns do."""
        return name.endswith(".shira_indices")

    @classmethod
    def why_not_places(cls, values: "Tensor", num_out: int, num_in: int) -> str | None:
        """Torch adds up what is beyond the weight, too, in memory that is not the weight's."""
        rows, columns = values
        is_inside = (rows >= 0) & (rows < num_out) & (columns >= 0) & (columns < num_in)
        if not bool(is_inside.all()):
            return f"names places outside a weight of {num_out} x {num_in}"
        places = rows.long() * num_in + columns.long()
        return "names a place twice" if places.unique().numel() < places.numel() else None

    def why_not_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """A layer must have as many numbers."""
        return [
            f"adapter.rank: rank {self.rank} picks more numbers than {name} has ({num_out} x "
            f"{num_in}); it must be below {num_out * num_in // (num_out + num_in) + 1}"
            for name, (num_out, num_in) in shapes.items()
            if self.parameters_of(name, num_out, num_in) > num_out * num_in
        ][:1]

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the rank times the widths."""
        return self.rank * (num_out + num_in)


class VeraAdapter(PeftMethod):
    """VeRA (arXiv:2310.11454): one random pair of factors for all layers, and two vectors each."""

    PEFT_TYPE: ClassVar[str] = "VERA"
    PEFT_CONFIG: ClassVar[str] = "VeraConfig"
    TENSOR_MARK: ClassVar[str] = ".vera_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (
        SavedPart("vera_lambda_b", 0.0),
        SavedPart("vera_lambda_d"),
    )
    SHARED_PARTS: ClassVar[Mapping[str, str]] = {
        "base_model.vera_A": "vera_A",
        "base_model.vera_B": "vera_B",
    }
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {"r": "rank"}
    PEFT_CONSTANTS: ClassVar[JsonObject] = {"save_projection": True}
    """The random factors are saved too, so that they can be read anywhere."""
    TAKES_TRANSPOSED: ClassVar[bool] = True
    KEPT_OUTPUTS: ClassVar[int] = 1

    method: Literal["vera"] = "vera"
    rank: Annotated[int, Field(gt=0)] = 256
    """Rows of the shared A; the vectors are small, so it is chosen large."""

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return one for each output and each row of A."""
        return num_out + self.rank

    def thin_width(self, module: str) -> int:
        """Return the rank: A's product is kept."""
        return self.rank
