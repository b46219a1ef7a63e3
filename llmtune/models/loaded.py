"""A model that is loaded already, saved once as the checkpoint that is merged and checked."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmtune.errors import LlmtuneError
from llmtune.io.cached import cache_dir, make_once
from llmtune.io.json_files import blamed_on, parse_json
from llmtune.models.checkpoint import CONFIG_NAME

SET_BY_SAVING = frozenset({"_name_or_path", "architectures", "dtype", "transformers_version"})
"""Keys of a model's config that are different once it was saved."""


def save_loaded(model: Any, tokenizer: Any = None) -> Path:
    """Return a checkpoint of the model as it is now, in the cache, named by its content.

    Args:
        model: of transformers, with all of its weights in memory and none of them quantized.
        tokenizer: the model's; None takes that of the checkpoint that it was loaded from.

    Raises:
        LlmtuneError: it cannot be a base, or its tokenizer is not known.
    """
    if not isinstance(model, PreTrainedModel):
        raise LlmtuneError(
            f"model is a {type(model).__name__}; expected a path, a hub id or a loaded model of "
            "transformers"
        )
    _require_base(model)
    tokenizer = _load_own(model) if tokenizer is None else tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise LlmtuneError(
            f"tokenizer is a {type(tokenizer).__name__}; expected one of transformers"
        )
    target = cache_dir() / "python" / f"model-{_fingerprint(model, tokenizer)[:16]}"
    if not (target / CONFIG_NAME).is_file():

        def write(directory: Path) -> None:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)

        make_once(target, write, marker=CONFIG_NAME, source="the loaded model")
    return target


def _require_base(model: PreTrainedModel) -> None:
    advice = "give the directory or the hub id that it was loaded from"
    if getattr(model, "is_quantized", False):
        raise LlmtuneError(
            f"model is a {type(model).__name__} whose weights are quantized; {advice}, and set "
            "model.quantization"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LlmtuneError(
            f"model is a {type(model).__name__} with an adapter on it; {advice}, or the adapter's"
        )
    if any(each.device.type == "meta" for each in model.parameters()):
        raise LlmtuneError(
            f"model is a {type(model).__name__} whose weights are not all in memory; {advice}"
        )


def _load_own(model: PreTrainedModel) -> Any:
    name = getattr(model.config, "_name_or_path", "")
    if name:
        with suppress(LlmtuneError), blamed_on(Path(name), "transformers"):
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
    raise LlmtuneError(
        f"model is a {type(model).__name__} that is loaded already, and there is no tokenizer in "
        f"{name or 'its checkpoint'}; give the tokenizer, too: tokenizer=..."
    )


def _render(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all that makes token ids of a text, without how the last call padded and cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return str(tokenizer)
    rendered = parse_json(backend.to_str())
    return json.dumps({**rendered, "padding": None, "truncation": None}, sort_keys=True)


def _fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256()
    for part in (model.config, model.generation_config):
        settings = {} if part is None else part.to_dict()
        kept = {key: value for key, value in settings.items() if key not in SET_BY_SAVING}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    special = sorted(tokenizer.special_tokens_map.items())
    for text in (_render(tokenizer), special, tokenizer.chat_template):
        digest.update(str(text).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
