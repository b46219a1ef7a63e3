"""Methods that see a weight in a different basis: OFT turns it, FourierFT trains frequencies."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmtune.adapters.peft_method import PeftMethod, SavedPart
from llmtune.io.fingerprint import JsonObject


class OftAdapter(PeftMethod):
    """OFT (arXiv:2306.07280): a layer's inputs are rotated, block by block, before the weight."""

    PEFT_TYPE: ClassVar[str] = "OFT"
    PEFT_CONFIG: ClassVar[str] = "OFTConfig"
    TENSOR_MARK: ClassVar[str] = ".oft_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (SavedPart("oft_R.weight", 0.0),)
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {"oft_block_size": "block_size"}
    ZERO_SETTINGS: ClassVar[frozenset[str]] = frozenset({"r"})
    KEPT_OUTPUTS: ClassVar[int] = 1

    method: Literal["oft"] = "oft"
    block_size: Annotated[int, Field(gt=1)] = 32
    """Inputs that are rotated together; a width that it does not divide takes the nearest size."""

    def peft_settings(self, target_modules: Sequence[str]) -> JsonObject:
        """Return the size of a block."""
        return {"r": 0, "oft_block_size": self.block_size}

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the angles of each block's rotation."""
        size = _nearest_divisor(num_in, self.block_size)
        return num_in // size * (size * (size - 1) // 2)


class FourierAdapter(PeftMethod):
    """FourierFT (arXiv:2405.03003): the update is the inverse transform of a few frequencies."""

    PEFT_TYPE: ClassVar[str] = "FOURIERFT"
    PEFT_CONFIG: ClassVar[str] = "FourierFTConfig"
    TENSOR_MARK: ClassVar[str] = ".fourierft_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (SavedPart("fourierft_spectrum", 0.0),)
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {
        "n_frequency": "num_frequencies",
        "scaling": "scaling",
        "random_loc_seed": "method",
    }
    TAKES_TRANSPOSED: ClassVar[bool] = True
    KEPT_OUTPUTS: ClassVar[int] = 1
    DENSE_COPIES: ClassVar[int] = 4
    """The spectrum, its complex transform, and the update."""

    method: Literal["fourierft"] = "fourierft"
    num_frequencies: Annotated[int, Field(gt=0)] = 1000
    """Trained numbers of each adapted layer."""
    scaling: Annotated[float, Field(gt=0)] = 150.0
    """Factor of the update; about 300 for instructions in the paper."""

    def peft_settings(self, target_modules: Sequence[str]) -> JsonObject:
        """Return the number and the scaling, and start without effect."""
        return {
            "n_frequency": self.num_frequencies,
            "scaling": self.scaling,
            "init_weights": True,
        }

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the number of frequencies."""
        return self.num_frequencies


def _nearest_divisor(width: int, wanted: int) -> int:
    """Return the divisor of a width that is nearest to a number, the smaller of two."""
    if wanted >= width:
        return width
    below = next(one for one in range(wanted, 0, -1) if width % one == 0)
    above = next(one for one in range(wanted, width + 1) if width % one == 0)
    return below if wanted - below <= above - wanted else above
