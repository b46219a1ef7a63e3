"""Weights that stay as they are."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmtune.models.quantization.base import Quantization, RoundTrip

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class NoQuantization(Quantization):
    """Weights stay in the model's dtype; the same as writing `quantization: null`."""

    is_quantized: ClassVar[bool] = False
    bits: ClassVar[int] = 16
    is_cached: ClassVar[bool] = False
    fusable_layer: ClassVar[str | None] = "Linear"

    method: Literal["none"] = "none"

    def loading_config(self, dtype: "torch.dtype") -> Any:
        """Return None."""
        return None

    @classmethod
    def kind_of(cls, layer: "nn.Module") -> str | None:
        """Return None: a dense layer is called by its dtype."""
        return None

    def settings_of(self, layer: "nn.Module") -> tuple[Any, ...]:
        """Return (): there are none."""
        return ()

    def wanted_settings(self, dtype: "torch.dtype") -> tuple[Any, ...]:
        """Return (): there are none."""
        return ()

    def quantized_weights(
        self, skeleton: "PreTrainedModel", dtype: "torch.dtype"
    ) -> dict[str, bool]:
        """Return {}: no weight is quantized."""
        return {}

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Refuse: the bytes of a dense weight follow from the model's dtype."""
        raise NotImplementedError

    def round_trip(self, device: "torch.device", dtype: "torch.dtype") -> RoundTrip:
        """Refuse: a dense weight makes none."""
        raise NotImplementedError
