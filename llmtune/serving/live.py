"""What a target names, loaded: its base or its adapter on it, or the merged model of a run."""

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

    The merged model of a run is loaded as the run's base, but never quantized.

    Raises:
        LlmtuneError: the target has no such arm, or its adapter was made for a different base or
            chat template.
    """
    wanted = arm or target.arms[0]
    if wanted not in target.arms:
        raise LlmtuneError(
            f"{target.name}: has no {wanted} model; there is: {', '.join(target.arms)}"
        )
    is_merged = wanted == "merged"
    config = target.model
    if is_merged:
        update = {"base": str(target.merged_dir), "revision": None, "quantization": None}
        config = config.model_copy(update=update)
    live = load_live(config, resolve_base(config), None if is_merged else target.adapter_dir)
    log.info("model: %s on %s, %s", live.source.origin, live.device, live.identity.dtype)
    if not is_merged:
        return live
    if target.adapter_dir is not None:
        require_trained_template(live.tokenizer, target.adapter_dir)
    return replace(live, arms=("merged",))
