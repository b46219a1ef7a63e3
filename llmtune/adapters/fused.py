"""LoRA linears computed by one autograd function a group, in training and in scoring.

Only the forward methods of single layers are replaced, inside a context, so weights, names and what
is saved stay stock PEFT. Layers that read the same input (q, k, v; gate, up) are found by watching
one forward pass; the first of them to be called computes for all.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.base import Adapter
from llmtune.adapters.live import live_method
from llmtune.adapters.low_rank import has_hooks
from llmtune.models.decoder import decoder_of
from llmtune.models.fast_paths import switched_off
from llmtune.models.hardware import device_name
from llmtune.models.live import is_sharded
from llmtune.models.probing import ProbeFailedError, probing
from llmtune.models.quantization.describe import dense_weight, is_dequantized_product
from llmtune.ops.lora_linear import AdapterCopies, LoraLinear, lora_linears

FUSED_MARK = "is_fused_lora"
"""Attribute of the forward that a covered layer runs."""


class FusedTable(NamedTuple):
    """How many LoRA layers are fused, in how many groups, and why others are not."""

    num_fused: int
    num_groups: int
    stock: dict[str, int]
    """Reason -> number of layers that keep PEFT's forward."""

    def describe(self) -> str:
        """Return it in words, for the terminal and the manifest."""
        parts = [f"{self.num_fused} fused in {self.num_groups} groups"] if self.num_fused else []
        parts += [f"{count} stock ({reason})" for reason, count in sorted(self.stock.items())]
        return ", ".join(parts) or "none"


@contextmanager
def fused_lora(model: PeftModel, run_forward: Callable[[], object]) -> Iterator[FusedTable]:
    """Fuse the LoRA linears of `model` inside; outside they are PEFT's again.

    Args:
        model: the model with its adapter.
        run_forward: runs the decoder once on anything; shows which layers share an input.
    """
    method = live_method(model)
    stock: Counter[str] = Counter()
    fusable: list[BaseTunerLayer] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            reason = _find_obstacle(method, module)
            if reason is None:
                fusable.append(module)
            else:
                stock[reason] += 1
    groups = [_Group(layers, method) for layers in _find_groups(fusable, run_forward)]
    for group in groups:
        group.attach()

    # Fused optimizers write without advancing the tensors' version, so the copies are marked stale.
    def forget(*_: object) -> None:
        for group in groups:
            group.forget()

    hook = register_optimizer_step_post_hook(forget)
    try:
        yield FusedTable(len(fusable), len(groups), dict(stock))
    finally:
        hook.remove()
        for group in groups:
            group.detach()


_KNOWN_GROUPS: WeakKeyDictionary[nn.Module, list[list[BaseTunerLayer]]] = WeakKeyDictionary()


@contextmanager
def fused_inference(model: nn.Module) -> Iterator[None]:
    """Fuse what can be fused of a model's adapter while the block runs without gradients.

    PEFT computes every adapter in float32 and adds it there: half as much time again as the base
    alone. Here the products run in the model's dtype, as they do in training; in float32 the
    results are PEFT's. Models without an adapter and layers that are fused already stay as they
    are, and so do those whose quantized base computes something else than the product with its
    dequantized weight, and all where a test of this machine switched it off. The adapter can be
    switched off or weakened inside.
    """
    if not isinstance(model, PeftModel) or _is_switched_off(model):
        yield
        return
    method = live_method(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    fusable = [
        layer for layer in layers if _is_product(layer) and not _find_obstacle(method, layer)
    ]
    known = _KNOWN_GROUPS.get(model, [])
    if {layer for group in known for layer in group} != set(fusable):
        known = _find_groups(fusable, lambda: _run_three_tokens(model))
        _KNOWN_GROUPS[model] = known
    groups = [_Group(each, method) for each in known]
    for group in groups:
        group.attach()
    try:
        yield
    finally:
        for group in groups:
            group.detach()


def _is_switched_off(model: PeftModel) -> bool:
    weight = next(model.parameters())
    off = switched_off(
        str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        device_name(weight.device),
        is_quantized=getattr(model.get_base_model(), "is_quantized", False),
    )
    return "fused_scoring" in off


def _is_product(layer: BaseTunerLayer) -> bool:
    """Whether the base's output is the product with a weight: some round their inputs too."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Linear | Conv1D) and base.weight.is_floating_point():
        return True
    return is_dequantized_product(base)


def _run_three_tokens(model: PeftModel) -> object:
    device = next(model.parameters()).device
    return decoder_of(model.get_base_model())(
        input_ids=torch.tensor([[1, 2, 3]], device=device), use_cache=False
    )


def is_fused(layer: BaseTunerLayer) -> bool:
    """Whether `fused_lora` covers the layer now; others may have replaced its forward too."""
    return hasattr(layer.__dict__.get("forward"), FUSED_MARK)


def _find_obstacle(method: type[Adapter], layer: BaseTunerLayer) -> str | None:
    """Return why a layer must keep PEFT's own forward, or None."""
    reason = method.why_not_fused(layer)
    if reason is not None:
        return reason
    base = layer.get_base_layer()
    if "forward" in layer.__dict__ or has_hooks(base):
        return "hooks are attached"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "the base layer is trained"
    if is_sharded(getattr(base, "bias", None)) or (
        isinstance(base, Conv1D) and is_sharded(base.weight)
    ):
        return "its bias is sharded"
    if type(base) not in (nn.Linear, Conv1D) and dense_weight(base) is None:
        return f"{type(base).__name__} bases are not covered"
    return None


def _find_groups(
    layers: Sequence[BaseTunerLayer], run_forward: Callable[[], object]
) -> list[list[BaseTunerLayer]]:
    """Group the layers that are called with the very same tensor."""
    calls: list[tuple[Tensor, BaseTunerLayer]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: calls.append((inputs[0], module)))
        for layer in layers
    ]
    try:
        with torch.no_grad(), probing():
            run_forward()
    except ProbeFailedError:
        return [[layer] for layer in layers]  # who shares an input is not known
    finally:
        for handle in handles:
            handle.remove()
    by_input: dict[int, list[BaseTunerLayer]] = {}
    for value, layer in calls:  # `calls` keeps the tensors alive, so their ids are unique
        by_input.setdefault(id(value), []).append(layer)
    counts = Counter(layer for _, layer in calls)
    groups = [group for group in by_input.values() if all(counts[layer] == 1 for layer in group)]
    grouped = {layer for group in groups for layer in group}
    return groups + [[layer] for layer in layers if layer not in grouped]


class _Group:
    """Layers with one input; a call to one of them computes all, the others pick theirs up."""

    def __init__(self, layers: Sequence[BaseTunerLayer], method: type[Adapter]) -> None:
        self._layers, self._method = tuple(layers), method
        self._linears = tuple(describe_linear(layer, method) for layer in layers)
        self._copies = AdapterCopies()
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def _take_strength(self) -> None:
        """Take over a scaling that has changed: the adapter was weakened, or put back."""
        scalings = [_active_factors(layer, self._method)[2] for layer in self._layers]
        if scalings != [linear.scaling for linear in self._linears]:
            self._linears = tuple(
                linear._replace(scaling=scaling)
                for linear, scaling in zip(self._linears, scalings, strict=True)
            )

    def attach(self) -> None:
        for index, layer in enumerate(self._layers):
            layer.forward = self._forward_of(index, layer)

    def detach(self) -> None:
        self._input, self._waiting = None, {}
        for layer in self._layers:
            del layer.forward

    def forget(self) -> None:
        """Copy the adapters again at the next call: their masters have changed."""
        self._copies.forget()

    def _forward_of(self, index: int, layer: BaseTunerLayer) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: object, **kwargs: object) -> Tensor:
            if layer.disable_adapters or layer.merged or args or kwargs:
                return type(layer).forward(layer, x, *args, **kwargs)
            return self._read_output(index, x)

        setattr(forward, FUSED_MARK, True)
        return forward

    def _read_output(self, index: int, x: Tensor) -> Tensor:
        if self._input is not x or index not in self._waiting:
            dtype = compute_dtype(x)
            self._take_strength()
            outputs = lora_linears(x, self._linears, self._copies.read(self._linears, dtype))
            self._waiting = dict(enumerate(outputs))
            self._input = x
        output = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return output


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that products with `x` run in: autocast's, else its own."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def describe_linear(layer: BaseTunerLayer, method: type[Adapter]) -> LoraLinear:
    """Return a PEFT layer with one active adapter as our ops see it; tensors are shared."""
    base = layer.get_base_layer()
    return LoraLinear(_read_weight(base), *_active_factors(layer, method), bias_O=base.bias)


def _active_factors(layer: BaseTunerLayer, method: type[Adapter]) -> tuple[Tensor, Tensor, float]:
    """Return A, B and the scaling of a layer's one active adapter."""
    found = (method.factors_of(layer, name) for name in layer.active_adapters)
    (factors,) = (each for each in found if each is not None)
    return factors


def _read_weight(base: nn.Module) -> Tensor | Callable[[], Tensor]:
    if isinstance(base, Conv1D):
        return base.weight.T
    dequantize = dense_weight(base)
    if dequantize is not None:
        return dequantize
    if is_sharded(base.weight):
        return lambda: base.weight  # whole while its layer runs, forward or backward
    return base.weight
