"""Exporting as the command does."""

from pathlib import Path
from typing import Any

from llmtune.exporting.config import ExportSettings
from llmtune.exporting.export import run_export
from llmtune.runs.targets import export_source, resolve_target


def export_model(
    source: Path,
    to: str,
    out: Path | None,
    type: str | None = None,
    *,
    force: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Export a run, an adapter or a model and return the result as JSON."""
    settings = ExportSettings(to, type, out, force=force, options=options)
    return run_export(export_source(resolve_target(str(source))), settings).to_dict()
