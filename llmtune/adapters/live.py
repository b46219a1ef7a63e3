"""A live adapter: attached to its base, asked for its method, and weakened or strengthened.

At a strength other than 1 the model is base + strength * (adapted - base), until it is set back.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from llmtune.adapters.base import Adapter
from llmtune.adapters.config import method_of
from llmtune.adapters.over_quantized import is_over_quantized
from llmtune.errors import LlmtuneError
from llmtune.io.json_files import blamed_on

OWN_PARAMETERS = "llmtune_own_parameters"
"""Attribute of a model: {parameter: the base's values}, where an adapter was loaded over them."""
# peft reads a property that transformers renamed, and corrects fan_in_fan_out itself if
# Linear and Conv1D are both targets.
UNWANTED = (
    (r".is_gradient_checkpointing. is deprecated", FutureWarning),
    (r"fan_in_fan_out is set to", UserWarning),
    (r"Invalid .oft_block_size.", UserWarning),
    (r".lora_bias=True. was passed", UserWarning),  # merging refuses it itself, before training
)


def attach(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Return `model` (changed in place) with freshly initialized adapter layers, in float32.

    Raises:
        ValueError: the config's modules are not in the model.
    """
    method = method_of(config.to_dict())
    with warnings.catch_warnings(), method.attaching():
        for message, category in UNWANTED:
            warnings.filterwarnings("ignore", message=message, category=category)
        adapted = PeftModelForCausalLM(model, config, autocast_adapter_dtype=True)
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            method.fit(layer)
            if is_over_quantized(layer):
                method.fit_quantized(layer)
    return adapted


def live_method(model: PeftModel) -> type[Adapter]:
    """Return the method of a live model's adapter, or of the first of several.

    Raises:
        LlmtuneError: it is not a method that llmtune has.
    """
    return method_of(next(iter(model.peft_config.values())).to_dict())


@contextlib.contextmanager
def adapter_strength(model: PeftModel, strength: float) -> Iterator[None]:
    """Weaken the active adapter while the block runs; nothing is loaded, all is put back.

    Every adapted weight is W + strength * (W' - W), as `merge --strength` writes it (WiSE-FT,
    arXiv:2109.01903). A method may weaken a layer itself (`Adapter.weaken`: low-rank products get
    their scaling multiplied, which costs nothing). Other layers and whole saved modules run twice
    and their outputs are blended. At 1 the model is the tuned one and at 0 the base, bit for bit.

    Raises:
        LlmtuneError: the strength is negative; the adapter was initialized by rewriting the base;
            or it holds weights that cannot be blended so (biases, single token rows).
    """
    if strength < 0:
        raise LlmtuneError(f"strength {strength:g}: expected 0 (the base) or more")
    refuse_rewritten_base(model)
    if strength == 1:
        yield
        return
    saved, adapted = _sort_layers(model)
    if strength == 0:
        with switched_off(model):
            yield
        return
    method = live_method(model)
    undo: list[Callable[[], None]] = []
    try:
        for layer in adapted:
            weakened = method.weaken(layer, strength)
            if weakened is None:
                saved.append((layer, layer.get_base_layer()))
            else:
                undo.append(weakened)
        for layer, original in saved:
            hook = layer.register_forward_hook(_blending(original, strength), with_kwargs=True)
            undo.append(hook.remove)
        yield
    finally:
        for put_back in undo:
            put_back()


def keep_own(model: PeftModel, names: Iterable[str]) -> None:
    """Remember the base's own parameters of these names, before an adapter is loaded over them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = {parameters[name]: parameters[name].detach().clone() for name in names}
    setattr(model, OWN_PARAMETERS, own)


@contextlib.contextmanager
def switched_off(model: PeftModel) -> Iterator[None]:
    """Switch the adapter off while the block runs, with what was loaded in the base's place.

    PEFT leaves trained biases and tables of embeddings where they are: that model is not the base.
    """
    kept: dict[nn.Parameter, torch.Tensor] = getattr(model, OWN_PARAMETERS, {})
    loaded = {parameter: parameter.data for parameter in kept}
    with contextlib.ExitStack() as stack:
        if kept:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
        stack.enter_context(_gradients_kept(model))
        stack.enter_context(model.disable_adapter())
        try:
            for parameter, own in kept.items():
                parameter.data = own
            yield
        finally:
            for parameter, values in loaded.items():
                parameter.data = values


@contextlib.contextmanager
def _gradients_kept(model: PeftModel) -> Iterator[None]:
    """Put back which parameters have gradients: PEFT gives one to all of an adapter's."""
    frozen = [one for one in model.parameters() if not one.requires_grad]
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def add_adapters(
    model: PeftModel, others: Sequence[tuple[Path, float]], *, first_weight: float
) -> None:
    """Load further adapters onto a live one and switch all of them on, each at its weight.

    The model is of no use for anything else afterwards.

    Args:
        model: a model with one adapter whose method can be combined (`Adapter.why_only_alone`).
        others: the directories and weights of the further adapters.
        first_weight: the weight of the adapter that the model has.
    """
    (name,) = model.peft_config
    weights = {name: first_weight}
    for place, (directory, weight) in enumerate(others):
        with blamed_on(directory, "peft"):
            model.load_adapter(str(directory), adapter_name=f"other{place}")
        weights[f"other{place}"] = weight
    model.base_model.set_adapter(list(weights))
    method = live_method(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            method.weigh(module, weights)


def refuse_rewritten_base(model: PeftModel) -> None:
    """Refuse an adapter without which the model is not its base.

    Raises:
        LlmtuneError: names the adapter and how it was initialized.
    """
    for name, config in model.peft_config.items():
        values = config.to_dict()
        start = method_of(values).rewritten_base(values)
        if start is not None:
            raise LlmtuneError(
                f"adapter {name!r} was initialized with {start!r}, which changes the base weights: "
                "switching it off does not give the base. Load the base by itself for its arm."
            )


def _sort_layers(
    model: PeftModel,
) -> tuple[list[tuple[nn.Module, nn.Module]], list[BaseTunerLayer]]:
    """Return whole saved modules with their originals, and the method's own layers."""
    for name, config in model.peft_config.items():
        if getattr(config, "bias", "none") != "none":
            raise LlmtuneError(
                f"adapter {name!r} also trained biases (bias: {config.bias}), which have no "
                "strength: only strength 1 can be measured"
            )
    saved: list[tuple[nn.Module, nn.Module]] = []
    adapted: list[BaseTunerLayer] = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            saved.append((module, module.original_module))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise LlmtuneError(
                f"{name}: trained as single token rows, which have no strength: only strength 1 "
                "can be measured"
            )
        elif isinstance(module, BaseTunerLayer):
            adapted.append(module)
    return saved, adapted


def _blending(original: nn.Module, strength: float) -> Callable[..., torch.Tensor]:
    """Return a hook that moves a layer's output towards that of `original`, linear in its weights.

    Linear layers, embeddings and norms are, so blended outputs are those of blended weights.
    """

    def blend(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        base = original(*args, **kwargs)
        return base + strength * (output - base)

    return blend
