"""Floating point, 4 bits."""

from typing import Literal

from llmtune.models.quantization.four_bit import FourBitQuantization


class Fp4Quantization(FourBitQuantization):
    """4-bit float weights by bitsandbytes; NF4 is the better choice for normally spread weights."""

    method: Literal["fp4"] = "fp4"
