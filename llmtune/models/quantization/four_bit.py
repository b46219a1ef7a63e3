"""What NF4 and FP4 by bitsandbytes have in common (light)."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmtune.models.quantization.base import Quantization, RoundTrip

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ComputeDtypeName = Literal["auto", "bfloat16", "float16", "float32"]
BLOCK = 64
"""Weights that share a scale."""
SCALE_BLOCK = 256
"""Scales that share a scale with double quantization."""
FLOAT32 = 4


class FourBitQuantization(Quantization):
    """4-bit codes in blocks of 64 with a scale each, in bitsandbytes' `Linear4bit`."""

    bits: ClassVar[int] = 4
    fusable_layer: ClassVar[str | None] = "Linear4bit"

    double_quant: bool = True
    """Quantize the per-block scales too: about 0.4 bits per weight less memory."""
    compute_dtype: ComputeDtypeName = "auto"
    """Precision of the matrix products; auto is the model's dtype (bfloat16 where possible)."""

    def loading_config(self, dtype: "torch.dtype") -> Any:
        """Return bitsandbytes' settings."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.method,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.product_dtype(dtype),
        )

    def product_dtype(self, dtype: "torch.dtype") -> "torch.dtype":
        """Return the precision of the layers' products in a model of `dtype`."""
        import torch

        if self.compute_dtype == "auto":
            return dtype
        named: torch.dtype = getattr(torch, self.compute_dtype)
        return named

    @classmethod
    def kind_of(cls, layer: "nn.Module") -> str | None:
        """Name the format, read from the weight itself."""
        weight: Any = getattr(layer, "weight", None)
        if type(weight).__name__ != "Params4bit":
            return None
        kind = str(weight.quant_type)
        return kind if kind == cls.model_fields["method"].default else None

    def settings_of(self, layer: "nn.Module") -> tuple[Any, ...]:
        """Return format, double quantization and compute dtype."""
        checked: Any = layer
        return (
            self.kind_of(layer),
            checked.weight.quant_state.nested,
            checked.compute_dtype,
        )

    def wanted_settings(self, dtype: "torch.dtype") -> tuple[Any, ...]:
        """Return format, double quantization and compute dtype."""
        return (self.method, self.double_quant, self.product_dtype(dtype))

    def quantized_weights(
        self, skeleton: "PreTrainedModel", dtype: "torch.dtype"
    ) -> dict[str, bool]:
        """Let transformers choose, as it does when it loads a model."""
        from llmtune.models.quantization.bnb import chosen_weights

        return chosen_weights(skeleton, self.loading_config(dtype), dtype)

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Return half a byte for each weight, and the scales."""
        weights = math.prod(shape)
        blocks = math.ceil(weights / BLOCK)
        if not self.double_quant:
            return math.ceil(weights / 2) + FLOAT32 * blocks
        return math.ceil(weights / 2) + blocks + FLOAT32 * math.ceil(blocks / SCALE_BLOCK)

    def round_trip(self, device: "torch.device", dtype: "torch.dtype") -> RoundTrip:
        """Return bitsandbytes' quantization and back."""
        from llmtune.models.quantization.bnb import FourBitRoundTrip

        return FourBitRoundTrip(
            self.method,
            device,
            dtype,
            self.product_dtype(dtype),
            has_double_quant=self.double_quant,
            block_size=BLOCK,
            scale_block_size=SCALE_BLOCK,
        )

    @classmethod
    def dense_weight(cls, layer: "nn.Module") -> "Callable[[], Tensor] | None":
        """Return a function that dequantizes the layer's weight."""
        weight: Any = getattr(layer, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return None
        from llmtune.models.quantization.bnb import dequantize_four_bit

        return lambda: dequantize_four_bit(weight)

    def for_comparison(self) -> Quantization:
        """Return the same weights with products in the model's own dtype."""
        return self.model_copy(update={"compute_dtype": "auto"})
