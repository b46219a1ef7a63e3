"""Low-rank factors: what they do to a weight, tile by tile, and how new ones are saved."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtune.adapters.update import AdditiveUpdate, Place, WeightUpdate, Workspace
from llmtune.io.fingerprint import JsonObject
from llmtune.io.safetensors import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRankUpdate(AdditiveUpdate):
    """W + weight * scaling * B A, or its transpose if the base stores its weight as [in, out]."""

    word = "lora"

    a: TensorEntry  # [rank, in]; [num_experts * rank, in] for a stack of experts
    b: TensorEntry  # [out, rank]; [out, rank * num_experts]
    scaling: float
    place: Place
    weight: float = 1.0

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """A and B."""
        return (self.a, self.b)

    @property
    def strength(self) -> float:
        """The adapter's weight."""
        return self.weight

    def describe(self) -> Mapping[str, float | str]:
        """Return rank, scaling, weight and the name of A."""
        return {
            "rank": self.a.shape[0] // self.place.num_experts,
            "scaling": self.scaling,
            "weight": self.weight,
            "tensor": self.a.name,
        }

    def delta(
        self, first_row: int, num_rows: int, work: Workspace, *, strength: float = 1.0
    ) -> "Tensor":
        """Return strength * scaling * (B @ A), or its transpose, for some rows."""
        import torch

        factor = self.scaling * strength
        left_OR, right_RI = self._factors(work)
        if self.place.is_transposed:
            right_RI = right_RI[:, first_row : first_row + num_rows]
        else:
            left_OR = left_OR[first_row : first_row + num_rows]
        is_exact = math.frexp(factor)[0] == 0.5  # by a power of two: no rounding, in any order
        if is_exact:
            left_OR = left_OR * factor
        product = work.scratch(left_OR.shape[0], right_RI.shape[1])
        torch.mm(left_OR, right_RI, out=product)
        if not is_exact:
            product *= factor
        return product.t() if self.place.is_transposed else product

    def _factors(self, work: Workspace) -> "tuple[Tensor, Tensor]":
        a, b, place = work.load(self.a), work.load(self.b), self.place
        if place.num_experts > 1:
            # PEFT stacks A as [experts, rank] and B as [rank, experts] (lora.layer.ParamWrapper).
            a = a.view(place.num_experts, -1, a.shape[1])[place.expert]
            b = b.view(b.shape[0], -1, place.num_experts)[:, :, place.expert]
        b = b[place.first_out : place.first_out + place.num_out]
        if place.is_interleaved:
            b = b.view(2, -1, b.shape[1]).transpose(0, 1).reshape(b.shape)
        return b.contiguous(), a


@dataclass(frozen=True)
class BiasUpdate(WeightUpdate):
    """b + factor * (LoRA's own bias); the factor holds scaling and strength."""

    word = "bias"

    bias: TensorEntry  # [out]
    factor: float

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The bias."""
        return (self.bias,)

    def apply(
        self, rows: "Tensor", first_row: int, work: Workspace, surveyed: "Tensor | None"
    ) -> None:
        """Add it; a vector is one row."""
        rows += work.load(self.bias) * self.factor


class NewFactors(NamedTuple):
    """Low-rank factors that were computed, with a scaling of 1."""

    a: "Tensor"  # [rank, in]
    b: "Tensor"  # [out, rank]
    is_embedding: bool = False


def form_adapter(
    modules: Mapping[str, NewFactors], like: Mapping[str, Any]
) -> "tuple[dict[str, Tensor], JsonObject]":
    """Return the tensors by name (below the model's prefix) and the config of a plain adapter.

    Args:
        modules: the factors by the modules' names in memory.
        like: the saved config of an adapter of the same base.
    """
    tensors = {}
    for module, factors in modules.items():
        kind = "lora_embedding_{}" if factors.is_embedding else "lora_{}.weight"
        tensors[f"{module}.{kind.format('A')}"] = factors.a.contiguous()
        tensors[f"{module}.{kind.format('B')}"] = factors.b.contiguous()
    ranks = {module: factors.a.shape[0] for module, factors in modules.items()}
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    config = {
        "peft_type": "LORA",
        "task_type": like.get("task_type"),
        "base_model_name_or_path": like.get("base_model_name_or_path"),
        "revision": like.get("revision"),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,  # the rank everywhere: a scaling of 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": bool(like.get("fan_in_fan_out")),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return tensors, config
