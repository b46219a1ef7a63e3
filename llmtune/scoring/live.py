"""Load a base with an adapter, or what a target names, and let it answer as any of its arms."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtune.adapters.live import adapter_strength
from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.adapters.saved import load_adapter
from llmtune.data.template import require_trained_template, template_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.io.environment import processor_name, versions
from llmtune.io.fingerprint import JsonObject, hash_file, hash_text
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.live import LiveModel, ModelIdentity
from llmtune.models.load import load_model
from llmtune.models.quantization.config import is_quantized
from llmtune.models.quantization.describe import compute_densely
from llmtune.models.resolve import Loadable
from llmtune.models.template_date import template_date_of
from llmtune.scoring.batches import adapter_disabled, has_adapter, vocabulary_size

log = logging.getLogger("llmtune")
REMOTE_CODE = "transformers_modules."
"""Where transformers puts the modules of code that came with a checkpoint."""


Cut = Callable[[LiveModel, Sequence[nn.Parameter]], object]
"""Moves a model that is mapped from its files to its device, a part of the base's weights here."""


def load_live(
    config: ModelConfig,
    source: Checkpoint,
    adapter_dir: Path | None,
    *,
    is_dense: bool = False,
    rounded_to: str | None = None,
    cut: Cut | None = None,
) -> LiveModel:
    """Load a base, and put a saved adapter on it.

    Args:
        config: how the base is loaded.
        source: the base.
        adapter_dir: None for the base alone.
        is_dense: compute with the dense weights that a quantized base represents, exactly.
        rounded_to: what those weights are rounded to before they are quantized; None is the dtype
            of `config`, in which all else is loaded.
        cut: keeps a part of the base in this process, if several share it.

    Raises:
        LlmtuneError: the base cannot be loaded, or the adapter was made for a different base or
            chat template.
    """
    quantized_from = config.model_copy(update={"dtype": rounded_to or config.dtype})
    live = quantized = load_model(quantized_from, source, stays_mapped=cut is not None)
    if rounded_to is not None:
        live = load_model(config.model_copy(update={"quantization": None}), source)
    if is_dense:
        compute_densely(live.model, live.dtype, of=quantized.model)
    del quantized
    base = list(live.model.parameters()) if cut is not None else []
    if adapter_dir is not None:
        require_trained_template(live.tokenizer, adapter_dir)
        live = replace(
            live,
            model=load_adapter(live.model, adapter_dir, base_fingerprint=live.fingerprint),
            identity=replace(live.identity, adapter=adapter_fingerprint(adapter_dir)),
            arms=("tuned", "base"),
        )
    if cut is not None:
        cut(live, base)
    return live


@contextlib.contextmanager
def as_arm(
    live: LiveModel, arm: str | None = None, *, strength: float | None = None
) -> Iterator[LiveModel]:
    """Yield the model answering as one of its arms; nothing is loaded, and all is put back.

    Args:
        live: the loaded model.
        arm: `base` is the adapter switched off; None is the model as it is.
        strength: weakens the adapter while the block runs; a base alone stays as it is.

    Raises:
        LlmtuneError: there is no such arm, or the adapter has no such strength.
    """
    if arm is not None and arm not in live.arms:
        raise LlmtuneError(f"no {arm} model here; there is: {', '.join(live.arms)}")
    state: AbstractContextManager[None] = contextlib.nullcontext()
    if has_adapter(live.model):
        if arm == "base":
            state = adapter_disabled(live.model)
        elif strength is not None and strength != 1:
            state = adapter_strength(live.model, strength)
    with state:
        yield replace(live, identity=live.identity_as(arm, strength))


def load_target(target: Loadable, arm: str | None = None, cut: Cut | None = None) -> LiveModel:
    """Load what `target` names so that it can answer as `arm` (default: its first).

    The merged model of a run, and `original`, the base of any target, are loaded as the base is,
    but never quantized.

    Raises:
        LlmtuneError: the target has no such arm, or its adapter was made for a different base or
            chat template.
    """
    wanted = arm or target.arms[0]
    if wanted == "merged":
        target.merged  # noqa: B018 (says why there is none)
    if wanted not in (*target.arms, "original"):
        raise LlmtuneError(
            f"{target.name}: has no {wanted} model; there is: {', '.join(target.arms)}"
        )
    config, is_whole = target.model, wanted in ("original", "merged")
    source = target.merged if wanted == "merged" else target.dense_base
    if is_whole:
        config = config.model_copy(update={"quantization": None})
    live = load_live(config, source, None if is_whole else target.adapter_dir, cut=cut)
    log.info("model: %s on %s, %s", live.source.origin, live.device, live.identity.dtype)
    if not is_whole:
        return live
    if target.adapter_dir is not None:
        require_trained_template(live.tokenizer, target.adapter_dir)
    return replace(live, arms=("merged",) if wanted == "merged" else ("original", "base"))


def facts_of(live: LiveModel, identity: ModelIdentity) -> JsonObject:
    """Return all that a loaded model's numbers depend on, as JSON values, for what is kept of them.

    Weights are told apart by size and time of change, too: fingerprints sample them.

    Args:
        identity: of the arm that answers; the adapter is only known by it. The original of a
            quantized base may be asked about before it is loaded in the base's place.
    """
    directory = live.source.directory
    config = directory / CONFIG_NAME
    model: Any = live.model.get_base_model() if has_adapter(live.model) else live.model
    quantization = None
    if is_quantized(identity.quantization):
        quantization = getattr(model.config, "quantization_config", None)
    weights = [*directory.glob("*.safetensors"), *directory.glob("*.bin")]
    if live.device.type == "cuda":
        device = [torch.cuda.get_device_name(live.device)]
    else:
        device = [processor_name(), torch.backends.cpu.get_cpu_capability()]
    return {
        "identity": identity.as_dict(),
        "quantization": str(getattr(quantization, "to_dict", lambda: quantization)()),
        "config": hash_file(config) if config.is_file() else None,
        "weights": {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(weights)},
        "tokenizer": hash_text(live.tokenizer.backend_tokenizer.to_str()),
        "template": template_fingerprint(live.tokenizer).to_json(),
        "template_date": template_date_of(live.tokenizer),
        "stop_tokens": list(live.stop_token_ids),
        "attention": live.attention,
        "vocabulary": vocabulary_size(live.model),
        "device": [live.device.type, *device],
        "versions": versions(),
    }


def runs_own_code(model: nn.Module) -> bool:
    """Whether the model runs Python code that came with its checkpoint."""
    return any(type(each).__module__.startswith(REMOTE_CODE) for each in model.modules())
