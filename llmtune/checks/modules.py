"""Each adapted module of the live model beside its merged one: outputs, and the weights themselves.

A whole model's divergence says little of an adapter whose effect is small: it may be merged wholly
wrong within any absolute bound. Module by module, an error shows against the adapter's own effect,
and beside the exact sum, weight by weight, even an effect below the rounding of 16 bits does.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.bypassed import find_bypassed
from llmtune.adapters.live import switched_off
from llmtune.io.progress import iter_with_bar
from llmtune.scoring.batches import inference, model_device, pad_rows, run_forward

NUM_SEQUENCES = 2
NUM_POSITIONS = 64
MAX_SHARE = 0.02
"""Of the adapter's effect on a module's output, what a right merge may differ by."""
ROUNDINGS = 4.0
"""Rounding errors of a module's output that a right merge may differ by. A merge has about half of
one for its stored weights; a module that is more than one product has several."""
WEIGHT_ROUNDINGS = 1.05
"""Steps of the stored format that a right merged weight is from the exact sum: half of one, and
another half if the base was rounded before."""
SUM_ERROR = 1e-5
"""Of a module's largest delta, what adding in a different order may change in float32."""


@dataclass(frozen=True)
class ModuleDifference:
    """How far a merged module's output is from the live one's, as root sums of squares."""

    module: str
    difference: float
    effect: float
    """Between the live module with its adapter and without it."""
    rounding: float
    """What the stored weights and the arithmetic round."""
    num_wrong_weights: int = 0
    """Weights that are further from the exact sum than rounding takes them."""

    @property
    def is_right(self) -> bool:
        """Whether the difference is rounding, or small beside the adapter's effect."""
        allowed = max(MAX_SHARE * self.effect, ROUNDINGS * self.rounding)
        return self.difference <= allowed and not self.num_wrong_weights

    def describe(self) -> str:
        """Say it in one line."""
        if self.num_wrong_weights:
            return f"{self.module} ({self.num_wrong_weights:,} weights are not base + adapter)"
        share = f"{self.difference / self.effect:.0%} of its effect" if self.effect else "no effect"
        return f"{self.module} (off by {self.difference:.2g}, {share})"


@dataclass(frozen=True)
class ComparedModules:
    """What became of the adapted modules."""

    wrong: tuple[ModuleDifference, ...] = ()
    bypassed: tuple[str, ...] = ()
    """Adapted modules whose weight the live model reads itself: what their adapter adds is in the
    merged model only."""


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


def compare_modules(
    live: nn.Module,
    merged: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    stored_dtype: torch.dtype,
) -> ComparedModules:
    """Return every module whose merged output is not the live one's.

    Nothing is compared if `live` has no adapter, or one on quantized weights.
    """
    if not isinstance(live, PeftModel) or not _is_dense(live):
        return ComparedModules()
    calls: dict[str, tuple[nn.Module, list[_Call]]] = {}
    bypassed = find_bypassed(live, lambda: calls.update(_record(live, sequences)))
    counterparts = dict(merged.named_modules())
    found = []
    with inference(live), inference(merged):
        # Switching an adapter off walks the whole model: once, not for every module.
        with switched_off(live):
            effects = {name: _effect(*call) for name, call in calls.items() if name in counterparts}
        for name in iter_with_bar(list(calls), "check", unit="modules"):
            module, made = calls[name]
            other = counterparts.get(name)
            if other is not None:
                compared = _compare(name, effects[name], other, made, stored_dtype)
                wrong = _count_wrong_weights(module, other, stored_dtype)
                found.append(replace(compared, num_wrong_weights=wrong))
    return ComparedModules(
        tuple(one for one in found if not one.is_right),
        tuple(name for name in bypassed if _adds_something(live, name)),
    )


def _adds_something(live: PeftModel, name: str) -> bool:
    """Whether a module's adapter changes its weights; one that was never trained does not."""
    owner = live.get_base_model().get_submodule(name)
    layers = [one for one in owner.modules() if isinstance(one, BaseTunerLayer)]
    return any(_changes(*_exact_parameters(layer)) for layer in layers)


def _changes(before: dict[str, Tensor], exact: dict[str, Tensor]) -> bool:
    return not before or any(
        not torch.allclose(weight, before[name], rtol=SUM_ERROR, atol=0.0)
        for name, weight in exact.items()
    )


def _is_dense(live: PeftModel) -> bool:
    layers = (layer for layer in live.modules() if isinstance(layer, BaseTunerLayer))
    weights = (getattr(layer.get_base_layer(), "weight", None) for layer in layers)
    return all(weight is None or weight.is_floating_point() for weight in weights)


def _record(
    live: PeftModel, sequences: Sequence[Sequence[int]]
) -> dict[str, tuple[nn.Module, list[_Call]]]:
    """Run the live model, and keep what every compared module was given and returned."""
    calls: dict[str, tuple[nn.Module, list[_Call]]] = {}
    handles = []
    for name, module in _compared(live):
        made: list[_Call] = []
        calls[name] = (module, made)
        handles.append(module.register_forward_hook(_keeper(made), with_kwargs=True))
    try:
        with inference(live):
            for ids in sequences[:NUM_SEQUENCES]:
                run_forward(live, pad_rows([ids[:NUM_POSITIONS]], model_device(live), left=False))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _keeper(made: list[_Call]) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor):
            made.append(_Call(args, keywords, output.clone()))  # some models scale it in place

    return keep


def _compared(live: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost adapted modules, and both ends of the vocabulary, which may be tied."""
    model = live.get_base_model()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        is_adapted = isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        if is_adapted or any(module is end for end in ends):
            inside = (*inside[-1:], f"{name}.") if is_adapted else inside
            yield name, module


def _effect(module: nn.Module, made: Sequence[_Call]) -> float:
    """Return how far the outputs are from those without the adapter, which is switched off now."""
    squares = 0.0
    for call in made:
        before = module(*call.args, **call.keywords).float()
        squares += float((before - call.output.float()).square().sum())
    return float(squares**0.5)


def _compare(
    name: str, effect: float, other: nn.Module, made: Sequence[_Call], stored_dtype: torch.dtype
) -> ModuleDifference:
    difference = rounding = 0.0
    for call in made:
        expected = call.output.float()
        device = model_device(other)
        args = [_to(value, device) for value in call.args]
        keywords = {key: _to(value, device) for key, value in call.keywords.items()}
        found = other(*args, **keywords).float().to(expected.device)
        difference += float((found - expected).square().sum())
        rounding += _rounding(other, args, call.output, stored_dtype) ** 2
    return ModuleDifference(name, difference**0.5, effect, rounding**0.5)


def _rounding(
    merged: nn.Module, args: Sequence[Any], output: Tensor, stored_dtype: torch.dtype
) -> float:
    """Return the root sum of squares of what rounding the weight and the products comes to."""
    stored, computed = torch.finfo(stored_dtype).eps, torch.finfo(output.dtype).eps
    size = float(output.float().square().sum()) ** 0.5
    if isinstance(merged, nn.Linear):
        inputs = args[0].float().reshape(-1, args[0].shape[-1]).square().sum(0)
        weights = merged.weight.float().square().sum(0)
        size = max(size, float(inputs @ weights) ** 0.5)
    error: float = (stored + 4 * computed) * size
    return error


def _count_wrong_weights(module: nn.Module, merged: nn.Module, stored_dtype: torch.dtype) -> int:
    """Count a module's merged weights that are not the exact sum, but for their rounding.

    None are counted if the layer's weights cannot be had from peft alone: single token rows, and
    layers that are blended at a strength. A method that mixes weights also mixes what rounding the
    base before does to each, so such a base is tried too.
    """
    if module._forward_hooks:
        return 0
    wrong = _count_off(module, merged, stored_dtype)
    if wrong:
        wrong = min(wrong, _count_off(module, merged, stored_dtype, is_base_rounded=True))
    return wrong


def _count_off(
    module: nn.Module,
    merged: nn.Module,
    stored_dtype: torch.dtype,
    *,
    is_base_rounded: bool = False,
) -> int:
    before, exact = _exact_parameters(module, base_dtype=stored_dtype if is_base_rounded else None)
    found = dict(merged.named_parameters())
    is_turned = isinstance(merged, Conv1D) and not isinstance(_innermost(module), Conv1D)
    wrong = 0
    for name, weight in exact.items():
        if name not in found or not found[name].is_floating_point():
            continue
        other = found[name].to(weight.device).float()
        other = other.T if is_turned and other.dim() == 2 else other
        limits = torch.finfo(stored_dtype), torch.finfo(found[name].dtype)
        step = max(limit.eps for limit in limits)
        size = torch.maximum(weight.abs(), before[name].abs())
        allowed = WEIGHT_ROUNDINGS * step * size + step * max(limit.tiny for limit in limits)
        allowed += SUM_ERROR * (weight - before[name]).abs().max()
        wrong += int(((other - weight).abs() > allowed).sum())
    return wrong


def _exact_parameters(
    module: nn.Module, *, base_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the parameters of a module's base and of base + adapter, added in float32 by peft.

    Args:
        module: a module of the live model.
        base_dtype: what its base is rounded to first; None leaves it as it is.
    """
    if isinstance(module, ModulesToSaveWrapper):
        (active,) = module.active_adapters
        saved = _parameters(module.modules_to_save[active])
        return saved, saved
    if not isinstance(module, BaseTunerLayer) or not hasattr(module, "merge"):
        return {}, {}
    own = copy.deepcopy(module).float()
    if base_dtype is not None:
        _innermost(own).to(base_dtype).float()
    before = {name: weight.clone() for name, weight in _parameters(_innermost(own)).items()}
    for layer in own.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return before, _parameters(_innermost(own))


def _innermost(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().float() for name, weight in module.named_parameters()}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
