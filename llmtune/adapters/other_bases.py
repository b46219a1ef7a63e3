"""Methods that see a weight in a different basis: turned (OFT, BOFT), or as frequencies."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
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
    PEFT_CONSTANTS: ClassVar[JsonObject] = {"r": 0}
    ZERO_SETTINGS: ClassVar[frozenset[str]] = frozenset({"r"})
    KEPT_OUTPUTS: ClassVar[int] = 1

    method: Literal["oft"] = "oft"
    block_size: Annotated[int, Field(gt=1)] = 32
    """Inputs that are rotated together; a width that it does not divide takes the nearest size."""

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the angles of each block's rotation."""
        size = _nearest_divisor(num_in, self.block_size)
        return num_in // size * (size * (size - 1) // 2)


class BoftAdapter(PeftMethod):
    """BOFT (arXiv:2311.06243): OFT whose blocks overlap, as a product of several rotations."""

    PEFT_TYPE: ClassVar[str] = "BOFT"
    PEFT_CONFIG: ClassVar[str] = "BOFTConfig"
    TENSOR_MARK: ClassVar[str] = ".boft_"
    PARTS: ClassVar[tuple[SavedPart, ...]] = (SavedPart("boft_R", 0.0), SavedPart("boft_s", 1.0))
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {
        "boft_block_size": "block_size",
        "boft_n_butterfly_factor": "num_factors",
    }
    KEPT_OUTPUTS: ClassVar[int] = 1
    """The result that is scaled."""

    method: Literal["boft"] = "boft"
    block_size: Annotated[int, Field(gt=1)] = 8
    """Inputs that one rotation turns together; must divide the widths."""
    num_factors: Annotated[int, Field(gt=0)] = 2
    """Rotations after each other; each doubles the inputs that reach an output."""

    @classmethod
    def attaching(cls) -> AbstractContextManager[None]:
        """Have layers without dense tables made."""
        from llmtune.adapters.butterfly import butterfly_layers

        return butterfly_layers()

    def why_not_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The blocks must fit every width."""
        if self.num_factors > 1 and self.block_size % 2:
            return [
                f"adapter.block_size={self.block_size}: with adapter.num_factors="
                f"{self.num_factors} it must be even"
            ]
        span = self.block_size * 2 ** (self.num_factors - 1)
        return [
            f"adapter: {self.num_factors} factors of blocks of {self.block_size} need a multiple "
            f"of {span} inputs, and {name} has {shape[-1]:,}; choose a smaller block_size or "
            "num_factors"
            for name, shape in shapes.items()
            if shape[-1] % span
        ][:1]

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the whole matrix of each block, as peft keeps it, and the scales."""
        return self.num_factors * num_in * self.block_size + num_out

    @property
    def kept_inputs(self) -> int:
        """Return one for each factor: what it turns."""
        return self.num_factors


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
    PEFT_CONSTANTS: ClassVar[JsonObject] = {"init_weights": True}
    """A start without effect."""
    TAKES_TRANSPOSED: ClassVar[bool] = True
    KEPT_OUTPUTS: ClassVar[int] = 1
    DENSE_COPIES: ClassVar[int] = 4
    """The spectrum, its complex transform, and the update."""

    method: Literal["fourierft"] = "fourierft"
    num_frequencies: Annotated[int, Field(gt=0)] = 1000
    """Trained numbers of each adapted layer."""
    scaling: Annotated[float, Field(gt=0)] = 150.0
    """Factor of the update; about 300 for instructions in the paper."""

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
