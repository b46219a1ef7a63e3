"""llmtune: adapt a pretrained LLM to your task on one GPU, and know whether it worked."""

import importlib
from typing import TYPE_CHECKING, Any

from llmtune.io.native_libraries import set_defaults
from llmtune.version import __version__

if TYPE_CHECKING:
    from llmtune.config import RunConfig, load_config
    from llmtune.errors import LlmtuneError
    from llmtune.runs.pipeline import export, merge, report, train, verify
    from llmtune.runs.python import evaluate, predict, run, tune

__all__ = [
    "LlmtuneError",
    "RunConfig",
    "__version__",
    "evaluate",
    "export",
    "load_config",
    "merge",
    "predict",
    "report",
    "run",
    "train",
    "tune",
    "verify",
]
_ROOMS = {
    "LlmtuneError": "llmtune.errors",
    "RunConfig": "llmtune.config",
    "load_config": "llmtune.config",
    **dict.fromkeys(("evaluate", "predict", "run", "tune"), "llmtune.runs.python"),
    **dict.fromkeys(("export", "merge", "report", "train", "verify"), "llmtune.runs.pipeline"),
}

# Here, because these libraries read it once, before the first product of a process, whoever asks
# for that: a command, a script that imports llmtune, or a process that one of them starts.
set_defaults()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import llmtune` costs nothing."""
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'llmtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
