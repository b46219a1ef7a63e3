"""DoRA (arXiv:2402.09353): LoRA on the direction of each weight row, and its length trained too."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from llmtune.adapters.base import SavedConfig
from llmtune.adapters.low_rank import LowRankAdapter
from llmtune.adapters.low_rank_update import LowRankUpdate
from llmtune.adapters.rslora import RsLoraAdapter
from llmtune.adapters.update import ModuleTensors, Place, WeightUpdate, Workspace
from llmtune.io.safetensors import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

MAGNITUDE = "magnitude_vector"


class DoraAdapter(LowRankAdapter):
    """Weight-decomposed LoRA: W' = m * (W + scaling * B A) / ||W + scaling * B A||, by rows."""

    KEPT_OUTPUTS: ClassVar[int] = 2
    """Both results that the magnitude scales."""
    DENSE_COPIES: ClassVar[int] = 4
    """The weight, its update, their sum, and an identity."""

    method: Literal["dora"] = "dora"

    @model_validator(mode="after")
    def _check_dora_bias(self) -> Self:
        if self.lora_bias:
            raise ValueError("peft's DoRA has no bias of its own: set adapter.lora_bias=false")
        return self

    @classmethod
    def owns(cls, config: SavedConfig) -> bool:
        """Whether it is LoRA with magnitudes, whatever its scaling."""
        return super().owns(config) and bool(config.get("use_dora"))

    def why_no_experts(self) -> str | None:
        """DoRA has no form for fused expert weights."""
        return "DoRA cannot adapt them (adapter.method=lora can)"

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the numbers in A, B and the magnitudes."""
        return super().parameters_of(module, num_out, num_in) + num_out

    @property
    def is_fusable(self) -> bool:
        """The magnitude needs the norm of the whole updated weight."""
        return False

    def _peft_method(self) -> dict[str, bool]:
        return {"use_dora": True}

    @classmethod
    def saved_scaling(cls, config: SavedConfig, key: str) -> float:
        """Stock peft can also scale as rsLoRA does."""
        if config.get("use_rslora"):
            return RsLoraAdapter.saved_scaling(config, key)
        return super().saved_scaling(config, key)

    @classmethod
    def plan_updates(
        cls, tensors: ModuleTensors, place: Place, config: SavedConfig, strength: float
    ) -> dict[str, WeightUpdate]:
        """Return the update of the weight; a module without magnitudes is plain LoRA."""
        if MAGNITUDE not in tensors.parts:
            return super().plan_updates(tensors, place, config, strength)
        magnitude = tensors.parts[MAGNITUDE]
        if magnitude.shape != (place.num_out,):
            raise ValueError(
                f"{magnitude.name!r} is {list(magnitude.shape)} and its module has "
                f"{place.num_out} outputs; is this the adapter's base?"
            )
        updates = super().plan_updates(tensors, place, config, strength)
        low_rank = updates["weight"]
        assert isinstance(low_rank, LowRankUpdate)
        # The norm is that of the full delta; a strength blends the result instead.
        return {**updates, "weight": DoraUpdate(replace(low_rank, weight=1.0), magnitude, strength)}

    @classmethod
    def why_only_alone(cls, config: SavedConfig) -> str | None:
        """A magnitude is not a delta."""
        return (
            "DoRA's magnitudes belong to its own delta, so it cannot be combined with other "
            "adapters; merge it alone"
        )

    @classmethod
    def why_no_factors(cls, tensors: ModuleTensors) -> str | None:
        """Name the magnitudes."""
        return "DoRA magnitudes" if MAGNITUDE in tensors.parts else super().why_no_factors(tensors)


@dataclass(frozen=True)
class DoraUpdate(WeightUpdate):
    """m * (W + scaling * B A) / ||W + scaling * B A||, the norm over each output's inputs."""

    word = "dora"

    low_rank: LowRankUpdate
    magnitude: TensorEntry  # [out]
    weight: float = 1.0

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """A, B and m."""
        return (*self.low_rank.entries, self.magnitude)

    @property
    def strength(self) -> float:
        """How far the result is moved from the base's weight."""
        return self.weight

    def describe(self) -> Mapping[str, float | str]:
        """Return what the low-rank part is."""
        return self.low_rank.describe()

    def survey(self, tiles: "Iterable[Tensor]", work: Workspace) -> "Tensor | None":
        """Return the norms along the stored rows if outputs are columns: [out]."""
        if not self.low_rank.place.is_transposed:
            return None
        import torch

        squares, first_row = None, 0
        for rows in tiles:
            self.low_rank.apply(rows, first_row, work, None)
            part = rows.double().square().sum(dim=0)
            squares = part if squares is None else squares + part
            first_row += rows.shape[0]
        assert squares is not None
        norms: torch.Tensor = squares.sqrt().float()
        return norms

    def apply(
        self, rows: "Tensor", first_row: int, work: Workspace, surveyed: "Tensor | None"
    ) -> None:
        """Give every output's weights the norm that was learned (eq. 5)."""
        import torch

        self.low_rank.apply(rows, first_row, work, None)
        learned = work.load(self.magnitude)
        if surveyed is not None:
            rows *= learned / surveyed
        else:
            learned = learned[first_row : first_row + rows.shape[0]]
            rows *= (learned / torch.linalg.norm(rows, dim=1))[:, None]
