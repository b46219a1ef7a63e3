"""Tiny adapters, rows and runs for the training tests."""

import random
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.io.run_dir import RunDir
from llmtune.training.config import TrainConfig
from llmtune.training.request import TrainRequest
from tests.tiny import VOCAB_SIZE, make_model, make_tokenizer


def make_adapter(
    family: str = "llama",
    *,
    dtype=torch.float32,
    dropout: float = 0.0,
    seed: int = 0,
    targets: str = "all-linear",
    **overrides,
) -> PeftModel:
    """Return a tiny base with a fresh float32 LoRA on every linear layer."""
    base = make_model(family, dtype=dtype, **overrides)
    return add_lora(base, dropout=dropout, seed=seed, target_modules=targets)


def add_lora(base, *, dropout: float = 0.0, seed: int = 0, **options) -> PeftModel:
    torch.manual_seed(seed)
    options = {"target_modules": "all-linear"} | options
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def make_rows(count: int, *, seed: int = 0, longest: int = 40) -> list[Example]:
    """Return rows of unequal lengths with a learnable pattern; the first part is not trained."""
    rng = random.Random(seed)
    rows = []
    for line in range(1, count + 1):
        length = rng.randint(6, longest)
        start = rng.randrange(4, VOCAB_SIZE - 60)
        input_ids = [start + 3 * (index % 17) for index in range(length)]
        trained = rng.randint(2, length - 2)
        labels = [IGNORE_INDEX] * (length - trained) + input_ids[length - trained :]
        rows.append(Example(input_ids, labels, "rows.jsonl", line))
    return rows


@cache
def shared_tokenizer():
    return make_tokenizer()


def make_request(model: PeftModel, run: Path, **changes) -> TrainRequest:
    values = {
        "model": model,
        "tokenizer": shared_tokenizer(),
        "train": make_rows(20),
        "evaluation": [],
        "run": RunDir(run),
        "seed": 0,
        "identity": {"data": "d", "base": "b", "config": "c"},
        "quiet": True,
    }
    return TrainRequest(**(values | changes))


def make_config(**changes) -> TrainConfig:
    values = {"max_steps": 4, "batch_size": 8, "learning_rate": 5e-3, "schedule": "constant"}
    return TrainConfig.model_validate(values | changes)


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def adapted_layers(model: PeftModel) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
