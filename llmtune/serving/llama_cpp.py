"""A GGUF file in llama.cpp's own server (light)."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from llmtune.checks.runtime import require_runtime
from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.types import read_file_type
from llmtune.io.gguf_head import GGUF_SUFFIX, read_gguf_head
from llmtune.models.resolve import Loadable
from llmtune.models.template_date import fix_clock
from llmtune.serving.engine_process import EnginePlan
from llmtune.serving.engine_requests import Follows
from llmtune.serving.listening import ENGINE_HOST, ServeSettings

KEY_VARIABLE = "LLMTUNE_SERVE_KEY"
KIND = "general.type"
WHOLE = "model"
TEMPLATE = "tokenizer.chat_template"
WHOLE_NUMBERS = ("f32", "bf16", "f16")
SAMPLING = frozenset(
    {
        "frequency_penalty",
        "grammar",
        "ignore_eos",
        "logit_bias",
        "logprobs",
        "min_p",
        "presence_penalty",
        "repeat_last_n",
        "repeat_penalty",
        "top_k",
        "typical_p",
    }
)
FOLLOWS = Follows(
    chat=SAMPLING
    | {"parallel_tool_calls", "response_format", "tool_choice", "tools", "top_logprobs"},
    # its log-probabilities of a completion do not have the protocol's shape
    completion=SAMPLING - {"logprobs"},
    # what it keeps of earlier prompts changes the rounding, and with it what is drawn
    if_repeatable={"cache_prompt": False},
)
TOOLS = ("parallel_tool_calls", "tool_choice", "tools")


def plan_llama_cpp(
    target: Loadable, files: Mapping[str, Path], settings: ServeSettings
) -> EnginePlan:
    """Return how llama.cpp serves a GGUF file, or a run's exported one.

    Args:
        target: the file, or the run.
        files: the GGUF files of a run, by name.

    Raises:
        LlmtuneError: llama.cpp is not installed, or there is no such file, or no whole model in it.
    """
    require_runtime("serving")
    path = Path(target.name)
    if path.suffix == GGUF_SUFFIX and path.is_file():
        files = {path.stem: path}
    shown, file = _choose(target.name, files, settings.names)
    values = read_gguf_head(file).values
    kind = values.get(KIND, WHOLE)
    if kind != WHOLE:
        raise LlmtuneError(
            f"{file}: holds an {kind}, not a whole model; export the merged one "
            "(llmtune export --help says how)"
        )
    template = values.get(TEMPLATE)
    follows = FOLLOWS
    if "tools" not in str(template):
        why = f"the template of {file.name} has no place for them"
        follows = FOLLOWS.without(TOOLS, why)
    question = {
        "path": str(file),
        "name": shown,
        "host": ENGINE_HOST,
        "temperature": settings.temperature,
        "template": _dated_template(template, target.template_date),
    }
    command = [sys.executable, "-m", "llmtune.serving.llama_cpp_worker", json.dumps(question)]
    numbers = read_file_type(file)
    return EnginePlan(
        "llama.cpp",
        [*command, "{port}"],
        (shown,),
        "merged",
        follows,
        KEY_VARIABLE,
        rounding=None if numbers in WHOLE_NUMBERS else numbers,
    )


def _dated_template(template: object, date: str | None) -> str | None:
    """Return the file's template with the run's date in the clock's place; None without a clock."""
    if date is None or not isinstance(template, str):
        return None
    dated = fix_clock(template, date)
    return None if dated == template else dated


def _choose(name: str, files: Mapping[str, Path], wanted: tuple[str, ...]) -> tuple[str, Path]:
    """Return the one file that is served, with the name that it answers by."""
    if not files:
        raise LlmtuneError(
            f"{name}: no GGUF file, which is what llama.cpp reads; export one first "
            "(llmtune export --help says how)"
        )
    known = ", ".join(files)
    if len(wanted) > 1 or (len(files) > 1 and not wanted):
        raise LlmtuneError(f"llama.cpp serves one file; choose it with --model: {known}")
    shown = wanted[0] if wanted else next(iter(files))
    if shown not in files:
        raise LlmtuneError(f"--model {shown}: {name} has no such GGUF file; there is: {known}")
    return shown, files[shown]
