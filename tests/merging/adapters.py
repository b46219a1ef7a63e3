"""Adapters made by stock peft on tiny bases, with every trained number moved off its start."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import make_model

PROMPTS = [[2, 17, 33, 120, 7, 90], [2, 5, 400, 301, 88, 11, 64, 3, 2, 19]]


def make_base(directory: Path, family: str = "llama", **options) -> Path:
    """Save a tiny base of `family` and return its directory."""
    make_model(family, directory, **options)
    return directory


def load_base(base_dir: Path, dtype: torch.dtype | str = "auto"):
    return AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype).eval()


def make_adapter(
    base_dir: Path, adapter_dir: Path, *, scale: float = 0.05, seed: int = 1, **config
) -> Path:
    """Save a LoRA adapter with random trained tensors; `config` goes to peft's LoraConfig."""
    config = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, **config}
    model = get_peft_model(load_base(base_dir), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))
    model.save_pretrained(adapter_dir)
    return adapter_dir


def load_adapter(base_dir: Path, adapter_dir: Path, dtype: torch.dtype | str = "auto"):
    return PeftModel.from_pretrained(load_base(base_dir, dtype), adapter_dir).eval()


@torch.no_grad()
def logits(model, prompts=PROMPTS) -> torch.Tensor:
    """Return the logits of every position of every prompt, [tokens, vocabulary] in float32."""
    return torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in prompts])
