"""What a checkpoint directory must hold before anything heavy is loaded from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
SAFETENSORS_NAMES = ("model.safetensors", "model.safetensors.index.json")
PICKLE_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def read_model_config(base_dir: Path) -> dict:
    """Return the checkpoint's config.json.

    Raises:
        LlmtuneError: it is missing, is not JSON, or names no model type.
    """
    path = base_dir / CONFIG_NAME
    if not path.is_file():
        raise LlmtuneError(f"{base_dir}: not a model checkpoint: {_what_else(base_dir)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlmtuneError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise LlmtuneError(f"{path}: no `model_type`: this is not a transformers checkpoint.")
    return config


def read_generation_config(base_dir: Path) -> dict:
    """Return generation_config.json, or {} where there is none."""
    path = base_dir / GENERATION_NAME
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LlmtuneError(f"{path}: not valid JSON: {error}") from error


def embedding_rows(base_dir: Path) -> int:
    """Return the number of token ids the model has rows for: config.json's vocab_size."""
    config = read_model_config(base_dir)
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(rows, int):
        raise LlmtuneError(f"{base_dir / CONFIG_NAME}: no `vocab_size`.")
    return rows


def check_checkpoint(base_dir: Path, *, allow_pickle: bool, allow_quantized: bool = False) -> None:
    """Check that `base_dir` is a whole checkpoint in a file format that is allowed.

    Raises:
        LlmtuneError: config or weights are missing or incomplete, the weights are pickled and
            `allow_pickle` is false, or the checkpoint is already quantized and `allow_quantized`
            is false.
    """
    config = read_model_config(base_dir)
    if not allow_quantized:
        refuse_quantized(config, str(base_dir))
    if has_weights(base_dir, SAFETENSORS_NAMES):
        return
    if has_weights(base_dir, PICKLE_NAMES):
        if allow_pickle:
            return
        raise LlmtuneError(
            f"{base_dir}: the weights are pickled .bin files, which are not read by default. "
            "Give a safetensors checkpoint, or set model.weights=any."
        )
    raise LlmtuneError(
        f"{base_dir}: no weights: expected model.safetensors, or model.safetensors.index.json "
        "with its shards. Copy them there, or give the base's place: model.base=PATH"
    )


def refuse_quantized(config: Mapping[str, Any], place: str) -> None:
    """Refuse a base whose config.json says that it is quantized already.

    Raises:
        LlmtuneError: it is; `place` names it.
    """
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise LlmtuneError(
            f"{place}: this base is already quantized ({method}); an adapter could not be "
            "merged into it. Give the 16-bit checkpoint and choose model.quantization instead."
        )


def has_weights(base_dir: Path, names: tuple[str, str]) -> bool:
    """Whether the single file, or the index and every shard it names, is there.

    Raises:
        LlmtuneError: there is an index, but a shard it names is missing.
    """
    single, index = (base_dir / name for name in names)
    if single.is_file():
        return True
    if not index.is_file():
        return False
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise LlmtuneError(f"{index}: not a weight index: {error}") from error
    missing = [shard for shard in shards if not (base_dir / shard).is_file()]
    if missing:
        raise LlmtuneError(
            f"{base_dir}: {len(missing)} of {len(shards)} weight shards are missing, "
            f"the first is {missing[0]}. Copy them there, or give the base's place: "
            "model.base=PATH"
        )
    return True


def _what_else(base_dir: Path) -> str:
    if (base_dir / "adapter_config.json").is_file():
        return (
            "it holds an adapter. Give the base it was trained on; to go on training this "
            f"adapter set adapter.init_from={base_dir}."
        )
    gguf = sorted(base_dir.glob("*.gguf"))
    if gguf:
        return f"there is no config.json; for the GGUF file in it give {gguf[0]}."
    return (
        "there is no config.json. Copy it there, or give the base's place: model.base=PATH "
        "(a checkpoint directory, a .gguf file or a hub id)"
    )
