"""The types of GGUF files; llama.cpp's own quantizer makes those that nothing else does (light)."""

import shutil
import subprocess
from pathlib import Path

from llmtune.errors import LlmtuneError

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
DEFAULT_TYPE = "q8_0"
ADAPTER_TYPES = ("f32", "f16", "bf16")
DEFAULT_ADAPTER_TYPE = "f16"
GGUF_MAGIC = b"GGUF"
PROGRAM = "llama-quantize"
LAST_LINES = 3


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that begins as a GGUF file does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def require_quantizer(type: str) -> str:
    """Return the path of the quantizer that makes `type`.

    Raises:
        LlmtuneError: it is not on the PATH; it is never built or fetched for the user.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise LlmtuneError(
            f"--type {type}: K-quants are made by llama.cpp's own {PROGRAM}, which is not on the "
            "PATH; install llama.cpp, or choose q8_0, q5_1 or another type that needs no program"
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
        last = " | ".join((done.stderr or done.stdout).strip().splitlines()[-LAST_LINES:])
        raise LlmtuneError(f"{command[0]} failed (exit {done.returncode}): {last}")
