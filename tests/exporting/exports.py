"""Exporting as the command does."""

from pathlib import Path
from typing import Any

from llmtune.exporting.config import ExportSettings
from llmtune.runs.export import export_target


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
    return export_target(str(source), (), settings).to_dict()
