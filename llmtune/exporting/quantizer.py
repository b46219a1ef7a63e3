"""llama.cpp's own quantizer, where it is on this machine: K-quants are made by nothing else."""

import shutil
import subprocess
from pathlib import Path

from llmtune.errors import LlmtuneError

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
