"""The numbers in a GGUF file's head as a config.json would give them; no tensor is read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's reader
makes an object of every word of the vocabulary, which takes seconds; here arrays are passed over.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from llmtune.errors import LlmtuneError

SCALARS = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
STRING, ARRAY = 8, 9
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
        LlmtuneError: it is no GGUF file, or of a kind whose parts are not known.
    """
    try:
        with path.open("rb") as file:
            values, tensors = _read_head(file)
    except (struct.error, ValueError, KeyError) as error:
        raise LlmtuneError(f"{path}: cannot be read as a GGUF file: {error}") from error
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
        "vocab_size": values.get("tokenizer.ggml.tokens"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }


def _read_head(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Return the keys with their values (of an array only its length), and the tensors' names."""
    if file.read(4) != b"GGUF":
        raise ValueError("its first four bytes are not GGUF")
    _version, num_tensors, num_keys = _unpack(file, "IQQ")
    values = {}
    for _ in range(num_keys):
        key = _read_text(file)
        (kind,) = _unpack(file, "I")
        values[key] = _read_value(file, kind)
    return values, set(_iter_tensor_names(file, num_tensors))


def _iter_tensor_names(file: BinaryIO, count: int) -> Iterator[str]:
    for _ in range(count):
        yield _read_text(file)
        (dimensions,) = _unpack(file, "I")
        file.seek(8 * dimensions + 4 + 8, 1)  # sizes, type, offset


def _read_value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _read_text(file)
    if kind != ARRAY:
        return _unpack(file, SCALARS[kind])[0]
    inner, length = _unpack(file, "IQ")
    if inner == STRING:
        for _ in range(length):
            file.seek(_unpack(file, "Q")[0], 1)
    else:
        file.seek(length * struct.calcsize(f"<{SCALARS[inner]}"), 1)
    return length


def _read_text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    return file.read(length).decode(errors="replace")


def _unpack(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = f"<{layout}"
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
