"""Adapted modules whose weight the model reads itself, past their adapter.

`self.dt_proj.weight @ x` instead of `self.dt_proj(x)`: peft's layer hands out the base's weight, so
the adapter does nothing in the live model, is not trained, and would do something once merged.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmtune.models.quantization.describe import LAYER_NUMBER

SHOWN = 3


def find_bypassed(model: PeftModel, run: Callable[[], object]) -> tuple[str, ...]:
    """Run the model, and return the adapted modules whose weight was read outside of any module.

    Only what is computed from a weight counts, not a look at its type or shape.

    Args:
        model: with its adapter on.
        run: a forward pass of it.

    Returns:
        Full names in the base, in its order.
    """
    watched = _watched(model.get_base_model())
    if not watched:
        return ()
    with _Watch(model.get_base_model(), watched) as watch:
        run()
    names = (name for layers in watched.values() for name, _ in layers)
    return tuple(dict.fromkeys(name for name in names if name in watch.found))


def describe_bypassed(names: tuple[str, ...]) -> str:
    """Say in one clause which modules these are, like-named ones once."""
    patterns = list(dict.fromkeys(LAYER_NUMBER.sub("*", name) for name in names))
    more = f" and {len(patterns) - SHOWN} more" if len(patterns) > SHOWN else ""
    return (
        f"this model reads the weight of {', '.join(patterns[:SHOWN])}{more} itself, past the "
        "adapter, which then does nothing until it is merged"
    )


_Layers = list[tuple[str, frozenset[nn.Module]]]
_Watched = dict[int, _Layers]
"""{identity of a tensor that adapters change: whose it is, and the modules that may read it}."""


def _watched(base: nn.Module) -> _Watched:
    found: _Watched = defaultdict(list)
    wrappers: dict[nn.Module, nn.Module] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, AuxiliaryTrainingWrapper):
            wrappers.update(dict.fromkeys(layer.modules(), layer))
        if not isinstance(layer, BaseTunerLayer):
            continue
        readers = frozenset((layer, wrappers.get(layer, layer)))
        whose = (name.replace(".base_layer", "").removesuffix(".token_adapter"), readers)
        for key in _changed(layer):
            tensor = getattr(layer.get_base_layer(), key, None)
            if isinstance(tensor, Tensor):
                found[id(tensor)].append(whose)
    return found


def _changed(layer: BaseTunerLayer) -> tuple[str, ...]:
    if isinstance(layer, ParamWrapper):
        return (layer.parameter_name,)
    return ("weight", "bias") if any(getattr(layer, "lora_bias", {}).values()) else ("weight",)


class _Watch(TorchFunctionMode):
    """Sees every tensor that torch is given, and which modules are running then."""

    def __init__(self, model: nn.Module, watched: _Watched) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._watched = dict(watched)
        self._views: list[Tensor] = []
        """Kept alive, so that no other tensor gets the identity of one that is watched."""
        self._running: list[nn.Module] = []
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> "_Watch":
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._begin))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, value, trace)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keywords = kwargs or {}
        name = getattr(func, "__name__", "")
        changes_first = name.endswith("_") and not name.endswith("__")  # `weight.clamp_()`
        read = []
        for tensor in _tensors((*args[changes_first:], *keywords.values())):
            layers = self._watched.get(id(tensor))
            if layers and not self._is_inside(layers, tensor):
                read.append(layers)
        try:
            result = func(*args, **keywords)
        except RuntimeError:  # packed weights do not have the shape that the model expects
            self._find(read)
            raise
        if name == "__get__":  # `weight.data`, `weight.T`, or a look at its shape
            self._watch_view(result, read)
        elif _computes(result):
            self._find(read)
        return result

    def _find(self, read: list[_Layers]) -> None:
        self.found.update(name for layers in read for name, _ in layers)

    def _watch_view(self, view: Any, read: list[_Layers]) -> None:
        if isinstance(view, Tensor) and read and id(view) not in self._watched:
            self._views.append(view)
            self._watched[id(view)] = read[0]

    # Forward hooks, so that what runs inside of what is known.
    def _begin(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        while self._running and self._running.pop() is not module:
            pass

    def _is_inside(self, layers: _Layers, tensor: Tensor) -> bool:
        """Whether an adapted layer is running, or a module of which the tensor is a parameter."""
        if any(module in readers for module in self._running for _, readers in layers):
            return True
        owners = self._running[-1:]
        return any(own is tensor for module in owners for own in module._parameters.values())


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (one for one in value if isinstance(one, Tensor))


def _computes(result: Any) -> bool:
    return isinstance(result, Tensor) or (
        isinstance(result, list | tuple) and any(isinstance(one, Tensor) for one in result)
    )
