"""The types of GGUF files: those written here, those that llama.cpp makes, and that of a file."""

import shutil
import subprocess
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.io.gguf_head import read_gguf_head
from llmtune.io.stopping import last_lines

OWN_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
QUANTIZER_TYPES = (
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
)
"""What only llama.cpp's own quantizer makes."""
GGUF_TYPES = OWN_TYPES + QUANTIZER_TYPES
FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    **{name: 10 + place for place, name in enumerate(QUANTIZER_TYPES)},
    "bf16": 32,
}
"""llama.cpp's numbers for `general.file_type`."""
DEFAULT_TYPE = "q8_0"
ADAPTER_TYPES = ("f32", "f16", "bf16")
DEFAULT_ADAPTER_TYPE = "f16"
SOURCE_KEY = "llmtune.source"
"""The fingerprint of the checkpoint's weights that a file was made from."""
ADAPTER_KEY = "llmtune.adapter"
"""The fingerprint of the adapter that is merged into them."""
PROGRAM = "llama-quantize"
LAST_LINES = 3


def require_quantizer(type: str) -> str:
    """Return the path of the quantizer that makes `type`.

    Raises:
        LlmtuneError: it is not on the PATH; it is never built or fetched for the user.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise LlmtuneError(
            f"type {type} needs llama.cpp's own {PROGRAM}, which is not on the PATH; "
            "install llama.cpp, or choose q8_0 or another type that needs no program"
        )
    return found


def quantize_file(source: Path, path: Path, type: str) -> None:
    """Make the K-quant `path` from the GGUF file `source`.

    Raises:
        LlmtuneError: the quantizer is not there, or failed; nothing is left at `path`.
    """
    command = [require_quantizer(type), str(source), str(path), type.upper()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not path.is_file():
        path.unlink(missing_ok=True)
        last = last_lines(done.stderr or done.stdout, LAST_LINES)
        raise LlmtuneError(f"{command[0]} failed (exit {done.returncode}): {last}")


def read_file_type(path: Path) -> str:
    """Return the type most of a model's weights have, such as `q8_0`.

    Raises:
        LlmtuneError: it is not a GGUF file, is cut short, or holds an adapter.
    """
    values = read_gguf_head(path).values
    if values.get("general.type") == "adapter":
        raise LlmtuneError(f"{path}: holds an adapter; expected a whole model")
    names = {number: name for name, number in FILE_TYPES.items()}
    number = values.get("general.file_type")
    return names.get(number, "other") if isinstance(number, int) else "other"


def read_origin(path: Path) -> tuple[str | None, str | None]:
    """Return the fingerprints of the checkpoint and the adapter that a file says it was made from.

    None if it names none.
    """
    values = read_gguf_head(path).values
    found = (values.get(SOURCE_KEY), values.get(ADAPTER_KEY))
    source, adapter = (one if isinstance(one, str) else None for one in found)
    return source, adapter
