"""What a target names, loaded: its base, its adapter on it, the merged or the original model."""

import logging
from dataclasses import replace

from llmtune.data.template import require_trained_template
from llmtune.errors import LlmtuneError
from llmtune.models.live import LiveModel
from llmtune.models.resolve import Loadable
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
    live = load_live(config, source, None if is_whole else target.adapter_dir)
    log.info("model: %s on %s, %s", live.source.origin, live.device, live.identity.dtype)
    if not is_whole:
        return live
    if target.adapter_dir is not None:
        require_trained_template(live.tokenizer, target.adapter_dir)
    return replace(live, arms=("merged",) if wanted == "merged" else ("original", "base"))
