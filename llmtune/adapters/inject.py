"""Attach an adapter to a loaded base: it alone is trained, and a table says where it sits."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.attach import attach
from llmtune.adapters.base import LowRankAdapter
from llmtune.adapters.module_selection import ModuleNames, choose_targets, shorten_targets
from llmtune.adapters.saved import start_from_adapter
from llmtune.errors import LlmtuneError
from llmtune.models.quantization import EXPERT_DIMENSIONS, LAYER_NUMBER, logical_size


@dataclass(frozen=True)
class InjectionRow:
    """Like-named modules that got the same adapter."""

    pattern: str
    """Name of the module (of the parameter, for fused experts) with layer numbers as `*`."""
    count: int
    rank: int
    alpha: float
    scaling: float
    num_parameters: int
    """Trainable ones, over all `count` modules."""


@dataclass(frozen=True)
class InjectionTable:
    """What was adapted, and how much of the model that is."""

    method: str
    rows: tuple[InjectionRow, ...]
    saved_modules: tuple[str, ...]
    """Modules trained whole."""
    trainable_parameters: int
    total_parameters: int
    """Of the base; a 4-bit weight counts one."""
    adapted_ratio: float
    """Share of the weights of linear layers and experts that have an adapter, 0 to 1."""
    notices: tuple[str, ...]

    @property
    def trainable_ratio(self) -> float:
        """Trainable parameters per base parameter."""
        return self.trainable_parameters / self.total_parameters


class Injected(NamedTuple):
    """A model with its adapter; unpacks as (model, table)."""

    model: PeftModel
    table: InjectionTable


def inject_adapter(
    model: PreTrainedModel, config: LowRankAdapter, *, base_fingerprint: str | None = None
) -> Injected:
    """Attach the adapter that `config` describes; the base is frozen, the adapter is float32.

    The model is changed in place. With `config.init_from` the saved adapter's weights are the
    start, loaded strictly.

    Args:
        model: a base as `models.load` returns it, quantized or not.
        config: a member of the adapter union.
        base_fingerprint: of the base; the adapter in `init_from` must be one of this base.

    Raises:
        LlmtuneError: a name, layer or pattern matches nothing (with the nearest names), the LM
            head is a target, or the adapter in `init_from` is of another shape or base.
    """
    names = list_modules(model)
    chosen = choose_targets(config, names)
    total_parameters = sum(logical_size(parameter) for parameter in model.parameters())
    try:
        adapted = attach(model, _peft_config(model, config, names, chosen))
    except ValueError as error:
        raise LlmtuneError(f"adapter: peft cannot adapt this model as asked: {error}") from error
    _check_layers(adapted, config, chosen)
    _check_trainable(adapted)
    if config.init_from is not None:
        start_from_adapter(adapted, config.init_from, base_fingerprint=base_fingerprint)
    table = InjectionTable(
        method=config.method,
        rows=_group_rows(adapted),
        saved_modules=tuple(config.modules_to_save),
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        total_parameters=total_parameters,
        adapted_ratio=_num_weights(names, chosen) / _num_weights(names, names.adaptable),
        notices=_notices(names, config, chosen),
    )
    return Injected(adapted, table)


def list_modules(model: PreTrainedModel) -> ModuleNames:
    """Return what the model offers to adapt: linear layers and experts by shape, and the rest."""
    head = model.get_output_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    others: dict[str, str] = {}
    head_name = None
    for name, module in model.named_modules():
        if module is head:
            head_name = name
        elif isinstance(module, nn.Linear):
            linear[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            linear[name] = (module.weight.shape[1], module.weight.shape[0])
        elif name:
            others[name] = type(module).__name__
    return ModuleNames(
        linear=linear,
        experts={
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters()
            if parameter.dim() == EXPERT_DIMENSIONS
        },
        head=head_name,
        is_head_tied=head is not None and head.weight is model.get_input_embeddings().weight,
        others=others,
    )


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Return the adapted layers by the base's own names: of modules, or of expert parameters."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            # wrappers of one module's parameters are nested, each the `base_layer` of the next
            name = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        if isinstance(module, LoraLayer):
            layers[name.removeprefix("base_model.model.")] = module
    return layers


def _peft_config(
    model: PreTrainedModel, config: LowRankAdapter, names: ModuleNames, chosen: list[str]
) -> LoraConfig:
    modules = [name for name in chosen if name in names.linear]
    experts = [name for name in chosen if name in names.experts]
    return config.to_peft(
        shorten_targets(modules, names.modules),
        shorten_targets(experts, [name for name, _ in model.named_parameters()], num_parts=2),
        fan_in_fan_out=bool(modules) and isinstance(model.get_submodule(modules[0]), Conv1D),
    )


def _check_layers(model: PeftModel, config: LowRankAdapter, chosen: list[str]) -> None:
    """Check that peft adapted just the chosen modules, each with its rank and scaling.

    Some mixture-of-experts families make peft reinterpret names.
    """
    layers = lora_layers(model)
    wrong = set(layers) ^ set(chosen)
    if wrong:
        endings = {name.rpartition(".")[2] for name in wrong}
        others = sorted({name.rpartition(".")[2] for name in chosen} - endings)
        raise LlmtuneError(
            "adapter.target_modules: in this kind of model peft takes "
            f"{', '.join(sorted(endings))} for other weights than meant. Leave them out: "
            f"target_modules=[{', '.join(others)}]"
        )
    for name, layer in layers.items():
        rank, alpha = config.rank_of(name), config.alpha_of(name)
        assert layer.r["default"] == rank, name
        assert abs(layer.scaling["default"] - config.scaling(rank, alpha)) < 1e-6, name


def _check_trainable(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        is_lora = ".lora_" in name
        is_adapter = is_lora or ".modules_to_save." in name
        assert parameter.requires_grad == is_adapter, name
        assert not is_lora or parameter.dtype == torch.float32, name


def _group_rows(model: PeftModel) -> tuple[InjectionRow, ...]:
    groups: dict[tuple[str, int, float, float], list[int]] = defaultdict(list)
    for name, layer in lora_layers(model).items():
        key = (
            LAYER_NUMBER.sub("*", name),
            layer.r["default"],
            layer.lora_alpha["default"],
            layer.scaling["default"],
        )
        groups[key].append(_own_parameters(layer))
    return tuple(
        InjectionRow(pattern, len(sizes), rank, alpha, scaling, sum(sizes))
        for (pattern, rank, alpha, scaling), sizes in groups.items()
    )


def _own_parameters(layer: LoraLayer) -> int:
    """Count a layer's adapter weights, without those of a wrapper nested in it."""
    return sum(
        parameter.numel()
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not name.startswith("base_layer.")
    )


def _num_weights(names: ModuleNames, chosen: Iterable[str]) -> int:
    return sum(math.prod(names.adaptable[name]) for name in chosen)


def _notices(names: ModuleNames, config: LowRankAdapter, chosen: list[str]) -> tuple[str, ...]:
    left_out = [name for name in names.experts if name not in chosen]
    if not left_out:
        return ()
    share = _num_weights(names, left_out) / _num_weights(names, names.adaptable)
    why = config.why_no_experts() or "they are not among the targets"
    return (
        f"expert weights are not adapted ({len(left_out)} fused parameters, {share:.0%} of all "
        f"linear weights): {why}",
    )
