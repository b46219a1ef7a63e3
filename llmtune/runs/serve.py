"""What a path on the command line offers to a server: its models, exports, and report's answers."""

from collections.abc import Sequence
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.evaluation.suite import load_suites
from llmtune.models.checkpoint import CONFIG_NAME
from llmtune.models.resolve import Loadable
from llmtune.runs.targets import Target, resolve_target
from llmtune.serving.serve import Servable
from llmtune.serving.start_check import Known


def find_servable(name: str, overrides: Sequence[str] = ()) -> Servable:
    """Return what `name` names, with what was exported from it if it is a run.

    Raises:
        LlmtuneError: as `resolve_target`.
    """
    target = resolve_target(name, overrides)
    exports_dir = target.config.run.exports_dir if target.config else None
    return Servable(
        target,
        _find_known(target),
        {} if exports_dir is None else _checkpoints_in(exports_dir),
        {} if exports_dir is None else _files_in(exports_dir),
    )


def _find_known(target: Target) -> Known:
    if target.results_dir is None:
        return Known()
    try:
        return Known(tuple(load_suites(target.evaluate)), target.results_dir)
    except LlmtuneError as error:
        return Known(problem=f"its suites cannot be read: {error}")


def _checkpoints_in(exports_dir: Path) -> dict[str, Loadable]:
    return {
        path.parent.name: resolve_target(str(path.parent))
        for path in sorted(exports_dir.glob(f"*/{CONFIG_NAME}"))
    }


def _files_in(exports_dir: Path) -> dict[str, Path]:
    """Return GGUF files by name, those of a directory by the directory's."""
    alone = {path.stem: path for path in sorted(exports_dir.glob("*.gguf"))}
    inside = {path.parent.name: path for path in sorted(exports_dir.glob("*/*.gguf"))}
    return {**inside, **alone}
