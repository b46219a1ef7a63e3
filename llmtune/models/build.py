"""A model made from a checkpoint's files: mapped as it is, or quantized weight by weight."""

from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmtune.io.json_files import blamed_on
from llmtune.models.checkpoint import CONFIG_NAME, GENERATION_NAME
from llmtune.models.stored_tensors import stored_tensors


def build_model(
    directory: Path, keywords: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the causal LM in a checkpoint directory, and transformers' loading info.

    `keywords` are those of `from_pretrained`, with `output_loading_info`.

    A base that is quantized is read tensor by tensor: mapped, all of its 16-bit file would stay
    resident beside the quantized weights. What is not quantized is mapped and needs no copy.
    """
    config = tensors = None
    if "quantization_config" in keywords and _is_plain(keywords):
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        tensors = stored_tensors(directory)
    if tensors is None or not _has_own_class(config):
        model, info = AutoModelForCausalLM.from_pretrained(str(directory), **keywords)
        return model, info
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=tensors, **keywords
    )
    model.name_or_path = model.config._name_or_path = str(directory)
    model.generation_config = _read_generation_config(directory)
    return model, info


def _is_plain(keywords: dict[str, Any]) -> bool:
    """Whether the weights are safetensors and the code is transformers' own."""
    return keywords["use_safetensors"] and not keywords["trust_remote_code"]


def _has_own_class(config: PreTrainedConfig | None) -> bool:
    """Whether a causal LM is built from this very config, and not from a part of it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return getattr(model_class, "config_class", None) is type(config)


def _read_generation_config(directory: Path) -> GenerationConfig:
    """Return what transformers would: generation_config.json, else what config.json says of it."""
    if (directory / GENERATION_NAME).is_file():
        with blamed_on(directory / GENERATION_NAME, "transformers"):
            return GenerationConfig.from_pretrained(str(directory))
    return GenerationConfig.from_pretrained(
        str(directory), config_file_name=CONFIG_NAME, _from_model_config=True
    )
