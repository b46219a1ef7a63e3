"""Which models llama.cpp can run, under which name, and with which numbers in the file's head."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.rope import llama3_factors, read_rope, rope_problem
from llmtune.io.stopping import first_line
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint

Config = Mapping[str, Any]
Keys = dict[str, int | float | bool | str]
"""What the head of a GGUF file says of the model, by name."""

GEMMA2_27B_LAYERS = 46
"""llama.cpp scales the attention of a Gemma 2 with this many layers by hidden size / heads."""


@dataclass(frozen=True)
class Architecture:
    """How one transformers model type becomes one of llama.cpp's architectures."""

    name: str
    """`general.architecture`, and the prefix of its keys."""
    activations: tuple[str, ...]
    problems: Callable[[Config], Iterator[str]]
    """What llama.cpp would compute differently: each is a reason to refuse."""
    extra_keys: Callable[[Config], Keys]
    pairs_rotary: bool = False
    """llama.cpp turns neighboring dimensions of q and k; transformers turns the two halves."""
    norm_offset: float = 0.0
    """Added to every norm weight (Gemma keeps them as the difference from one)."""


def find_architecture(base: Checkpoint) -> Architecture:
    """Return how this checkpoint is written for llama.cpp.

    Raises:
        LlmtuneError: its architecture is not supported, or it uses something llama.cpp lacks; the
            message names every such thing.
    """
    model_type = base.model_type
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise LlmtuneError(
            f"{base.directory}: GGUF export does not support model type {model_type!r}; expected "
            f"one of {', '.join(sorted(ARCHITECTURES))}; or name llama.cpp's own converter: "
            "export.converter in the config, or llmtune export RUN --to gguf --converter LLAMA_CPP"
        )
    config = read_full_config(base)
    problems = list(_common_problems(config, architecture)) + list(architecture.problems(config))
    if problems:
        raise LlmtuneError(
            f"{base.directory}: llama.cpp would compute this {model_type} model differently: "
            + "; ".join(problems)
        )
    return architecture


def read_full_config(base: Checkpoint) -> Config:
    """Return config.json with the values that it leaves out, as the model's config class has them.

    A key that is missing is rarely absent from the model: Mixtral turns at a base of 1,000,000,
    Phi turns half of each head, and Gemma's heads are 256 wide unless config.json says otherwise.

    Raises:
        LlmtuneError: it cannot be read, or transformers refuses it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    written = dict(base.config)
    try:
        completed: dict[str, Any] = CONFIG_MAPPING[base.model_type](**written).to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise LlmtuneError(
            f"{base.directory / CONFIG_NAME}: transformers cannot make a {base.model_type} config "
            f"of it: {first_line(error)}"
        ) from error
    return written | completed


def hyperparameters(architecture: Architecture, config: Config) -> Keys:
    """Return the keys of the file's head: whole numbers as int, others as float, flags as bool."""
    heads, head_dim = config["num_attention_heads"], head_dimension(config)
    rope = read_rope(config)
    values: Keys = {
        "vocab_size": config["vocab_size"],
        "context_length": context_length(config),
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * rope.partial),
        "rope.freq_base": rope.theta,
    }
    if "rms_norm_eps" in config:
        values["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    if "layer_norm_eps" in config:
        values["attention.layer_norm_epsilon"] = float(config["layer_norm_eps"])
    if rope.kind in {"linear", "yarn"}:
        values["rope.scaling.type"] = rope.kind
        values["rope.scaling.factor"] = float(rope.scaling["factor"])
    if rope.kind == "yarn":
        original = rope.scaling.get("original_max_position_embeddings")
        values["rope.scaling.original_context_length"] = int(
            original or config["max_position_embeddings"]
        )
    values |= architecture.extra_keys(config)
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def rope_factors(config: Config) -> list[float] | None:
    """Return the values of the tensor `rope_freqs.weight`, if the model needs one."""
    rope = read_rope(config)
    if rope.kind != "llama3":
        return None
    return llama3_factors(rope, head_dimension(config), config["max_position_embeddings"])


def head_dimension(config: Config) -> int:
    """Return the width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def context_length(config: Config) -> int:
    """Return the longest context that llama.cpp computes as transformers does.

    Its llama architecture attends to everything, so a Mistral with a sliding window is only the
    same model within one window.
    """
    longest = int(config["max_position_embeddings"])
    if config["model_type"] in {"mistral", "mixtral"} and config.get("sliding_window"):
        return min(longest, int(config["sliding_window"]))
    return longest


def _common_problems(config: Config, architecture: Architecture) -> Iterator[str]:
    if "auto_map" in config:
        yield "it needs Python code of its own (auto_map)"
    if "quantization_config" in config:
        yield "it is quantized already; export the 16-bit model"
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in architecture.activations:
        yield f"activation {activation!r}, expected {' or '.join(architecture.activations)}"
    problem = rope_problem(read_rope(config))
    if problem:
        yield problem


def _no_problems(config: Config) -> Iterator[str]:
    yield from ()


def _no_keys(config: Config) -> Keys:
    return {}


def _qwen_problems(config: Config) -> Iterator[str]:
    if config.get("use_sliding_window"):
        yield "use_sliding_window is on"


def _qwen3_problems(config: Config) -> Iterator[str]:
    yield from _qwen_problems(config)
    if config.get("attention_bias"):
        yield "attention_bias is on"


def _qwen3_moe_problems(config: Config) -> Iterator[str]:
    yield from _qwen3_problems(config)
    if not config.get("norm_topk_prob"):
        yield "norm_topk_prob is off"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        yield "some layers have no experts"


def _gemma2_problems(config: Config) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    expected = head_dimension(config)
    if layers == GEMMA2_27B_LAYERS:
        expected = config["hidden_size"] // config["num_attention_heads"]
    if config.get("query_pre_attn_scalar") != expected:
        yield f"query_pre_attn_scalar {config.get('query_pre_attn_scalar')}, expected {expected}"
    alternating = [("sliding", "full")[layer % 2] + "_attention" for layer in range(layers)]
    if config.get("layer_types", alternating) != alternating:
        yield "layer_types other than sliding and full attention in turn"
    if config.get("use_bidirectional_attention"):
        yield "use_bidirectional_attention is on"


def _phi_problems(config: Config) -> Iterator[str]:
    if config.get("qk_layernorm"):
        yield "qk_layernorm is on"


def _expert_keys(config: Config) -> Keys:
    return {
        "expert_count": config.get("num_local_experts") or config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
    }


def _qwen3_moe_keys(config: Config) -> Keys:
    width = config["moe_intermediate_size"]
    return _expert_keys(config) | {"expert_feed_forward_length": width}


def _gemma2_keys(config: Config) -> Keys:
    return {
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
        "attention.sliding_window": config["sliding_window"],
    }


def _phi3_keys(config: Config) -> Keys:
    longest = config["max_position_embeddings"]
    return {
        "attention.sliding_window": config.get("sliding_window") or 0,
        "rope.scaling.original_context_length": config.get("original_max_position_embeddings")
        or longest,
    }


SILU = ("silu",)
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")
LLAMA = Architecture("llama", SILU, _no_problems, _no_keys, pairs_rotary=True)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": Architecture("llama", SILU, _no_problems, _expert_keys, pairs_rotary=True),
    "qwen2": Architecture("qwen2", SILU, _qwen_problems, _no_keys),
    "qwen3": Architecture("qwen3", SILU, _qwen3_problems, _no_keys),
    "qwen3_moe": Architecture("qwen3moe", SILU, _qwen3_moe_problems, _qwen3_moe_keys),
    "gemma": Architecture("gemma", GELU_TANH, _no_problems, _no_keys, norm_offset=1.0),
    "gemma2": Architecture("gemma2", GELU_TANH, _gemma2_problems, _gemma2_keys, norm_offset=1.0),
    "phi": Architecture("phi2", GELU_TANH, _phi_problems, _no_keys),
    "phi3": Architecture("phi3", SILU, _no_problems, _phi3_keys),
}
"""By transformers' model type (SmolLM is a llama)."""
