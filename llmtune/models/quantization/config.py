"""The union of all quantizations, which is their registry: a new one is listed here."""

from typing import Annotated, get_args

from pydantic import Field

from llmtune.models.quantization.base import Quantization
from llmtune.models.quantization.fp4 import Fp4Quantization
from llmtune.models.quantization.int8 import Int8Quantization
from llmtune.models.quantization.nf4 import Nf4Quantization
from llmtune.models.quantization.none import NoQuantization

QuantizationConfig = Annotated[
    Nf4Quantization | Fp4Quantization | Int8Quantization | NoQuantization,
    Field(discriminator="method"),
]

DENSE = NoQuantization()
SMALLEST = Nf4Quantization()
"""What is advised where a base does not fit, and what a model is exported in."""


def members() -> tuple[type[Quantization], ...]:
    """Return the class of every quantization in the union."""
    union = get_args(QuantizationConfig)[0]
    return get_args(union)
