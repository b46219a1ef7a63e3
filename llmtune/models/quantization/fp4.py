"""Floating point, 4 bits."""

from typing import ClassVar, Literal

from llmtune.models.quantization.four_bit import FourBitQuantization


class Fp4Quantization(FourBitQuantization):
    """4-bit float weights by bitsandbytes; NF4 is the better choice for normally spread weights."""

    packed_marker: ClassVar[str | None] = "quant_state.bitsandbytes__fp4"

    method: Literal["fp4"] = "fp4"
