"""A live adapter at a strength other than 1: base + strength * (adapted - base), and back again."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from llmtune.errors import LlmtuneError

REWRITING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's weights, so that the adapter off is not the base."""


@contextlib.contextmanager
def adapter_strength(model: PeftModel, strength: float) -> Iterator[None]:
    """Weaken the active adapter while the block runs; nothing is loaded, all is put back.

    Every adapted weight is W + strength * (W' - W), as `merge --strength` writes it (WiSE-FT,
    arXiv:2109.01903). Low-rank products get their scaling multiplied, which costs nothing. Layers
    of another form (DoRA: W' = m (W + s BA) / ||W + s BA||) and whole saved modules run twice and
    their outputs are blended. At 1 the model is the tuned one and at 0 the base, bit for bit.

    Raises:
        LlmtuneError: the strength is negative; the adapter was initialised by rewriting the base;
            or it holds weights that cannot be blended so (biases, single token rows).
    """
    if strength < 0:
        raise LlmtuneError(f"strength {strength:g}: expected 0 (the base) or more")
    refuse_rewritten_base(model)
    if strength == 1:
        yield
        return
    blended, scaled = _sort_layers(model)
    if strength == 0:
        with model.disable_adapter():
            yield
        return
    known = [(layer, layer.scaling) for layer in scaled]
    hooks = [
        layer.register_forward_hook(_blending(original, strength), with_kwargs=True)
        for layer, original in blended
    ]
    try:
        for layer, scaling in known:
            layer.scaling = {name: value * strength for name, value in scaling.items()}
        yield
    finally:
        for layer, scaling in known:
            layer.scaling = scaling
        for hook in hooks:
            hook.remove()


def refuse_rewritten_base(model: PeftModel) -> None:
    """Refuse an adapter without which the model is not its base.

    Raises:
        LlmtuneError: names the adapter and how it was initialised.
    """
    for name, config in model.peft_config.items():
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(REWRITING_STARTS):
            raise LlmtuneError(
                f"adapter {name!r} was initialised with {start!r}, which changes the base weights: "
                "switching it off does not give the base. Load the base by itself for its arm."
            )


def _sort_layers(
    model: PeftModel,
) -> tuple[list[tuple[nn.Module, nn.Module]], list[LoraLayer]]:
    """Return (layer, its base) where outputs are blended, and the layers that are scaled."""
    for name, config in model.peft_config.items():
        if getattr(config, "bias", "none") != "none":
            raise LlmtuneError(
                f"adapter {name!r} also trained biases (bias: {config.bias}), which have no "
                "strength: only strength 1 can be measured"
            )
    blended: list[tuple[nn.Module, nn.Module]] = []
    scaled: list[LoraLayer] = []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            blended.append((module, module.original_module))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise LlmtuneError(
                f"{name}: trained as single token rows, which have no strength: only strength 1 "
                "can be measured"
            )
        elif isinstance(module, LoraLayer) and module.lora_variant:
            blended.append((module, module.get_base_layer()))
        elif isinstance(module, LoraLayer):
            scaled.append(module)
    return blended, scaled


def _blending(original: nn.Module, strength: float) -> Callable[..., torch.Tensor]:
    """Return a hook that moves a layer's output towards that of `original`, linear in its weights.

    Linear layers, embeddings and norms are, so blended outputs are those of blended weights.
    """

    def blend(_: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        base = original(*args, **kwargs)
        return base + strength * (output - base)

    return blend
