"""What peft's layers of some methods lack to be trained over a quantized weight, put right on them.

LoHa and LoKr take the shape of their update from the stored weight, which is packed; IA3 gives
float32 to a model that computes in 16 bits. Names, shapes and values of what is trained are peft's
own over a weight that is not quantized, and so is what is saved.
"""

from typing import Any

from peft.tuners.loha import Linear as LoHaLinear
from peft.tuners.lokr import Linear as LoKrLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, kron, nn

ADAPTER = "default"


def is_over_quantized(layer: BaseTunerLayer) -> bool:
    """Whether the base's weight under a layer is quantized."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def shape_update(layer: BaseTunerLayer) -> None:
    """Give a fresh LoHa or LoKr layer an update of its own widths, not of the packed weight's."""
    if isinstance(layer, LoHaLinear):
        rank, shape = layer.r[ADAPTER], (layer.out_features, layer.in_features)
        layer.create_adapter_parameters(ADAPTER, rank, shape)
        layer.reset_adapter_parameters(ADAPTER)
        layer.to(layer.get_base_layer().weight.device)
        layer.__class__ = LoHaOverQuantized
    elif isinstance(layer, LoKrLinear):
        layer.__class__ = LoKrOverQuantized


def keep_dtype(layer: nn.Module) -> None:
    """Let a layer give what it was given: 16 bits for 16 bits."""
    layer.register_forward_hook(_as_given)


class LoHaOverQuantized(LoHaLinear):
    """peft's layer, whose update [out, in] does not ask for the weight."""

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        """Return scaling * (A1 B1 * A2 B2)."""
        first = self.hada_w1_a[adapter_name] @ self.hada_w1_b[adapter_name]
        second = self.hada_w2_a[adapter_name] @ self.hada_w2_b[adapter_name]
        product: Tensor = self.scaling[adapter_name] * first * second
        return product


class LoKrOverQuantized(LoKrLinear):
    """peft's layer, whose update [out, in] does not ask for the weight."""

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        """Return scaling * kron(W1, W2)."""
        first, second = (self._factor(name, adapter_name) for name in ("lokr_w1", "lokr_w2"))
        product: Tensor = self.scaling[adapter_name] * kron(first, second)
        return product

    def _factor(self, name: str, adapter_name: str) -> Tensor:
        whole: nn.ParameterDict = getattr(self, name)
        if adapter_name in whole:
            return whole[adapter_name]
        low, high = getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
        product: Tensor = low[adapter_name] @ high[adapter_name]
        return product


def _as_given(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)
