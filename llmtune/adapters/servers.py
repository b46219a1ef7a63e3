"""What servers that apply low-rank adapters to their layers make of adapter_config.json (light)."""

from collections.abc import Mapping
from typing import Any

FOLLOWED = frozenset(
    {
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""What of adapter_config.json such a server follows, or what changes nothing once it is trained."""
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "peft_type": ("LORA",),
    "qalora_group_size": (16,),  # read only with use_qalora
}
"""Settings that it follows only at these values."""


def unapplied_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of an adapter that vLLM refuses late or drops without a word.

    Whatever a later PEFT adds is among them until it is known here.
    """
    return sorted(
        key
        for key, value in config.items()
        if value
        and (
            value not in HARMLESS[key]
            if key in HARMLESS
            else key not in FOLLOWED and not _is_about_training(key)
        )
    )


def _is_about_training(key: str) -> bool:
    """Whether a setting only says how the adapter began or was made."""
    return key in ("auto_mapping", "megatron_core") or key.endswith("_config")
