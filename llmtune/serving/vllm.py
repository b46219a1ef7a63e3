"""How `vllm serve` is started on a run, and what it would drop without a word (light)."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.adapters.manifest import read_adapter_config
from llmtune.adapters.servers import unapplied_settings
from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.resolve import Loadable
from llmtune.models.template_date import dated_source
from llmtune.models.turns import as_ids, stop_token_ids
from llmtune.serving.engine_process import EnginePlan
from llmtune.serving.engine_requests import Follows
from llmtune.serving.listening import ENGINE_HOST, ServeSettings
from llmtune.serving.names import MERGED, ORIGINAL, is_alone, name_alone

PROGRAM = "vllm"
KEY_VARIABLE = "VLLM_API_KEY"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that --max-lora-rank takes."""

SAMPLING = frozenset(
    {
        "bad_words",
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "logprobs",
        "min_p",
        "min_tokens",
        "n",
        "presence_penalty",
        "repetition_penalty",
        "response_format",
        "stop_token_ids",
        "top_k",
    }
)
FOLLOWS = Follows(
    chat=SAMPLING | {"parallel_tool_calls", "tool_choice", "tools", "top_logprobs"},
    completion=SAMPLING,
)


def plan_vllm(target: Loadable, settings: ServeSettings) -> EnginePlan:
    """Return how vLLM serves a run's adapter on its base, a merged model, or a whole one.

    Raises:
        LlmtuneError: it is not installed, would drop a part of the adapter, quantizes differently,
            or would not stop where the model was trained to.
    """
    program = shutil.which(PROGRAM)
    if program is None or importlib.util.find_spec(PROGRAM) is None:
        raise LlmtuneError("--engine vllm needs vLLM, which is not installed: pip install vllm")
    return plan_command(program, target, settings)


def plan_command(program: str, target: Loadable, settings: ServeSettings) -> EnginePlan:
    """Return what is started if vLLM is at `program`; raises as `plan_vllm`."""
    names = settings.names or _first_names(target)
    known = _first_names(target) if is_alone(target) else ("tuned", "base", MERGED, ORIGINAL)
    for name in names:
        if name not in known:
            raise LlmtuneError(f"--model {name}: vLLM serves {', '.join(known)}")
    whole = [name for name in names if name not in ("base", "tuned")]
    if whole and len(names) > 1:
        raise LlmtuneError(
            f"--model {' --model '.join(names)}: vLLM loads one base; serve {whole[0]} alone"
        )
    is_merged = names == (MERGED,) and not is_alone(target)
    source = target.merged if is_merged else target.dense_base
    command = [program, "serve", str(source.directory), "--host", ENGINE_HOST]
    command += ["--port", "{port}", "--dtype", _dtype(target)]
    # What the checkpoint proposes for sampling would apply to requests that do not say it.
    command += ["--generation-config", "vllm"]
    if settings.temperature != 1:
        proposed = json.dumps({"temperature": settings.temperature})
        command += ["--override-generation-config", proposed]
    if not whole and target.model.storage.is_quantized:
        raise LlmtuneError(
            f"vLLM does not compute the {target.model.quantization_method} base that the adapter "
            "was trained on; serve --model merged, or use --engine transformers"
        )
    first = names[0]
    if target.adapter_dir is not None and not whole:
        command += ["--served-model-name", "base"]
        if "tuned" in names:
            command += _lora_options(target.adapter_dir)
    else:
        command += ["--served-model-name", first]
    _require_stops(source, target)
    template = _template_file(source)
    if template is not None:
        command += ["--chat-template", str(template)]
    return EnginePlan("vllm", command, tuple(names), first, FOLLOWS, KEY_VARIABLE, log_file=False)


def _first_names(target: Loadable) -> tuple[str, ...]:
    if is_alone(target):
        return (name_alone(target),)
    return tuple(name for name in target.arms if name in ("tuned", "base"))


def _dtype(target: Loadable) -> str:
    """Return the numbers that the model is computed in, as it is here."""
    return "bfloat16" if target.model.dtype == "auto" else target.model.dtype


def _lora_options(adapter_dir: Path) -> list[str]:
    config = read_adapter_config(adapter_dir)
    refuse_dropped(config, str(adapter_dir))
    rank = next((rank for rank in RANKS if rank >= config["r"]), None)
    if rank is None:
        raise LlmtuneError(f"{adapter_dir}: rank {config['r']} is above vLLM's {RANKS[-1]}")
    module = json.dumps({"name": "tuned", "path": str(adapter_dir.absolute())})
    return ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", module]


def refuse_dropped(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter with settings that vLLM refuses late or drops without a word.

    Trained token rows, whole trained modules, expert parameters, ranks of single modules and other
    methods are of this kind; whatever a later PEFT adds is, too, until it is known here.

    Raises:
        LlmtuneError: names the settings.
    """
    dropped = unapplied_settings(config)
    if dropped:
        raise LlmtuneError(
            f"{where}: vLLM does not apply {', '.join(dropped)} of an adapter; serve the "
            "merged model (--model merged), or use --engine transformers"
        )


def _require_stops(source: Checkpoint, target: Loadable) -> None:
    """Require that vLLM ends answers where they end here: at the checkpoint's own tokens."""
    wanted = set(stop_token_ids(source.tokenizer, source.generation_config))
    known = {*as_ids(source.generation_config.get("eos_token_id"))}
    if source.tokenizer.eos_token_id is not None:
        known.add(source.tokenizer.eos_token_id)
    missing = source.tokenizer.convert_ids_to_tokens(sorted(wanted - known))
    if missing:
        raise LlmtuneError(
            f"{target.name}: answers end with {', '.join(missing)}, which generation_config.json "
            f"of {source.directory} does not name, so vLLM would not stop there; serve the merged "
            "model (--model merged)"
        )


def _template_file(source: Checkpoint) -> Path | None:
    """Return a file with the template as it was trained: its arguments, and its date."""
    tokenizer = source.tokenizer
    if not isinstance(tokenizer.chat_template, str):
        return None
    text = dated_source(tokenizer, tokenizer.chat_template)
    descriptor, path = tempfile.mkstemp(prefix="llmtune-template-", suffix=".jinja")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(path)
