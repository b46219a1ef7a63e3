"""The bytes of base, adapter and optimizer in memory, from a model's shape."""

from collections.abc import Mapping
from types import MappingProxyType

from llmtune.models.quantization.base import Quantization
from llmtune.planning.shape import ModelShape

FLOAT32 = 4
STATES_PER_WEIGHT = MappingProxyType({"adamw": 2 * FLOAT32, "adamw_8bit": 2 * (1 + 4 / 256)})
"""Bytes of AdamW's two moments for a trained weight."""


def base_bytes(shape: ModelShape, quantization: Quantization, element_bytes: int) -> dict[str, int]:
    """Return the base's bytes by how they are kept: {"nf4": .., "bfloat16": ..} and the like.

    Quantized are the linear layers; embeddings, LM head, norms, biases, routers and fused experts
    stay in the model's dtype (`element_bytes`).
    """
    name = {2: "16-bit", 4: "float32"}[element_bytes]
    rest = shape.num_parameters - shape.linear_parameters
    if not quantization.is_quantized:
        return {name: shape.num_parameters * element_bytes}
    stored = sum(quantization.stored_bytes(size) for size in shape.linear.values())
    return {quantization.method: stored, name: rest * element_bytes}


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
