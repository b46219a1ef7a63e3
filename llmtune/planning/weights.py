"""The bytes of base, adapter and optimizer in memory, from a model's shape."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from llmtune.models.config import (
    Fp4Quantization,
    Int8Quantization,
    Nf4Quantization,
    QuantizationConfig,
)
from llmtune.planning.shape import ModelShape

BLOCK = 64
"""Weights that share a scale in NF4 and FP4."""
SCALE_BLOCK = 256
"""Scales that share a scale with double quantization, and optimizer values in 8 bits."""
FLOAT32 = 4
STATES_PER_WEIGHT = MappingProxyType({"adamw": 2 * FLOAT32, "adamw_8bit": 2 * (1 + 4 / 256)})
"""Bytes of AdamW's two moments for a trained weight."""


def base_bytes(
    shape: ModelShape, quantization: QuantizationConfig | None, element_bytes: int
) -> dict[str, int]:
    """Return the base's bytes by how they are kept: {"nf4": .., "bfloat16": ..} and the like.

    Quantized are the linear layers; embeddings, LM head, norms, biases, routers and fused experts
    stay in the model's dtype (`element_bytes`).
    """
    name = {2: "16-bit", 4: "float32"}[element_bytes]
    rest = shape.num_parameters - shape.linear_parameters
    if isinstance(quantization, Nf4Quantization | Fp4Quantization):
        stored = sum(
            four_bit_bytes(math.prod(size), double_quant=quantization.double_quant)
            for size in shape.linear.values()
        )
    elif isinstance(quantization, Int8Quantization):
        stored = sum(
            math.prod(size) + FLOAT32 * size[0] for size in shape.linear.values()
        )  # one scale a row
    else:
        return {name: shape.num_parameters * element_bytes}
    return {quantization.method: stored, name: rest * element_bytes}


def four_bit_bytes(weights: int, *, double_quant: bool) -> int:
    """Return the bytes of so many weights in NF4 or FP4, with their scales."""
    blocks = math.ceil(weights / BLOCK)
    if not double_quant:
        return math.ceil(weights / 2) + FLOAT32 * blocks
    return math.ceil(weights / 2) + blocks + FLOAT32 * math.ceil(blocks / SCALE_BLOCK)


def trained_bytes(adapter_parameters: int, optimizer: str, *, copy_bytes: int) -> Mapping[str, int]:
    """Return what training adds for float32 adapter weights.

    `copy_bytes` are those of an element of the copies that fused linears compute with; 0 without.
    """
    return {
        "adapter": FLOAT32 * adapter_parameters,
        "gradients": FLOAT32 * adapter_parameters,
        "optimizer": round(STATES_PER_WEIGHT[optimizer] * adapter_parameters),
        "adapter copies": copy_bytes * adapter_parameters,
    }
