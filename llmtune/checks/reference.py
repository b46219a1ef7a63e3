"""The live model that a merged model or a file is judged by: base and adapter, unmerged."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from torch import nn

from llmtune.adapters.manifest import adapter_fingerprint, has_strengths
from llmtune.adapters.saved import load_adapter
from llmtune.adapters.strength import adapter_strength
from llmtune.checks.prompts import HeldOut
from llmtune.checks.provenance import MergeRecord, strength_of
from llmtune.data.template import require_trained_template
from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import choose_device
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.resolve import resolve_base

FLOAT32_BYTES = 4
BYTES_PICKLED = 2
"""Of a number in a `.bin` file, which is not opened to count them: if it holds float32, too few."""
MEMORY_SHARE = 0.5
"""Of the free memory, what the compared models may take in float32."""


@dataclass(frozen=True)
class Reference:
    """The run, adapter or model that something is compared with."""

    name: str
    model: ModelConfig
    max_kl: float
    """Nats per token with which its merges are kept."""
    adapter_dir: Path | None = None
    merged_dir: Path | None = None
    held_out: HeldOut | None = None
    """A run's held-out rows and suites; without any the open prompts are compared."""


@dataclass(frozen=True)
class LiveModel:
    """An adapter on its base, or a base alone."""

    model: nn.Module
    loaded: LoadedModel
    is_quantized: bool


def load_live(
    config: ModelConfig,
    source: Checkpoint,
    adapter_dir: Path | None,
    *,
    dtype: str,
    is_quantized: bool,
) -> LiveModel:
    """Load a base and its adapter to be compared with what was made of them.

    Args:
        config: the base as the adapter was trained on it.
        source: the base.
        adapter_dir: None for the base alone.
        dtype: float32 or bfloat16, for everything that is not quantized.
        is_quantized: as in training; else the base is loaded as it is on the disk.
    """
    loaded = load_model(_reference(config, dtype, is_quantized=is_quantized), source)
    if adapter_dir is None:
        return LiveModel(loaded.model, loaded, is_quantized)
    model = load_adapter(loaded.model, adapter_dir, base_fingerprint=loaded.fingerprint)
    return LiveModel(model, loaded, is_quantized)


def _reference(model: ModelConfig, dtype: str, *, is_quantized: bool) -> ModelConfig:
    quantization = model.storage.for_comparison() if is_quantized else None
    return model.model_copy(update={"quantization": quantization, "dtype": dtype})


def at_strength(live: LiveModel, strength: float) -> AbstractContextManager[None]:
    """Scale the adapter while the block runs; nothing changes at 1, or for a base alone."""
    if strength == 1 or not isinstance(live.model, PeftModel):
        return nullcontext()
    return adapter_strength(live.model, strength)


def comparison_dtype(directory: Path, *, num_models: int = 2, device: str = "cpu") -> str:
    """Return float32 if the models fit in it, so that only rounding shows; else bfloat16.

    Args:
        directory: a checkpoint of the models' size.
        num_models: how many are in memory at once.
        device: where they run.
    """
    needed = num_models * FLOAT32_BYTES * _num_parameters(directory)
    free = psutil.virtual_memory().available
    place = choose_device(device)
    if place.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(place)[0])
    return "float32" if needed <= MEMORY_SHARE * free else "bfloat16"


def _num_parameters(directory: Path) -> int:
    base = Checkpoint.open(directory)
    if not base.has_safetensors:
        return sum(path.stat().st_size for path in directory.glob("*.bin")) // BYTES_PICKLED
    return sum(math.prod(one.shape) for one in base.index.tensors.values())


def load_reference(reference: Reference, record: MergeRecord | None, dtype: str) -> LiveModel:
    """Load base and adapter: quantized if the adapter was merged into the dequantized base.

    Raises:
        LlmtuneError: the chat template is not the one the adapter was trained with; or what is
            verified was merged from several adapters, which are not one live model.
    """
    adapter_dir, strength = reference.adapter_dir, strength_of(record)
    if record is not None and record.num_adapters > 1:
        raise LlmtuneError(
            f"{reference.name}: what is to be verified was merged from {record.num_adapters} "
            "adapters, so no single one can be compared with it; it was compared when it was merged"
        )
    if strength != 1 and adapter_dir and not has_strengths(adapter_dir):
        raise LlmtuneError(
            f"{reference.name}: merged at strength {strength:g}, and an adapter with "
            "biases or single token rows has no live model of that strength to compare with"
        )
    is_quantized = record is not None and record.base == "dequantized"
    source = resolve_base(reference.model, allow_quantized=True)
    live = load_live(reference.model, source, adapter_dir, dtype=dtype, is_quantized=is_quantized)
    if adapter_dir is not None:
        require_trained_template(live.loaded.tokenizer, adapter_dir)
    return live


def adapter_problems(record: MergeRecord | None, reference: Reference) -> list[str]:
    """Say whether a directory was merged from a different adapter than the reference's."""
    if record is None or reference.adapter_dir is None:
        return []
    if record.adapter_hash == adapter_fingerprint(reference.adapter_dir):
        return []
    return [f"it was merged from a different adapter than {reference.adapter_dir}; merge again"]
