"""What a quantization says of itself (light: torch is imported inside the methods)."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from llmtune.schema import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class RoundTrip(Protocol):
    """A dense weight as its quantized layer computes with it, some rows at a time."""

    @property
    def block_size(self) -> int:
        """How many consecutive weights share a scale."""

    def measure(self, tiles: "Iterable[Tensor]") -> "Tensor | None":
        """Return every block's scale, if it depends on the whole weight; else None."""

    def apply(self, tile_RC: "Tensor", scales_B: "Tensor | None") -> "Tensor":
        """Return some rows as the quantized layer computes with them, on the CPU."""


class Quantization(Section):
    """One way to keep the weights of a frozen base; it is listed in `quantization.config`."""

    is_quantized: ClassVar[bool] = True
    bits: ClassVar[int]
    """Of a weight, without its scales."""
    is_exact: ClassVar[bool] = True
    """Whether a layer's output is the product with its dense weight; LLM.int8 rounds inputs too."""
    is_cached: ClassVar[bool] = True
    """Whether transformers can save what was quantized, so that the next load reads it."""
    fusable_layer: ClassVar[str | None] = None
    """The name of PEFT's layer class over its weights, if training may compute such layers
    itself from `dense_weight`; None leaves them alone."""

    packed_marker: ClassVar[str | None] = None
    """The suffix of the tensor by which a checkpoint says that a weight is packed in this format;
    None if llmtune reads no such checkpoint."""

    method: str

    @abstractmethod
    def loading_config(self, dtype: "torch.dtype") -> Any:
        """Return the `quantization_config` for transformers; None loads the weights as they are."""

    def finish_loading(self, model: "PreTrainedModel") -> None:
        """Quantize or prepare a model whose weights were just loaded, in place."""

    @classmethod
    @abstractmethod
    def kind_of(cls, layer: "nn.Module") -> str | None:
        """Name the format of a layer if it is one of this method's, read from the layer itself."""

    @abstractmethod
    def settings_of(self, layer: "nn.Module") -> tuple[Any, ...]:
        """Return what of the settings can be read from a loaded layer, the format first."""

    @abstractmethod
    def wanted_settings(self, dtype: "torch.dtype") -> tuple[Any, ...]:
        """Return what `settings_of` should find in a model of `dtype`."""

    @abstractmethod
    def quantized_weights(
        self, skeleton: "PreTrainedModel", dtype: "torch.dtype"
    ) -> dict[str, bool]:
        """Say which weights of a model are quantized when it is loaded.

        Args:
            skeleton: the model without weights; it may be changed.
            dtype: of what is not quantized.

        Returns:
            Parameter name in memory -> whether the checkpoint holds it transposed ([in, out]).
        """

    @abstractmethod
    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the memory of a weight of this shape, with its scales."""

    @abstractmethod
    def round_trip(self, device: "torch.device", dtype: "torch.dtype") -> RoundTrip:
        """Return how a weight loaded in `dtype` on `device` comes out of its quantization."""

    @classmethod
    def dense_weight(cls, layer: "nn.Module") -> "Callable[[], Tensor] | None":
        """Return a function that gives the dense weight [out, in] of a layer of this method."""
        return None

    @classmethod
    def gives_dense_weights(cls) -> bool:
        """Say whether the method has a `dense_weight` of its own."""
        return cls.dense_weight.__func__ is not Quantization.dense_weight.__func__  # type: ignore[attr-defined]

    def for_comparison(self) -> "Quantization":
        """Return the same weights with products in the model's own dtype."""
        return self

    def notices(self, dtype: "torch.dtype") -> Iterator[str]:
        """Yield what the user should know of a model of `dtype`."""
        yield from ()
