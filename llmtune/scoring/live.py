"""Load a base with a saved adapter on it, and let one loaded model answer as any of its arms."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from llmtune.adapters.live import adapter_strength
from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.adapters.saved import load_adapter
from llmtune.data.template import require_trained_template
from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.live import LiveModel
from llmtune.models.load import load_model
from llmtune.models.quantization.describe import compute_densely
from llmtune.scoring.batches import adapter_disabled, has_adapter


def load_live(
    config: ModelConfig, source: Checkpoint, adapter_dir: Path | None, *, is_dense: bool = False
) -> LiveModel:
    """Load a base, and put a saved adapter on it.

    Args:
        config: how the base is loaded.
        source: the base.
        adapter_dir: None for the base alone.
        is_dense: compute with the dense weights that a quantized base stands for, exactly.

    Raises:
        LlmtuneError: the base cannot be loaded, or the adapter was made for a different base or
            chat template.
    """
    live = load_model(config, source)
    if is_dense:
        compute_densely(live.model, live.dtype)
    if adapter_dir is None:
        return live
    require_trained_template(live.tokenizer, adapter_dir)
    return replace(
        live,
        model=load_adapter(live.model, adapter_dir, base_fingerprint=live.fingerprint),
        identity=replace(live.identity, adapter=adapter_fingerprint(adapter_dir)),
        arms=("tuned", "base"),
    )


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
