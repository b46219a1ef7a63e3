"""Can this base be exported at all: known before training, without torch and without weights."""

from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.exporting.config import (
    ADAPTER_TYPES,
    DEFAULT_ADAPTER_TYPE,
    DEFAULT_TYPE,
    EXPORT_KINDS,
    GGUF_TYPES,
    QUANTIZER_TYPES,
    WITH_TYPES,
)
from llmtune.exporting.gguf.architectures import find_architecture
from llmtune.exporting.gguf.vocabulary import read_vocabulary
from llmtune.exporting.quantizer import require_quantizer


def check_exportable(
    base_dir: Path, to: str, type: str | None = None, *, chat_template: Path | None = None
) -> None:
    """Check that a checkpoint of this base can be exported; reads its small files only.

    For the GGUF kinds: the architecture and every number in its config are ones that llama.cpp
    computes as transformers does, and the tokenizer is one that it has.

    Args:
        base_dir: the 16-bit base, or a model merged from it.
        to: one of `config.EXPORT_KINDS`.
        type: one of `config.GGUF_TYPES`; None is the default.
        chat_template: a Jinja file that replaces the checkpoint's own template.

    Raises:
        LlmtuneError: an unknown kind or type, or a base that cannot be exported so.
    """
    choose_type(to, type)
    if to in WITH_TYPES:
        find_architecture(base_dir)
        read_vocabulary(base_dir, chat_template=chat_template)


def choose_type(to: str, type: str | None) -> str | None:
    """Return the type to write, or None where the kind has none.

    Raises:
        LlmtuneError: the kind or the type is unknown, they do not go together, or the type needs a
            program that is not on this machine.
    """
    if to not in EXPORT_KINDS:
        raise LlmtuneError(f"--to {to}: expected one of {', '.join(EXPORT_KINDS)}")
    if to not in WITH_TYPES:
        if type is not None:
            raise LlmtuneError(f"--type {type}: --to {to} has no types; leave it out")
        return None
    is_adapter = to == "adapter-gguf"
    chosen = type or (DEFAULT_ADAPTER_TYPE if is_adapter else DEFAULT_TYPE)
    known = ADAPTER_TYPES if is_adapter else GGUF_TYPES
    if chosen not in known:
        raise LlmtuneError(f"--type {chosen}: --to {to} writes {', '.join(known)}")
    if chosen in QUANTIZER_TYPES:
        require_quantizer(chosen)
    return chosen
