"""The adapters that the matrix tries, as stock peft writes them for a given model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

NOISE = 0.05
RANK = {"r": 4, "lora_alpha": 8}
TOKENS = [5, 17, 300]
EXPERT_DIMENSIONS = 3

Make = Callable[[PreTrainedModel], PeftConfig | None]


def _lora(**knobs: Any) -> LoraConfig:
    return LoraConfig(**{**RANK, "target_modules": "all-linear", **knobs})


def _patterns(model: PreTrainedModel) -> PeftConfig:
    first, *others = _linears(model)
    rank = {first.rpartition(".")[2]: 2}
    alpha = {others[-1]: 3} if others else {}
    return _lora(rank_pattern=rank, alpha_pattern=alpha, use_rslora=True)


def _whole_ends(model: PreTrainedModel) -> PeftConfig:
    return _lora(modules_to_save=[name for name in _ends(model) if name])


def _whole_embedding(model: PreTrainedModel) -> PeftConfig:
    return _lora(modules_to_save=[_ends(model)[0]])


def _whole_head(model: PreTrainedModel) -> PeftConfig | None:
    head = _ends(model)[1]
    return _lora(modules_to_save=[head]) if head else None


def _whole_norm(model: PreTrainedModel) -> PeftConfig | None:
    norms = [
        name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()
    ]
    return _lora(modules_to_save=[norms[-1]]) if norms else None


def _tokens(model: PreTrainedModel) -> PeftConfig:
    return _lora(trainable_token_indices={_ends(model)[0]: TOKENS})


def _lora_on(*places: int) -> Make:
    def make(model: PreTrainedModel) -> PeftConfig | None:
        ends = [_ends(model)[place] for place in places]
        if not all(ends):
            return None
        return _lora(target_modules=[*ends, _linears(model)[0]])

    return make


def _tokens_and_head(model: PreTrainedModel) -> PeftConfig | None:
    embedding, head = _ends(model)
    if not head:
        return None
    return _lora(
        target_modules=[head, _linears(model)[0]], trainable_token_indices={embedding: TOKENS}
    )


def _biases(model: PreTrainedModel) -> PeftConfig | None:
    has_bias = any(name.endswith("bias") for name, _ in model.named_parameters())
    return _lora(bias="all") if has_bias else None


def _experts(model: PreTrainedModel) -> PeftConfig | None:
    stacks = sorted(set(_stacks(model)))
    if not stacks:
        return None
    return LoraConfig(**RANK, target_modules=[], target_parameters=stacks)


def _experts_and_linears(model: PreTrainedModel) -> PeftConfig | None:
    stacks = sorted(set(_stacks(model)))
    return _lora(target_parameters=stacks[-1:]) if stacks else None


def _convolutions(model: PreTrainedModel) -> PeftConfig | None:
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d)
    }
    return LoraConfig(**RANK, target_modules=sorted(found)) if found else None


def _ia3(model: PreTrainedModel) -> PeftConfig:
    name = _linears(model)[0]
    return IA3Config(target_modules=[name], feedforward_modules=[])


ADAPTERS: dict[str, Make] = {
    "lora": lambda _: _lora(),
    "patterns": _patterns,
    "dora": lambda _: _lora(use_dora=True),
    "bias": _biases,
    "norm": _whole_norm,
    "embedding": _whole_embedding,
    "head": _whole_head,
    "both ends": _whole_ends,
    "tokens": _tokens,
    "lora on head": _lora_on(1),
    "lora on embedding": _lora_on(0),
    "lora on both": _lora_on(0, 1),
    "tokens and head": _tokens_and_head,
    "dora on ends": lambda model: _dora_ends(model),
    "experts": _experts,
    "experts and linears": _experts_and_linears,
    "convolutions": _convolutions,
    "ia3": _ia3,
    "vera": lambda model: VeraConfig(r=4, target_modules=[_linears(model)[0]]),
    "pissa": lambda model: _lora(target_modules=[_linears(model)[0]], init_lora_weights="pissa"),
}


def _dora_ends(model: PreTrainedModel) -> PeftConfig | None:
    config = _lora_on(0, 1)(model)
    if isinstance(config, LoraConfig):
        config.use_dora = True
    return config


def make_adapter(model: PreTrainedModel, config: PeftConfig, directory: Path) -> None:
    """Save an adapter with random trained tensors; `model` is changed.

    Raises:
        ValueError, TypeError, RuntimeError, ...: peft itself cannot put it on this model.
    """
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(NOISE * noise)
    adapted.save_pretrained(directory)


def _ends(model: PreTrainedModel) -> tuple[str, str | None]:
    names = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    embedding = names[model.get_input_embeddings()]
    return embedding, None if head is None else names.get(head)


def _linears(model: PreTrainedModel) -> list[str]:
    ends = set(_ends(model))
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in ends
    ]
    return found or [name for name in ends if name]


def _stacks(model: PreTrainedModel) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.dim() == EXPERT_DIMENSIONS and "expert" in name:
            yield ".".join(name.split(".")[-2:])
