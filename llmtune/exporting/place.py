"""Where an export may go: nothing is overwritten unasked, and never what is no export."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.environment import versions
from llmtune.io.run_dir import atomic_write_text

EXPORT_FILE = "llmtune_export.json"
"""What a directory was made from, without any path of this machine; it marks it as ours."""
DIRECTORY_KINDS = frozenset({"ollama", "nf4"})
GGUF_MAGIC = b"GGUF"


def require_new(out: Path, to: str, *, overwrite: bool) -> None:
    """Check that nothing is overwritten unasked, and nothing but an earlier export at all.

    Args:
        out: the file or directory to make.
        to: the kind of export that is to go there.
        overwrite: whether an earlier export may be replaced.

    Raises:
        LlmtuneError: there is something that may not be replaced.
    """
    if not out.exists():
        return
    if not overwrite:
        raise LlmtuneError(f"{out}: exists already; choose another --out, or give --force")
    is_export = _is_directory_export(out) if to in DIRECTORY_KINDS else _is_gguf(out)
    if not is_export:
        expected = f"directory that --to {to} made" if to in DIRECTORY_KINDS else "GGUF file"
        raise LlmtuneError(f"{out}: is no {expected}, so it is not replaced; choose another --out")


def mark_export(directory: Path, facts: Mapping[str, Any]) -> None:
    """Leave in a directory what it was made from and with."""
    content = {**facts, "versions": versions()}
    atomic_write_text(directory / EXPORT_FILE, json.dumps(content, indent=2) + "\n")


def _is_directory_export(out: Path) -> bool:
    return (out / EXPORT_FILE).is_file()


def _is_gguf(out: Path) -> bool:
    if not out.is_file():
        return False
    with out.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
