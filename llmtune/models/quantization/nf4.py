"""NormalFloat, 4 bits."""

from typing import ClassVar, Literal

from llmtune.models.quantization.four_bit import FourBitQuantization


class Nf4Quantization(FourBitQuantization):
    """4-bit NormalFloat weights (QLoRA, arXiv:2305.14314) by bitsandbytes, on CUDA and CPU."""

    packed_marker: ClassVar[str | None] = "quant_state.bitsandbytes__nf4"

    method: Literal["nf4"] = "nf4"
