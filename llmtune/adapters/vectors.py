"""Methods that train vectors alone: IA3 scales what a layer gives, VeRA scales fixed factors."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmtune.adapters.base import SavedConfig
from llmtune.adapters.peft_method import PeftMethod, SavedPart
from llmtune.adapters.update import ModuleTensors
from llmtune.io.fingerprint import JsonObject


class Ia3Adapter(PeftMethod):
    """(IA)^3 (arXiv:2205.05638): a trained number for every output, or input, of a layer."""

    PEFT_TYPE: ClassVar[str] = "IA3"
    PEFT_CONFIG: ClassVar[str] = "IA3Config"
    TENSOR_MARK: ClassVar[str] = ".ia3_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (SavedPart("ia3_l", 1.0),)
    TAKES_TRANSPOSED: ClassVar[bool] = True
    WHY_NOT_QUANTIZED: ClassVar[str | None] = (
        "peft's layer then gives float32 to a model that computes in 16 bits"
    )
    KEPT_OUTPUTS: ClassVar[int] = 1

    method: Literal["ia3"] = "ia3"
    feedforward_modules: list[str] = Field(default_factory=list)
    """Target modules whose inputs are scaled, not their outputs; the paper's is down_proj."""

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
    TAKES_TRANSPOSED: ClassVar[bool] = True
    KEPT_OUTPUTS: ClassVar[int] = 1

    method: Literal["vera"] = "vera"
    rank: Annotated[int, Field(gt=0)] = 256
    """Rows of the shared A; the vectors are small, so it is chosen large."""

    def peft_settings(self, target_modules: Sequence[str]) -> JsonObject:
        """Return the rank; the random factors are saved too, so that they can be read anywhere."""
        return {"r": self.rank, "save_projection": True}

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return one for each output and each row of A."""
        return num_out + self.rank

    def thin_width(self, module: str) -> int:
        """Return the rank: A's product is kept."""
        return self.rank
