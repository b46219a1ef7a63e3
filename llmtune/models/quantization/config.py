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
"""What is advised if a base does not fit, and what a model is exported in."""


def is_quantized(method: str | None) -> bool:
    """Return whether a base that is recorded as kept by this method is quantized.

    None is what a run without a quantization recorded.
    """
    dense = {one.model_fields["method"].default for one in members() if not one.is_quantized}
    return method is not None and method not in dense


def packed_markers() -> tuple[str, ...]:
    """Return the suffixes of the tensors by which a checkpoint says how a weight is packed."""
    return tuple(marker for member in members() if (marker := member.packed_marker) is not None)


def members() -> tuple[type[Quantization], ...]:
    """Return the class of every quantization in the union."""
    union = get_args(QuantizationConfig)[0]
    return get_args(union)
