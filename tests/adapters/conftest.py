"""Tiny checkpoints and ways to load them, adapt them and compare them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune.models.config import ModelConfig
from llmtune.models.live import LiveModel
from llmtune.models.load import load_model
from llmtune.models.resolve import resolve_base
from tests.tiny import make_model

IDS = torch.arange(4, 28).reshape(2, 12)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return a function giving the directory of a tiny checkpoint of a family; do not change it."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(family: str = "llama", seed: int = 0, **overrides) -> Path:
        directory = root / "-".join([family, str(seed), *map(str, overrides.items())])
        if not directory.exists():
            make_model(family, directory, seed=seed, **overrides)
        return directory

    return make


def load(directory: Path, **knobs) -> LiveModel:
    config = ModelConfig(base=str(directory), device="cpu", **{"dtype": "float32", **knobs})
    return load_model(config, resolve_base(config))


def stock(directory: Path, attention: str = "sdpa"):
    """Load with transformers alone, in float32, with the attention of the model to compare."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )


def train_a_little(model) -> None:
    """Give every B random numbers, as training would: fresh adapters have no effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def manifest_of(loaded: LiveModel) -> dict:
    source = loaded.source
    return {
        "base": {
            "fingerprint": loaded.fingerprint,
            "origin": source.origin,
            "revision": source.revision,
            "path": str(source.directory),
        },
        "template_hash": "abc",
    }
