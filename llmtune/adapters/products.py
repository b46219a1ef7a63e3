"""Methods whose update is a product of small parts other than B A: LoHa, LoKr, MiSS."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmtune.adapters.peft_method import PeftMethod, SavedPart

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


class LoHaAdapter(PeftMethod):
    """LoHa (arXiv:2108.06098): the elementwise product of two low-rank products."""

    PEFT_TYPE: ClassVar[str] = "LOHA"
    PEFT_CONFIG: ClassVar[str] = "LoHaConfig"
    TENSOR_MARK: ClassVar[str] = ".hada_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (
        SavedPart("hada_w1_a"),
        SavedPart("hada_w1_b"),
        SavedPart("hada_w2_a"),
        SavedPart("hada_w2_b", 0.0),
    )
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {"r": "rank", "alpha": "alpha"}
    KEPT_OUTPUTS: ClassVar[int] = 1
    DENSE_COPIES: ClassVar[int] = 3
    """The update and its two factors."""

    method: Literal["loha"] = "loha"
    rank: Annotated[int, Field(gt=0)] = 8
    """Rank of each of the two products; that of the update is up to its square."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Strength of the update before it is divided by the rank."""

    @classmethod
    def fit_quantized(cls, layer: "BaseTunerLayer") -> None:
        """Give the update its own shape, not that of the packed weight."""
        from llmtune.adapters.over_quantized import shape_update

        shape_update(layer)

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the numbers in two pairs of factors."""
        return 2 * self.rank * (num_out + num_in)


class LoKrAdapter(PeftMethod):
    """LoKr (arXiv:2309.14859): the Kronecker product of a small matrix and a low-rank one."""

    PEFT_TYPE: ClassVar[str] = "LOKR"
    PEFT_CONFIG: ClassVar[str] = "LoKrConfig"
    TENSOR_MARK: ClassVar[str] = ".lokr_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (
        SavedPart("lokr_w1|lokr_w1_a", 0.0),
        SavedPart("lokr_w2|lokr_w2_a"),
        SavedPart("lokr_w1_b", is_optional=True),
        SavedPart("lokr_w2_b", is_optional=True),
    )
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {"r": "rank", "alpha": "alpha"}
    KEPT_OUTPUTS: ClassVar[int] = 1
    DENSE_COPIES: ClassVar[int] = 2
    """The update, and the update scaled."""

    method: Literal["lokr"] = "lokr"
    rank: Annotated[int, Field(gt=0)] = 8
    """Rank of the larger of the two matrices."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Strength of the update before it is divided by the rank."""

    @classmethod
    def fit_quantized(cls, layer: "BaseTunerLayer") -> None:
        """Give the update its own shape, not that of the packed weight."""
        from llmtune.adapters.over_quantized import shape_update

        shape_update(layer)

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the small matrix and the larger one, which is whole if its rank would be high."""
        (small_out, large_out), (small_in, large_in) = _near_square(num_out), _near_square(num_in)
        is_whole = self.rank >= max(large_out, large_in) / 2
        larger = large_out * large_in if is_whole else self.rank * (large_out + large_in)
        return small_out * small_in + larger


class MissAdapter(PeftMethod):
    """MiSS (arXiv:2409.15371): blocks of a layer's inputs share one matrix [rank, out]."""

    PEFT_TYPE: ClassVar[str] = "MISS"
    PEFT_CONFIG: ClassVar[str] = "MissConfig"
    TENSOR_MARK: ClassVar[str] = ".miss_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (SavedPart("miss_block", 0.0),)
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {"r": "rank", "init_weights": "method"}
    KEPT_OUTPUTS: ClassVar[int] = 1

    method: Literal["miss"] = "miss"
    rank: Annotated[int, Field(gt=0)] = 32
    """Inputs of a block; at most those of the narrowest adapted layer."""

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return a row for each input of a block."""
        return self.rank * num_out

    def thin_width(self, module: str) -> int:
        """Return the rank: the sum of the blocks is kept."""
        return self.rank


def _near_square(width: int) -> tuple[int, int]:
    """Return the two factors of a width that are nearest to each other, the smaller first."""
    small = next(one for one in range(math.isqrt(width), 0, -1) if width % one == 0)
    return small, width // small
