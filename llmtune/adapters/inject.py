"""Attach an adapter to a loaded base: it alone is trained, and a table says where it sits."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.base import Adapter
from llmtune.adapters.live import attach
from llmtune.adapters.module_selection import (
    ModuleNames,
    choose_targets,
    means,
    shorten_targets,
)
from llmtune.adapters.offered import list_modules
from llmtune.adapters.saved import start_from_adapter
from llmtune.adapters.starts import Sample, SampleRow
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.models.quantization.describe import LAYER_NUMBER, logical_size

MAX_NAMES = 6
TRAINED_BESIDE = (".modules_to_save.", ".trainable_tokens_delta.")
"""What the names of parameters hold that are trained beside the adapted layers."""


@dataclass(frozen=True)
class InjectionRow:
    """Like-named modules that got the same adapter."""

    pattern: str
    """Name of the module (of the parameter, for fused experts) with layer numbers as `*`."""
    count: int
    settings: dict[str, float]
    """What the method says of such a layer: rank, alpha and scaling of LoRA."""
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

    def to_dict(self) -> JsonObject:
        """Return the table as JSON, a row's settings beside its other numbers."""
        rows = [
            {
                "pattern": row.pattern,
                "count": row.count,
                **row.settings,
                "num_parameters": row.num_parameters,
            }
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}


class Injected(NamedTuple):
    """A model with its adapter; unpacks as (model, table)."""

    model: PeftModel
    table: InjectionTable


def inject_adapter(
    model: PreTrainedModel,
    config: Adapter,
    *,
    base_fingerprint: str | None = None,
    rows: Sequence[SampleRow] = (),
) -> Injected:
    """Attach the adapter that `config` describes; the base is frozen, the adapter is float32.

    The model is changed in place. With `config.init_from` the saved adapter's weights are the
    start, loaded strictly.

    Args:
        model: a base as `models.load` returns it, quantized or not.
        config: a member of the adapter union.
        base_fingerprint: of the base; the adapter in `init_from` must be one of this base.
        rows: training rows, as many as the config asks for (`Adapter.num_sampled`).

    Raises:
        LlmtuneError: a name, layer or pattern matches nothing (with the nearest names), the LM
            head is a target, or the adapter in `init_from` is of a different shape or base.
    """
    names = list_modules(model, config)
    chosen = choose_targets(config, names)
    _check_tokens(model, config)
    _check_kinds(model, config, chosen)
    total_parameters = sum(logical_size(parameter) for parameter in model.parameters())
    try:
        adapted = attach(model, _peft_config(model, config, names, chosen))
    except ValueError as error:
        raise LlmtuneError(f"adapter: peft cannot adapt this model as asked: {error}") from error
    _check_layers(adapted, config, chosen)
    config.begin(adapted_layers(adapted), Sample(adapted, rows) if rows else None)
    _check_trainable(adapted, config)
    if config.init_from is not None:
        start_from_adapter(adapted, config.init_from, base_fingerprint=base_fingerprint)
    table = InjectionTable(
        method=config.method,
        rows=_group_rows(_changed_layers(adapted, config, chosen), config),
        saved_modules=tuple(config.modules_to_save),
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        total_parameters=total_parameters,
        adapted_ratio=_adapted_ratio(names, config, chosen),
        notices=_notices(names, config, chosen),
    )
    return Injected(adapted, table)


def adapted_layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """Return the adapted layers by the base's own names: of modules, or of expert parameters."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            # wrappers of one module's parameters are nested, each the `base_layer` of the next
            name = f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            layers[name.removeprefix("base_model.model.")] = module
    return layers


def _peft_config(
    model: PreTrainedModel, config: Adapter, names: ModuleNames, chosen: list[str]
) -> PeftConfig:
    modules = [name for name in chosen if name in names.linear]
    experts = [name for name in chosen if name in names.experts]
    norms = [name for name in chosen if name in names.norms]
    config = config.model_copy(update={"modules_to_save": [*norms, *config.modules_to_save]})
    return config.to_peft(
        # peft compares the ends of the names of whole modules, also inside a word
        modules if config.is_whole else shorten_targets(modules, names.modules),
        shorten_targets(experts, [name for name, _ in model.named_parameters()], num_parts=2),
        fan_in_fan_out=bool(modules) and isinstance(model.get_submodule(modules[0]), Conv1D),
    )


def _check_layers(model: PeftModel, config: Adapter, chosen: list[str]) -> None:
    """Check that peft adapted just the chosen modules, each as the knobs say.

    Some mixture-of-experts families make peft reinterpret names.
    """
    layers = _changed_layers(model, config, chosen)
    wrong = set(layers) ^ set(chosen)
    if wrong:
        endings = {name.rpartition(".")[2] for name in wrong}
        others = sorted({name.rpartition(".")[2] for name in chosen} - endings)
        raise LlmtuneError(
            "adapter.target_modules: in this kind of model peft takes "
            f"{', '.join(sorted(endings))} for weights that were not meant. Leave them out: "
            f"target_modules=[{', '.join(others)}]"
        )
    for name, layer in layers.items():
        if isinstance(layer, BaseTunerLayer):
            config.check_layer(name, layer)


def _changed_layers(
    model: PeftModel, config: Adapter, chosen: Sequence[str]
) -> Mapping[str, nn.Module]:
    """Return the adapted layers, or the chosen ones among those that are trained whole."""
    layers = adapted_layers(model)
    base = model.get_base_model()
    whole = {
        name: module
        for name, module in base.named_modules()
        if name in set(chosen) and isinstance(module, ModulesToSaveWrapper)
    }
    return {**layers, **whole}


def _check_tokens(model: PreTrainedModel, config: Adapter) -> None:
    num_rows = model.get_input_embeddings().weight.shape[0]
    beyond = sorted(token for token in config.token_rows if token >= num_rows)
    if beyond:
        raise LlmtuneError(
            f"adapter.trainable_tokens: {beyond[0]} is not a token of this model, whose embedding "
            f"has the rows 0 to {num_rows - 1}"
        )


def _check_kinds(model: PreTrainedModel, config: Adapter, chosen: list[str]) -> None:
    modules = dict(model.named_modules())
    for name in chosen:
        reason = config.why_no_layer(modules[name]) if name in modules else None
        if reason is not None:
            raise LlmtuneError(
                f"adapter.method={config.method} cannot adapt {name}: {reason}; or choose "
                "adapter.method=lora"
            )


def _check_trainable(model: PeftModel, config: Adapter) -> None:
    for name, parameter in model.named_parameters():
        is_own = config.trains(name)
        is_trained = is_own or any(mark in name for mark in TRAINED_BESIDE)
        assert parameter.requires_grad == is_trained, name
        assert not is_own or parameter.dtype == torch.float32, name


def _group_rows(layers: Mapping[str, nn.Module], config: Adapter) -> tuple[InjectionRow, ...]:
    groups: dict[tuple[str, tuple[tuple[str, float], ...]], list[int]] = defaultdict(list)
    for name, layer in layers.items():
        described = config.layer_settings(layer) if isinstance(layer, BaseTunerLayer) else {}
        settings = tuple(described.items())
        groups[LAYER_NUMBER.sub("*", name), settings].append(_own_parameters(layer))
    return tuple(
        InjectionRow(pattern, len(sizes), dict(settings), sum(sizes))
        for (pattern, settings), sizes in groups.items()
    )


def _own_parameters(layer: nn.Module) -> int:
    """Count a layer's adapter weights, without those of a wrapper nested in it."""
    return sum(
        parameter.numel()
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not name.startswith("base_layer.")
    )


def _adapted_ratio(names: ModuleNames, config: Adapter, chosen: Iterable[str]) -> float:
    if "weights" not in config.trained_parts:
        return 0.0
    adapted = _num_weights(names, (name for name in chosen if name in names.adaptable))
    return adapted / _num_weights(names, names.adaptable)


def _num_weights(names: ModuleNames, chosen: Iterable[str]) -> int:
    return sum(math.prod(names.adaptable[name]) for name in chosen)


def _notices(names: ModuleNames, config: Adapter, chosen: list[str]) -> tuple[str, ...]:
    return (*_exclusions(names, config), *_unadapted_experts(names, config, chosen))


def _exclusions(names: ModuleNames, config: Adapter) -> Iterator[str]:
    """Yield what was meant by the targets and cannot be adapted, one line a reason."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in names.excluded.items():
        if means(config.target_modules, name):
            groups[reason].append(name)
    for reason, left_out in groups.items():
        endings = sorted({".".join(name.split(".")[-2:]) for name in left_out})
        shown = ", ".join(endings[:MAX_NAMES]) + (" ..." if len(endings) > MAX_NAMES else "")
        yield f"not adapted: {shown} ({len(left_out)} layers): {reason}"


def _unadapted_experts(names: ModuleNames, config: Adapter, chosen: list[str]) -> tuple[str, ...]:
    left_out = [name for name in names.experts if name not in chosen]
    if not left_out or "weights" not in config.trained_parts:
        return ()
    share = _num_weights(names, left_out) / _num_weights(names, names.adaptable)
    why = config.why_no_experts() or "they are not among the targets"
    return (
        f"expert weights are not adapted ({len(left_out)} fused parameters, {share:.0%} of all "
        f"linear weights): {why}",
    )
