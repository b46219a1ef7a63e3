"""The export stage: one file or directory for another program, of a run's model or adapter."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError
from llmtune.exporting.base import Exported, Exporter, ExportSettings, WritingExporter
from llmtune.exporting.config import find_exporter
from llmtune.io.fingerprint import JsonObject
from llmtune.io.manifest import ExportRecord, Manifest, StageRecord, read_manifest
from llmtune.models.checkpoint import Checkpoint
from llmtune.runs.ledger import Ledger
from llmtune.runs.merge import MergeStage
from llmtune.runs.stage import Stage
from llmtune.runs.targets import export_source, resolve_target, run_target

log = logging.getLogger("llmtune")

STAGE_OF = {"merged": "merge", "adapter": "train"}
"""The stage that makes what an exporter takes."""


def export_target(name: str, overrides: Sequence[str], settings: ExportSettings) -> Exported:
    """Export what `name` names and check the result; nothing is left by a failed check.

    Args:
        name: a run, its config, an adapter, or a merged or other model.
        overrides: `key.path=value` of the run's config.
        settings: what is made, and where.

    Raises:
        LlmtuneError: there is nothing to export, or it cannot be exported so.
        CheckFailed: what was written is not what it was made from.
    """
    from llmtune.exporting.export import run_export

    exporter = find_exporter(settings.to)
    target = resolve_target(name, overrides)
    is_given = any(each.partition("=")[0].strip() == "export.type" for each in overrides)
    if is_given and settings.type is None and target.config is not None:
        settings = replace(settings, type=target.config.export.type)
    exporter.choose_type(settings.type)
    if target.config is not None:
        settings = _with_options_of(target.config, exporter, settings)
    return run_export(export_source(target), settings)


def _with_options_of(
    config: RunConfig, exporter: Exporter, settings: ExportSettings
) -> ExportSettings:
    """Fill the options that were not given with those that the run's config has."""
    given = {name: value for name, value in settings.options.items() if value is not None}
    return replace(settings, options={**config.export.options_of(exporter), **given})


class ExportStage(Stage[ExportRecord]):
    """Make one of the exports that the config's `export` section names, and check it."""

    paths_in_run = ("out", "path")

    def __init__(
        self,
        config: RunConfig,
        to: str,
        *,
        force: bool = False,
        opened: Checkpoint | None = None,
    ) -> None:
        super().__init__(config, force=force, opened=opened)
        self.exporter = find_exporter(to)
        self.settings = next(one for one in self.config.export.exports() if one.to == to)
        self.name = f"export {to}"
        self._earlier: str | None = None

    def check(self) -> None:
        """Require what it is made from, finished."""
        if self.exporter.made_from == "merged":
            merge = MergeStage(self.config, opened=self.source)
            problem = merge.why_unusable(read_manifest(self.config.run))
            if problem is not None:
                raise LlmtuneError(problem)

    def before(self, ledger: Ledger) -> None:
        """Remember what an earlier export left: a run that was renamed names files differently."""
        self._earlier = (ledger.manifest.record(self.name).get("result") or {}).get("out")

    def inputs(self, manifest: Manifest) -> JsonObject:
        """Return the stage that it is made from, the file's type, and what it takes of a report."""
        made_by = STAGE_OF[self.exporter.made_from]
        return {
            made_by: manifest.record(made_by).get("fingerprint"),
            "type": self.settings.type,
            **self.settings.options,
            "report": self.exporter.taken_from(self.config.run.report_json_path),
        }

    def outputs(self, record: StageRecord) -> Iterator[Path]:
        """Yield the file or directory."""
        yield Path(self.config.run.place(record["result"]["out"]))

    def run(self, inputs: JsonObject) -> ExportRecord:
        """Write the file and check it; an earlier one is replaced."""
        from llmtune.exporting.export import run_export

        config = self.config
        source = export_source(run_target(str(config.run.path), config, opened=self.source))
        exported = run_export(source, replace(self.settings, force=True))
        if self._earlier is not None:
            self._remove(Path(config.run.place(self._earlier)), but=Path(exported.out))
        return cast(ExportRecord, exported.to_dict())

    def _remove(self, earlier: Path, *, but: Path) -> None:
        """Remove an earlier export of ours, if the new one did not take its place."""
        is_own = isinstance(self.exporter, WritingExporter) and self.exporter.is_own(earlier)
        if not is_own or earlier.resolve() == but.resolve():
            return
        log.info("export: removed the earlier %s", earlier)
        if earlier.is_dir():
            shutil.rmtree(earlier)
        else:
            earlier.unlink()
