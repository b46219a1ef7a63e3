"""The live model that a merged model or a file is judged by: base and adapter, unmerged."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from llmtune.adapters.manifest import adapter_fingerprint, has_strengths
from llmtune.checks.prompts import HeldOut
from llmtune.checks.provenance import MergeRecord, strength_of
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import STORED_FLOATS
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import choose_device, choose_dtype
from llmtune.models.live import LiveModel
from llmtune.models.resolve import Loadable
from llmtune.scoring.live import load_live

FLOAT32_BYTES = 4
BYTES_PICKLED = 2
"""Of a number in a `.bin` file, which is not opened to count them: if it holds float32, too few."""
MEMORY_SHARE = 0.5
"""Of the free memory, what the compared models may take in float32."""


@dataclass(frozen=True)
class Reference(Loadable):
    """The run, adapter or model that something is compared with."""

    max_kl: float = field(kw_only=True)
    """Nats per token with which its merges are kept."""
    held_out: HeldOut | None = None
    """A run's held-out rows and suites; without any the open prompts are compared."""


def load_comparable(
    model: ModelConfig,
    source: Checkpoint,
    adapter_dir: Path | None,
    dtype: str,
    *,
    is_quantized: bool,
    is_dense: bool = True,
) -> LiveModel:
    """Load a base and its adapter to be compared with what was made of them.

    Args:
        model: the base as the adapter was trained on it.
        source: that base.
        adapter_dir: None for the base alone.
        dtype: float32 or bfloat16, for everything that is not quantized.
        is_quantized: as in training, from weights rounded as they were there if the method gives
            dense weights; else the base is loaded as it is on the disk.
        is_dense: compute with the weights that a quantized base represents, exactly.
    """
    if not is_quantized:
        config = model.model_copy(update={"quantization": None, "dtype": dtype})
        return load_live(config, source, adapter_dir, is_dense=is_dense)
    trained = choose_dtype(model.dtype, choose_device(model.device), source.model_type)
    name = str(trained).removeprefix("torch.")
    is_rounded = (
        is_dense
        and model.storage.gives_dense_weights()
        and getattr(torch, dtype).itemsize > trained.itemsize
        and not _is_stored_in(source, name)
    )
    config = model.model_copy(
        update={"quantization": model.storage.for_comparison(), "dtype": dtype}
    )
    rounded_to = name if is_rounded else None
    return load_live(config, source, adapter_dir, is_dense=is_dense, rounded_to=rounded_to)


def _is_stored_in(source: Checkpoint, dtype: str) -> bool:
    """Whether all of a checkpoint is stored in `dtype`; of `.bin` files that is not known."""
    if not source.has_safetensors:
        return False
    return {one.dtype for one in source.index.tensors.values()} == {STORED_FLOATS[dtype]}


def comparison_dtype(source: Checkpoint, *, num_models: int = 2, device: str = "cpu") -> str:
    """Return float32 if the models fit in it, so that only rounding shows; else bfloat16.

    Args:
        source: a checkpoint of the models' size.
        num_models: how many are in memory at once.
        device: where they run.
    """
    needed = num_models * FLOAT32_BYTES * _num_parameters(source)
    free = psutil.virtual_memory().available
    place = choose_device(device)
    if place.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(place)[0])
    return "float32" if needed <= MEMORY_SHARE * free else "bfloat16"


def _num_parameters(source: Checkpoint) -> int:
    if not source.has_safetensors:
        return sum(path.stat().st_size for path in source.directory.glob("*.bin")) // BYTES_PICKLED
    return sum(math.prod(one.shape) for one in source.index.tensors.values())


def load_reference(reference: Reference, record: MergeRecord | None, dtype: str) -> LiveModel:
    """Load base and adapter: dequantized if the adapter was merged into the dequantized base.

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
    return load_comparable(
        reference.model, reference.base, adapter_dir, dtype, is_quantized=is_dequantized(record)
    )


def is_dequantized(record: MergeRecord | None) -> bool:
    """Whether a directory was merged into its dequantized base."""
    return record is not None and record.base == "dequantized"


def adapter_problems(adapter: str | None, reference: Reference) -> list[str]:
    """Say whether something was made from a different adapter than the reference's.

    Args:
        adapter: the fingerprint that it records; None records none.
    """
    if adapter is None or reference.adapter_dir is None:
        return []
    if adapter == adapter_fingerprint(reference.adapter_dir):
        return []
    return [f"it was made from a different adapter than {reference.adapter_dir}; make it again"]
