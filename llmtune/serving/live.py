"""What a target names, loaded: its base, its adapter on it, the merged or the original model."""

import logging
from dataclasses import replace

from llmtune.data.template import require_trained_template
from llmtune.errors import LlmtuneError
from llmtune.models.config import Loadable
from llmtune.models.live import LiveModel
from llmtune.models.resolve import resolve_base
from llmtune.scoring.live import load_live

log = logging.getLogger("llmtune")


def load_target(target: Loadable, arm: str | None = None) -> LiveModel:
    """Load what `target` names so that it can answer as `arm` (default: its first).

    The merged model of a run, and `original`, the base of any target, are loaded as the base is,
    but never quantized.

    Raises:
        LlmtuneError: the target has no such arm, or its adapter was made for a different base or
            chat template.
    """
    wanted = arm or target.arms[0]
    if wanted not in (*target.arms, "original"):
        raise LlmtuneError(
            f"{target.name}: has no {wanted} model; there is: {', '.join(target.arms)}"
        )
    config, is_whole = target.model, wanted in ("original", "merged")
    if wanted == "merged":
        config = config.model_copy(update={"base": str(target.merged_dir), "revision": None})
    if is_whole:
        config = config.model_copy(update={"quantization": None})
    live = load_live(config, resolve_base(config), None if is_whole else target.adapter_dir)
    log.info("model: %s on %s, %s", live.source.origin, live.device, live.identity.dtype)
    if not is_whole:
        return live
    if target.adapter_dir is not None:
        require_trained_template(live.tokenizer, target.adapter_dir)
    return replace(live, arms=("merged",) if wanted == "merged" else ("original", "base"))
