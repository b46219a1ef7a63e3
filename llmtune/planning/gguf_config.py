"""The numbers in a GGUF file's head as a config.json would give them; no tensor is read."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.gguf_head import read_gguf_head

# llama.cpp calls several of transformers' families by one name; they have the same parts.
MODEL_TYPES = MappingProxyType(
    {
        "llama": "llama",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "gemma2": "gemma2",
        "gemma3": "gemma3_text",
        "phi3": "phi3",
        "olmo2": "olmo2",
        "granite": "granite",
        "smollm3": "smollm3",
    }
)
KEYS = MappingProxyType(
    {
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "context_length": "max_position_embeddings",
    }
)


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Return what a transformers config.json would say of this model's shape.

    Raises:
        LlmtuneError: it is not a GGUF file, or of a kind whose parts are not known.
    """
    head = read_gguf_head(path)
    values, tensors = head.values, {tensor.name for tensor in head.tensors}
    architecture = str(values.get("general.architecture"))
    model_type = MODEL_TYPES.get(architecture)
    is_mixture = bool(values.get(f"{architecture}.expert_count"))
    if model_type is None or is_mixture:
        kind = f"{architecture} with experts" if is_mixture else architecture
        raise LlmtuneError(
            f"{path}: a GGUF file of kind {kind!r}: the parts of its layers are not known here; "
            f"expected one of {', '.join(MODEL_TYPES)}"
        )
    config = {
        ours: values[f"{architecture}.{theirs}"]
        for theirs, ours in KEYS.items()
        if f"{architecture}.{theirs}" in values
    }
    return {
        **config,
        "model_type": model_type,
        "vocab_size": head.lengths.get("tokenizer.ggml.tokens"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
