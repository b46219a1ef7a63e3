"""Where a base's numbers come from: config.json, headers, a GGUF file's head, or the hub."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.gguf_head import read_gguf_head
from llmtune.io.quiet import quieted
from llmtune.io.stopping import call_within, first_line
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.dequantized import plan_dequantization
from llmtune.models.gguf import converted_before
from llmtune.models.hub import LOOKUP_SECONDS, no_such_base, reads_as_hub_id
from llmtune.models.plausible import check_config
from llmtune.models.stored.dense import dense_config, dense_dtype
from llmtune.models.stored.formats import read_format

TOKENIZER_NAME = "tokenizer.json"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

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


@dataclass(frozen=True)
class BaseNumbers:
    """What is known of a base without loading it."""

    config: Mapping[str, Any]
    """As config.json has it."""
    place: str
    """Where it was read."""
    stored_bytes: int | None
    """Of the checkpoint's weights; None if only config.json is there."""
    tokenizer_dir: Path | None
    """Where its tokenizer can be loaded from; None if there is none."""
    notice: str | None = None
    """What happens to a base that is stored quantized."""

    @property
    def stored_element_bytes(self) -> int:
        """Bytes of a weight in the checkpoint, as config.json says; 2 if it does not."""
        named = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        return DTYPE_BYTES.get(str(named), 2)


def read_base(model: ModelConfig, opened: Checkpoint | None = None) -> BaseNumbers:
    """Read the numbers of the base that `model` names; a path wins, else it is a hub id.

    `opened` is that base, if it is open already. A directory needs no more than config.json. From
    the hub only config.json and the headers of the weights are fetched.

    Raises:
        LlmtuneError: there is no such path and no such model, the hub cannot be reached, or the
            base is quantized in a way that is not read, which training refuses too.
    """
    path = Path(model.base).expanduser() if opened is None else opened.directory
    if path.is_dir():
        return _read_directory(opened or Checkpoint.open(path))
    if path.suffix == ".gguf" and path.is_file():
        return BaseNumbers(read_gguf_config(path), str(path), None, converted_before(path))
    if path.exists():
        raise LlmtuneError(
            f"model.base={model.base}: a file, but not a .gguf file. Give a directory with "
            "config.json, a .gguf file or a hub id."
        )
    if not reads_as_hub_id(model.base):
        raise no_such_base(model.base)
    return _read_hub(model.base, model.revision)


def _read_directory(base: Checkpoint) -> BaseNumbers:
    path, config = base.directory, base.config
    place = str(path / CONFIG_NAME)
    tokenizer_dir = path if (path / TOKENIZER_NAME).is_file() else None
    if read_format(config, str(path)) is not None and not base.has_safetensors:
        return replace(_dense_numbers(config, place), tokenizer_dir=tokenizer_dir)
    plan = plan_dequantization(base)
    if plan is not None:
        return BaseNumbers(plan.config, place, plan.dense_bytes, tokenizer_dir, plan.describe())
    stored = None
    if base.has_safetensors:
        stored = sum(entry.num_bytes for entry in base.index.tensors.values())
    notice = None if base.stored is None else f"base: {base.stored.describe()}"
    return BaseNumbers(config, place, stored, tokenizer_dir, notice)


def _dense_numbers(config: Mapping[str, Any], place: str) -> BaseNumbers:
    """Return what config.json alone says of a base, as the dense checkpoint if it is quantized."""
    format = read_format(config, place)
    if format is None:
        return BaseNumbers(config, place, None, None)
    notice = f"base: {format.title}, dequantized to {dense_dtype(config)} on first use"
    return BaseNumbers(dense_config(config), place, None, None, notice)


def _read_hub(repo: str, revision: str | None) -> BaseNumbers:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError, NotASafetensorsRepoError

    cached = try_to_load_from_cache(repo, CONFIG_NAME, revision=revision)

    # The library tells of every retry, also after the call took too long and was left to itself.
    def fetch() -> str:
        if isinstance(cached, str):
            return cached
        with quieted("huggingface_hub", logging.CRITICAL):
            return hf_hub_download(repo, CONFIG_NAME, revision=revision)

    def measure() -> str:
        with quieted("huggingface_hub", logging.CRITICAL):
            shards = get_safetensors_metadata(repo, revision=revision).files_metadata.values()
        tensors = [tensor for shard in shards for tensor in shard.tensors.values()]
        return str(sum(end - begin for begin, end in (tensor.data_offsets for tensor in tensors)))

    try:
        config_path = Path(call_within(LOOKUP_SECONDS, fetch))
    except (HTTPError, OSError) as error:
        raise LlmtuneError(
            f"model.base={repo}: no such local path; and read as a hub id its config.json is not "
            f"in the local hub cache and could not be fetched ({first_line(error)}). Give "
            "the base's place, model.base=PATH, or connect to the network."
        ) from error
    directory = config_path.parent
    try:
        stored = int(call_within(LOOKUP_SECONDS, measure))
    except (HTTPError, OSError, NotASafetensorsRepoError):
        stored = None
    known = _dense_numbers(Checkpoint.open(directory).config, f"{repo} on the hub")
    return replace(
        known,
        stored_bytes=stored if known.notice is None else None,
        tokenizer_dir=directory if (directory / TOKENIZER_NAME).is_file() else None,
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
    config: dict[str, Any] = {
        ours: values[f"{architecture}.{theirs}"]
        for theirs, ours in KEYS.items()
        if f"{architecture}.{theirs}" in values
    }
    config |= {
        "model_type": model_type,
        "vocab_size": head.lengths.get("tokenizer.ggml.tokens"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    check_config(config, str(path))
    return config
