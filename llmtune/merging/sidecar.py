"""The small files of a merged model: config, tokenizer, chat template, index, provenance."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import read_json_object
from llmtune.io.own_files import copy_own
from llmtune.io.safetensors import INDEX_FILE, STORED_FLOATS, tensor_bytes
from llmtune.merging.changes import MergePlan

DTYPE_NAMES = {stored: name for name, stored in STORED_FLOATS.items()}

GENERATION_FILE = "generation_config.json"

# The adapter's own win over the base's: it may have been trained with a different template.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")


def sidecar_sources(plan: MergePlan) -> dict[str, Path]:
    """Return the files that are copied as they are, by name, and where each comes from."""
    sources = _present(plan.base_dir, (GENERATION_FILE, *TOKENIZER_FILES))
    sources |= _present(plan.adapter_dir, TOKENIZER_FILES)
    template_dir = plan.adapter_dir if _has_template(plan.adapter_dir) else plan.base_dir
    sources |= _present(template_dir, TEMPLATE_FILES)
    sources |= {path.name: path for path in own_code(plan.base_dir)}
    return sources


def own_code(directory: Path) -> list[Path]:
    """Return the Python files that a checkpoint's config names as its code."""
    has_code = "auto_map" in read_json_object(directory / "config.json")
    return sorted(directory.glob("*.py")) if has_code else []


def write_sidecar(plan: MergePlan, directory: Path) -> None:
    """Write everything but the shards and the provenance into `directory`."""
    for name, source in sidecar_sources(plan).items():
        copy_own(source, directory / name, root=source.parent)
    _write_json(directory / "config.json", merged_config(plan))
    if plan.index_metadata is not None:
        _write_json(directory / INDEX_FILE, _index(plan))


def merged_config(plan: MergePlan) -> dict[str, Any]:
    """Return the base's config.json as the merged model needs it."""
    config = read_json_object(plan.base_dir / "config.json")
    config.pop("quantization_config", None)
    if str(config.get("_name_or_path", "")).startswith("/"):
        del config["_name_or_path"]  # a path of the machine that saved the base
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        sizes[tensor.dtype] += tensor_bytes(tensor.dtype, tensor.shape)
    ((stored, _),) = sizes.most_common(1)
    if stored in DTYPE_NAMES:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPE_NAMES[stored]
    config |= plan.config_changes
    text_config = config.get("text_config")
    if isinstance(text_config, dict):
        text_config |= plan.config_changes
    return config


def _present(directory: Path, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: directory / name for name in names if (directory / name).exists()}


def _has_template(directory: Path) -> bool:
    if _present(directory, TEMPLATE_FILES):
        return True
    path = directory / "tokenizer_config.json"
    return path.is_file() and bool(read_json_object(path).get("chat_template"))


def _index(plan: MergePlan) -> JsonObject:
    weight_map = {tensor.name: shard.file_name for shard in plan.shards for tensor in shard.tensors}
    metadata = {**(plan.index_metadata or {}), "total_size": plan.num_bytes}
    return {"metadata": metadata, "weight_map": weight_map}


def _write_json(path: Path, value: JsonObject) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
