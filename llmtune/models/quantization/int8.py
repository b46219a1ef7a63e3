"""LLM.int8, 8 bits."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmtune.models.quantization.base import Quantization, RoundTrip

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SCALE_BYTES = 4


class Int8Quantization(Quantization):
    """8-bit weights (LLM.int8, arXiv:2208.07339) by bitsandbytes, outlier columns in 16 bits."""

    bits: ClassVar[int] = 8
    is_exact: ClassVar[bool] = False

    method: Literal["int8"] = "int8"
    outlier_threshold: Annotated[float, Field(ge=0.0)] = 6.0
    """Activation magnitude above which a column is computed in 16 bits; 0 turns that off."""

    def loading_config(self, dtype: "torch.dtype") -> Any:
        """Return bitsandbytes' settings."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.outlier_threshold)

    @classmethod
    def kind_of(cls, layer: "nn.Module") -> str | None:
        """Name the format, read from the weight itself."""
        return "int8" if type(getattr(layer, "weight", None)).__name__ == "Int8Params" else None

    def settings_of(self, layer: "nn.Module") -> tuple[Any, ...]:
        """Return the format."""
        return (self.kind_of(layer),)

    def wanted_settings(self, dtype: "torch.dtype") -> tuple[Any, ...]:
        """Return the format."""
        return (self.method,)

    def quantized_weights(
        self, skeleton: "PreTrainedModel", dtype: "torch.dtype"
    ) -> dict[str, bool]:
        """Let transformers choose, as it does when it loads a model."""
        from llmtune.models.quantization.bnb import chosen_weights

        return chosen_weights(skeleton, self.loading_config(dtype), dtype)

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Return a byte for each weight, and a scale for each row."""
        return math.prod(shape) + SCALE_BYTES * shape[0]

    @classmethod
    def dense_weight(cls, layer: "nn.Module") -> "Callable[[], Tensor] | None":
        """Return a function that dequantizes the weight of a layer that has not run yet."""
        weight: Any = getattr(layer, "weight", None)
        if cls.kind_of(layer) is None or weight.SCB is None:
            return None
        from llmtune.models.quantization.bnb import dequantize_int8

        return lambda: dequantize_int8(weight)

    def round_trip(self, device: "torch.device", dtype: "torch.dtype") -> RoundTrip:
        """Return bitsandbytes' quantization and back."""
        from llmtune.models.quantization.bnb import Int8RoundTrip

        return Int8RoundTrip(device, dtype)

    def notices(self, dtype: "torch.dtype") -> Iterator[str]:
        """Say that products run in float16."""
        if str(dtype) != "torch.float16":
            yield f"int8 layers round their inputs from {dtype} to float16"
