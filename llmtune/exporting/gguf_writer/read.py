"""What a GGUF file says of itself."""

from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.write import FILE_TYPES
from llmtune.io.gguf_head import read_gguf_head

SOURCE_KEY = "llmtune.source"
"""The fingerprint of the checkpoint's weights that a file was made from."""


def read_file_type(path: Path) -> str:
    """Return the type most of a model's weights have, such as `q8_0`.

    Raises:
        LlmtuneError: it is not a GGUF file, is cut short, or holds an adapter.
    """
    values = read_gguf_head(path).values
    if values.get("general.type") == "adapter":
        raise LlmtuneError(f"{path}: holds an adapter; expected a whole model")
    names = {int(number): name for name, number in FILE_TYPES.items()}
    number = values.get("general.file_type")
    return names.get(number, "other") if isinstance(number, int) else "other"


def read_source(path: Path) -> str | None:
    """Return the fingerprint of the checkpoint the file was made from, or None if it has none."""
    source = read_gguf_head(path).values.get(SOURCE_KEY)
    return source if isinstance(source, str) else None
