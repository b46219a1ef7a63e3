"""From the name of a parameter in the model in memory to the tensor in the checkpoint."""

import difflib
from collections.abc import Collection, Mapping

# (in memory, in the checkpoint): how transformers 5 renames on loading, tried in this order.
RENAMED_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("lm_head.", "embed_out."),  # gpt_neox
    ("transformer.", ""),  # GPT-2's own checkpoints hold the bare decoder
    ("model.", ""),
    ("gpt_neox.", ""),
    ("", "transformer."),
    ("", "model."),
    ("", "gpt_neox."),
)
RENAMED_INFIXES = ((".mlp.", ".block_sparse_moe."),)  # mixtral, minimax

EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
HEAD_NAMES = ("lm_head", "embed_out")


def find_tensor(name: str, checkpoint: Collection[str]) -> str | None:
    """Return the checkpoint's name for the parameter `name`, or None if it has none."""
    candidates = [name]
    candidates += [name.replace(old, new) for old, new in RENAMED_INFIXES if old in name]
    candidates += [
        new + candidate.removeprefix(old)
        for old, new in RENAMED_PREFIXES
        for candidate in tuple(candidates)
        if candidate.startswith(old)
    ]
    return next((candidate for candidate in candidates if candidate in checkpoint), None)


def find_embedding(checkpoint: Collection[str]) -> str | None:
    """Return the name of the input embedding's weight if there is exactly one."""
    found = [name for name in checkpoint if is_embedding(name)]
    return found[0] if len(found) == 1 else None


def is_embedding(name: str) -> bool:
    """Whether a parameter's name is that of an input embedding's weight."""
    return _module(name) in EMBEDDING_NAMES and name.endswith(".weight")


def is_head(name: str) -> bool:
    """Whether a parameter's name is that of the output head's weight."""
    return _module(name) in HEAD_NAMES and name.endswith(".weight")


def head_name(model_type: str) -> str:
    """Return the name under which a checkpoint of this family holds an untied output head."""
    return "embed_out.weight" if model_type == "gpt_neox" else "lm_head.weight"


def near_misses(name: str, checkpoint: Mapping[str, object]) -> str:
    """Return the checkpoint's names nearest to `name`, for an error's end."""
    close = difflib.get_close_matches(name, checkpoint, n=3, cutoff=0.6)
    if not close:
        return f"the base's tensors are named like {next(iter(checkpoint), 'nothing at all')!r}"
    return "nearest in the base: " + ", ".join(repr(other) for other in close)


def _module(name: str) -> str:
    return name.split(".")[-2] if name.count(".") else ""


def safetensors_name(name: str) -> str:
    """Return the file name that a pickled shard's content has as safetensors."""
    if not name.endswith(".bin"):
        return name
    return name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"
