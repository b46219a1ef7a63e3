"""llmtune: adapt a pretrained LLM to your task on one GPU, and know whether it worked."""

from typing import TYPE_CHECKING, Any

from llmtune.io.native_libraries import set_defaults
from llmtune.version import __version__

if TYPE_CHECKING:
    from llmtune.config import load_config
    from llmtune.runs.pipeline import evaluate, export, merge, report, run, train, verify

__all__ = [
    "__version__",
    "evaluate",
    "export",
    "load_config",
    "merge",
    "report",
    "run",
    "train",
    "verify",
]

# Here, because these libraries read it once, before the first product of a process, whoever asks
# for that: a command, a script that imports llmtune, or a process that one of them starts.
set_defaults()


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for: `import llmtune` costs nothing."""
    if name == "load_config":
        from llmtune.config import load_config

        return load_config
    if name in __all__:
        from llmtune.runs import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'llmtune' has no attribute {name!r}")
