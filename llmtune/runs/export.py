"""The export stage: one file or directory for another program, of a run's model or adapter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmtune.config import RunConfig
from llmtune.io.manifest import Manifest, StageRecord
from llmtune.runs.stage import Stage


class ExportStage(Stage):
    """Make one of the kinds that the config's `export` section names, and check it."""

    def __init__(self, config: RunConfig, kind: str, *, force: bool = False) -> None:
        super().__init__(config, force=force)
        self.kind = kind
        self.name = f"export {kind}"

    def inputs(self, manifest: Manifest) -> dict[str, Any]:
        """Return the fingerprint of the stage that it is made from, and the file's type."""
        made_from = "train" if self.kind == "adapter-gguf" else "merge"
        return {
            made_from: manifest.stages.get(made_from, {}).get("fingerprint"),
            "type": self.config.export.type_for(self.kind),
        }

    def outputs(self, record: StageRecord) -> Iterator[Path]:
        """Yield the file or directory."""
        yield Path(record["result"]["out"])

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write the file and check it; an earlier one is replaced."""
        from llmtune.exporting.config import ExportSettings
        from llmtune.stages.export import export_target

        settings = ExportSettings(to=self.kind, type=inputs["type"], force=True)
        return export_target(str(self.config.run.path), (), settings)
