"""Tiny random models of the installed transformers' causal LMs, saved as they are published."""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 512
MAX_PARAMETERS = 5_000_000
TIED, UNTIED, PUBLISHED, LONGROPE = "tied", "untied", "published", "longrope"

# What makes a model small, by every name that a config may have for it.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "moe_shared_expert_intermediate_size": 32,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    "qk_rope_head_dim": 4,
    "mamba_d_ssm": 64,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
MLA = {"num_key_value_heads": 4}
MIXED = ["linear_attention", "full_attention"]
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"),
            *(
                "glm_moe_dsa",
                "longcat_flash",
                "minicpm3",
                "youtu",
                "dots3_note_text",
                "bailing_hybrid",
            ),
        ),
        MLA | {"head_dim": 4},
    ),
    **{
        name: {"layer_types": MIXED}
        for name in (
            *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"),
            *("minimax", "olmo_hybrid"),
        )
    },
    "kimi_linear": {**MLA, "layer_types": MIXED},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 48,
        "num_key_value_heads": 2,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"],
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "num_key_value_heads": 4,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "recurrent_gemma": {"block_types": ("recurrent", "attention"), "num_key_value_heads": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "n_groups": 1,
        "use_mamba_kernels": False,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        "num_experts": None,
        "moe_intermediate_size": None,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "global_head_dim": 8,
    },
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}

# Text models that are published inside a model of images and text.
VISION = {
    **dict.fromkeys(("hidden_size", "out_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    **dict.fromkeys(("intermediate_size", "projector_input_dim"), 32),
    **dict.fromkeys(("projector_output_dim", "vision_output_dim"), 32),
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
    "image_size": 28,
    "patch_size": 14,
}
CONTAINERS = {
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "llama4": "llama4_text",
    "gemma3": "gemma3_text",
}

LONG_ROPE = {
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 1.0,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    },
}
"""Other frequencies for every row of a batch as soon as one is longer than this (Phi-3)."""

TIED_TWICE = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "granite", "mamba")
UNTIED_TOO = ("gemma2", "gpt2", "cohere", "starcoder2")

# Models of something else than text to be continued from the left, or larger than a test allows.
LEFT_OUT = frozenset(
    [
        "bart",
        "bert",
        "beam",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "git",
        "got_ocr2",
        "marian",
        "mbart",
        "megatron-bert",
        "mllama",
        "modernbert-decoder",
        "moshi",
        "moss_transcribe_diarize",
        "musicgen",
        "musicgen_melody",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "reformer",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "trocr",
        "whisper",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
        "emu3",
        "fuyu",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "phi4_multimodal",
        "gemma4_assistant",
        "gemma4_unified_assistant",
        "dots3_note",
        "blt",
    ]
)


def architecture_names() -> list[str]:
    """Return every row of the matrix: a model type, with `+tied`, `+untied` or `+published`."""
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT]
    names = [name for name in known if name not in CONTAINERS]
    names += [f"{name}+{TIED}" for name in TIED_TWICE]
    names += [f"{name}+{UNTIED}" for name in UNTIED_TOO]
    names += [f"{name}+{PUBLISHED}" for name in CONTAINERS]
    return sorted(names)


def make_architecture(
    name: str, directory: Path, sizes: Mapping[str, Any] = SMALL
) -> PreTrainedModel:
    """Save a tiny float32 model of one row of the matrix and return it as it is loaded again.

    `sizes` hold what makes a config tiny, by every name that one may have for it.

    Raises:
        ValueError: the model is not tiny with the knobs above.
    """
    torch.manual_seed(0)
    model_type, _, variant = name.partition("+")
    if variant == PUBLISHED:
        config = _container_config(model_type, sizes)
        maker: Any = AutoModelForImageTextToText
    else:
        keys = small_keys(model_type, sizes) | (LONG_ROPE if variant == LONGROPE else {})
        config = CONFIG_MAPPING[model_type](**keys)
        maker = AutoModelForCausalLM
    if variant in (TIED, UNTIED):
        config.tie_word_embeddings = variant == TIED
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in maker.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{name}: {size:,} parameters are too many for a tiny model")
    model = maker.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # away from zeros and ones, and large enough that every module says something
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return loaded.eval()


def small_keys(model_type: str, sizes: Mapping[str, Any] = SMALL) -> dict[str, Any]:
    """Return what makes a config of this type tiny."""
    known = _known_keys(CONFIG_MAPPING[model_type])
    special = SPECIAL.get(model_type, {})
    return {key: value for key, value in sizes.items() if key in known} | special


def _container_config(model_type: str, sizes: Mapping[str, Any]) -> Any:
    config_class = CONFIG_MAPPING[model_type]
    text = CONTAINERS[model_type]
    vision_class = config_class.sub_configs["vision_config"]
    if vision_class is AutoConfig:  # any of several: the one that it has by itself
        vision_class = type(config_class().vision_config)
    known = _known_keys(vision_class)
    vision = {key: value for key, value in VISION.items() if key in known}
    keys = {"text_config": small_keys(text, sizes), "vision_config": vision}
    return config_class(**keys, **{key: SMALL[key] for key in ("pad_token_id", "eos_token_id")})


def _known_keys(config_class: Any) -> set[str]:
    known = set(inspect.signature(config_class.__init__).parameters)
    known |= set(getattr(config_class, "attribute_map", {}))
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    return known
