"""What a GGUF file says of itself."""

from pathlib import Path

import gguf
from gguf import GGUFReader

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.write import FILE_TYPES

SOURCE_KEY = "llmtune.source"
"""The fingerprint of the checkpoint's weights that a file was made from."""


def read_file_type(path: Path) -> str:
    """Return the type most of a model's weights have, such as `q8_0`.

    Raises:
        LlmtuneError: it is no GGUF file, is cut short, or holds an adapter.
    """
    reader = _open(path)
    kind = reader.get_field(gguf.Keys.General.TYPE)
    if kind is not None and kind.contents() == gguf.GGUFType.ADAPTER:
        raise LlmtuneError(f"{path}: holds an adapter; expected a whole model")
    field = reader.get_field(gguf.Keys.General.FILE_TYPE)
    names = {int(number): name for name, number in FILE_TYPES.items()}
    return "other" if field is None else names.get(field.contents(), "other")


def read_source(path: Path) -> str | None:
    """Return the fingerprint of the checkpoint the file was made from, or None if it has none."""
    field = _open(path).get_field(SOURCE_KEY)
    return None if field is None else field.contents()


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise LlmtuneError(f"{path}: cannot be read as a GGUF file: {error}") from error
