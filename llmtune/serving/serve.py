"""Start an OpenAI-compatible endpoint on what a target names, with the engine that suits it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.data.conversation import Conversation
from llmtune.io.gguf_head import GGUF_SUFFIX
from llmtune.models.resolve import Loadable
from llmtune.serving.engine_process import run_engine
from llmtune.serving.listening import (
    MAX_WAITING,
    ServeSettings,
    announce,
    bind_socket,
    read_api_key,
    require_packages,
)
from llmtune.serving.llama_cpp import plan_llama_cpp
from llmtune.serving.start_check import Asked, Known, KnownQuestion, StartCheck, check_answers
from llmtune.serving.vllm import plan_vllm

if TYPE_CHECKING:
    from llmtune.serving.live_models import LiveModels


@dataclass(frozen=True)
class Servable:
    """What is served: a target, what was exported from it, and where its report's answers are."""

    target: Loadable
    known: Known = field(default_factory=Known)
    exports: Mapping[str, Loadable] = field(default_factory=dict)
    """Checkpoints."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """GGUF files."""


def serve(served: Servable, settings: ServeSettings) -> None:
    """Answer requests until Ctrl-C; `auto` runs a GGUF file in llama.cpp, all else in transformers.

    Raises:
        LlmtuneError: a package is missing, the address is taken, there is no such model, or the
            engine cannot load it.
    """
    engine = settings.engine
    if engine == "auto":
        is_file = Path(served.target.name).suffix == GGUF_SUFFIX
        engine = "llama.cpp" if is_file else "transformers"
    if engine == "llama.cpp":
        plan = plan_llama_cpp(served.target, served.files, settings)
        run_engine(plan, served.known, settings)
    elif engine == "vllm":
        run_engine(plan_vllm(served.target, settings), served.known, settings)
    else:
        serve_live(served, settings)


def serve_live(served: Servable, settings: ServeSettings) -> None:
    """Load the target with transformers and take requests until Ctrl-C.

    Raises:
        LlmtuneError: a package is missing, the address is taken, there is no such model, or it
            cannot be loaded.
    """
    require_packages()
    key = read_api_key(settings)
    from llmtune.serving.http_api import HttpSettings
    from llmtune.serving.http_server import Server
    from llmtune.serving.live_models import LiveModels
    from llmtune.serving.names import find_models

    models = LiveModels(find_models(served.target, served.exports, settings.names))
    taken = bind_socket(settings.host, settings.port)
    try:
        models.load()
        checked = _check_live(models, served, settings)
        most = MAX_WAITING if settings.max_waiting is None else settings.max_waiting
        http = HttpSettings(settings.host, key, settings.temperature)
        server = Server(models, http, most)
        announce(settings, taken.getsockname()[1], "transformers", models.names, checked)
        server.take_requests(taken)
    finally:
        taken.close()


def _check_live(models: "LiveModels", served: Servable, settings: ServeSettings) -> StartCheck:
    from llmtune.serving.openai_api import AnswerRequest
    from llmtune.serving.shapes import Said

    first = models.find(None)
    identity = models.load().identity_as("base" if first.arm == "base" else None).as_dict()

    def ask(question: KnownQuestion) -> str:
        request = AnswerRequest(
            first.name,
            Conversation("chat", [dict(message) for message in question.messages]),
            max_tokens=question.kept.max_tokens,
            temperature=0.0,
            stop=question.kept.stops,
        )
        return "".join(part.text for part in models.answer(request) if isinstance(part, Said))

    known = served.known if first.target is served.target else Known()
    return check_answers(Asked(first.name, first.arm, identity), known, settings.num_checked, ask)
