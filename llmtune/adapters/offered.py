"""What a loaded model offers to adapt, and what has to be left out: each with the reason."""

import copy
from collections.abc import Iterator, Mapping

import torch
from peft import PeftConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtune.adapters.base import Adapter
from llmtune.adapters.module_selection import ModuleNames
from llmtune.models.decoder import decoder_of
from llmtune.models.probing import ProbeFailedError, probing
from llmtune.models.quantization.describe import expert_stacks

PAST_THE_ADAPTER = "the state-space kernels read its weight past an adapter"
CHOOSES = "it only chooses which tokens are attended to, so no gradient reaches it"
CHOOSER = "indexer"
"""The module of DeepSeek's sparse attention that does."""
OUTSIDE = "it is not part of the language model"
RENAMED = "peft takes its name for the weights of the experts"
STATE_PARAMETERS = ("A_log", "D")
"""Parameters of a state-space mixer (Mamba 1 and 2) and of no other layer."""
READ_BY_KERNELS = ("out_proj", "dt_proj")
TRIED_SHAPE = (1, 2)


def list_modules(model: PreTrainedModel, config: Adapter | None = None) -> ModuleNames:
    """Return what the model offers to adapt: linear layers and experts by shape, and the rest.

    `config` is the adapter that is meant; without one, names that peft would take for others are
    not looked for.
    """
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
    excluded = dict(_excluded(model, linear))
    if config is not None and not config.is_whole:
        kept = [name for name in linear if name not in excluded]
        excluded |= dict.fromkeys(_renamed_by_peft(model, config, kept), RENAMED)
    inside = set(decoder_of(model).modules())
    return ModuleNames(
        linear={name: shape for name, shape in linear.items() if name not in excluded},
        experts=dict(_experts(model)),
        head=head_name,
        is_head_tied=head is not None and head.weight is model.get_input_embeddings().weight,
        others=others,
        excluded=excluded,
        biased=frozenset(
            name for name in linear if getattr(model.get_submodule(name), "bias", None) is not None
        ),
        norms={
            name: sum(parameter.numel() for parameter in module.parameters())
            for name, module in model.named_modules()
            if module in inside and _is_norm(module)
        },
    )


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm whose parameters all have the names under which peft saves them."""
    names = {name for name, _ in module.named_parameters()}
    return "norm" in type(module).__name__.lower() and "weight" in names <= {"weight", "bias"}


def _experts(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Yield the fused expert weights: gates and mixes have three dimensions, too."""
    for name, parameter in expert_stacks(model):
        owner = name.rpartition(".")[0]
        kind = type(model.get_submodule(owner)).__name__
        if "expert" in f"{owner}.{kind}".lower():
            yield name, tuple(parameter.shape)


def _excluded(
    model: PreTrainedModel, linear: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Yield the linear layers that an adapter cannot change, with the reason."""
    config, decoder = model.config, decoder_of(model)
    inside = next(name for name, module in model.named_modules() if module is decoder)
    is_wrapped = config.get_text_config() is not config and inside
    for name, (num_out, num_in) in linear.items():
        owner, _, part = name.rpartition(".")
        mixer = model.get_submodule(owner)
        if is_wrapped and not name.startswith(f"{inside}."):
            yield name, OUTSIDE
        elif CHOOSER in owner.split("."):
            yield name, CHOOSES
        elif part in READ_BY_KERNELS and all(hasattr(mixer, one) for one in STATE_PARAMETERS):
            yield name, PAST_THE_ADAPTER
        else:
            reason = _why_not_linear(model.get_submodule(name), num_out, num_in)
            if reason is not None:
                yield name, reason


def _why_not_linear(module: nn.Module, num_out: int, num_in: int) -> str | None:
    """Say why an adapter's output cannot be added to a layer's; None if it can.

    Only subclasses of a family's own are tried: routers that return several tensors, layers that
    multiply group by group.
    """
    weight = module.weight
    is_plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if is_plain or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    kind = type(module).__name__
    inputs = torch.zeros(*TRIED_SHAPE, num_in, dtype=weight.dtype, device=weight.device)
    try:
        with probing(), torch.no_grad():
            output = module(inputs)
    except ProbeFailedError as error:
        return f"{kind} is not a plain linear layer ({error})"
    if not isinstance(output, Tensor):
        return f"{kind} returns more than one tensor"
    if output.shape != (*TRIED_SHAPE, num_out):
        return f"{kind} returns a tensor of a different shape"
    return None


def _renamed_by_peft(model: PreTrainedModel, config: Adapter, names: list[str]) -> list[str]:
    """Return the layers that peft would not adapt, but something else in their place.

    For mixtures of experts whose experts were fused, it takes the names of the single projections
    for the fused weights, and with them those of dense layers and shared experts.
    """
    renamed = []
    for ending in sorted({name.rpartition(".")[2] for name in names}):
        found: PeftConfig = copy.deepcopy(config.to_peft([ending]))
        try:
            convert_peft_config_for_transformers(found, model=model, conversions=None)
            is_kept = ending in (found.target_modules or ())
        except ValueError:  # it is one of several that only make sense together
            is_kept = False
        if not is_kept:
            renamed += [name for name in names if name.rpartition(".")[2] == ending]
    return renamed
