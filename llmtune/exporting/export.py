"""Export a run, an adapter or a model for another program, then check what was written."""

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtune.checks.provenance import EXPORT_FILE, read_record
from llmtune.data.template import require_trained_template
from llmtune.errors import LlmtuneError
from llmtune.exporting.base import (
    DirectoryExporter,
    Exported,
    ExportSettings,
    ExportSource,
    FileExporter,
    WritingExporter,
)
from llmtune.exporting.card import CARD_NAME, CardReport, read_report, render_card
from llmtune.exporting.config import find_exporter
from llmtune.io.environment import versions
from llmtune.io.run_dir import RunDir, atomic_write_text
from llmtune.io.unfinished import (
    move_into_place,
    refuse_to_replace,
    unfinished_dir,
    unfinished_file,
)
from llmtune.models.checkpoint import Checkpoint
from llmtune.version import __version__

log = logging.getLogger("llmtune")


def run_export(source: ExportSource, settings: ExportSettings) -> Exported:
    """Export `source` and check the result; nothing is left by a failed check.

    Raises:
        LlmtuneError: there is nothing to export, or it cannot be exported so.
        CheckFailed: what was written is not what it was made from.
    """
    exporter = find_exporter(settings.to)
    job = ExportJob(source, settings, exporter.choose_type(settings.type))
    exported = exporter.export(job)
    for notice in exported.notices:
        log.warning("%s", notice)
    return exported


@dataclass(frozen=True)
class ExportJob:
    """One export on its way: what it is made from, what was asked for, and where it goes."""

    source: ExportSource
    settings: ExportSettings
    type: str | None
    """The type to write; None if the exporter has none."""

    @property
    def name(self) -> str:
        """The model's name: that of the run's or the model's directory."""
        return (self.source.run_dir or Path(self.source.name)).resolve().name

    def option(self, name: str) -> Any:
        """Return the value of an option of the exporter; None if it was not given."""
        return self.settings.options.get(name)

    @cached_property
    def model(self) -> Checkpoint:
        """The 16-bit model to export: a run's merged one, or the model named.

        Raises:
            LlmtuneError: it has not been merged.
        """
        source = self.source
        self._refuse_an_adapter_alone()
        if source.merged_dir is None and source.run_dir is None and source.adapter_dir is None:
            return self.base
        if source.adapter_dir is not None:
            require_trained_template(source.merged.tokenizer, source.adapter_dir)
        return source.merged

    @property
    def adapter_dir(self) -> Path:
        """The adapter to export.

        Raises:
            LlmtuneError: there is none.
        """
        if self.source.adapter_dir is None:
            raise LlmtuneError(f"{self.source.name}: has no adapter to export")
        return self.source.adapter_dir

    @property
    def base(self) -> Checkpoint:
        """The checkpoint of the base, or of the whole model."""
        return self.source.dense_base

    @cached_property
    def report(self) -> CardReport | None:
        """The run's report.json, if there is one."""
        run_dir = self.source.run_dir
        return None if run_dir is None else read_report(RunDir(run_dir).report_json_path)

    @property
    def out(self) -> Path:
        """The file or directory to make."""
        assert self.settings.out is not None
        return self.settings.out

    def card(self, name: str, files: Mapping[str, str]) -> str:
        """Return the text of the model card."""
        return render_card(name, self.report, files=files)

    def provenance(self, made_from: Checkpoint) -> dict[str, str]:
        """Return what an export of `made_from` was made from, as keys of a GGUF file's head."""
        facts = {f"llmtune.{key}": value for key, value in self._facts(made_from).items()}
        name = facts.pop("llmtune.base_name", None)
        return facts | ({"general.base_model.0.name": name} if name else {})

    def write_file(self, exporter: FileExporter) -> Exported:
        """Let an exporter write and check a file beside its place, then put it there."""
        job = self._placed(exporter)
        with unfinished_file(job.out) as unfinished:
            written = exporter.write(job, unfinished)
            checked = exporter.check(job, unfinished, written)
        return Exported(exporter.name, str(job.out), {**written.details, **checked})

    def write_directory(self, exporter: DirectoryExporter) -> Exported:
        """Let an exporter fill and check a directory beside its place, then put it there, whole."""
        job = self._placed(exporter)
        out = job.out.absolute()
        with unfinished_dir(out) as scratch:
            directory = scratch / out.name
            directory.mkdir()
            written = exporter.write(job, directory)
            checked = exporter.check(job, directory, written)
            atomic_write_text(directory / CARD_NAME, job.card(job.name, written.files))
            facts = {"to": exporter.name, "type": job.type, **job._facts(job.model)}
            content = {**facts, "versions": versions()}
            atomic_write_text(directory / EXPORT_FILE, json.dumps(content, indent=2) + "\n")
            move_into_place(directory, out)
        return Exported(exporter.name, str(job.out), {**written.details, **checked})

    def _placed(self, exporter: WritingExporter) -> "ExportJob":
        """Return the job with the place that it writes to.

        Raises:
            LlmtuneError: no place is given, or what is there may not be replaced.
        """
        out = self.settings.out
        if out is None:
            run_dir = self.source.run_dir
            if run_dir is None:
                if exporter.made_from == "merged":
                    self._refuse_an_adapter_alone()
                raise LlmtuneError(
                    f"{self.source.name}: is not a run; say where the export goes with --out"
                )
            out = RunDir(run_dir).exports_dir / exporter.output_name(f"{self.name}-{self.type}")
        refuse_to_replace(
            out,
            product=f"a {exporter.product}",
            is_own=exporter.is_own,
            force=self.settings.force,
        )
        return replace(self, settings=replace(self.settings, out=out))

    def _refuse_an_adapter_alone(self) -> None:
        """Say how an adapter becomes a model that can be exported.

        Raises:
            LlmtuneError: it is an adapter, without a run that has merged it.
        """
        source = self.source
        if (
            source.adapter_dir is None
            or source.merged_dir is not None
            or source.run_dir is not None
        ):
            return
        raise LlmtuneError(
            f"{source.name}: an adapter is merged first: llmtune merge {shlex.quote(source.name)} "
            f"--out merged, then: llmtune export merged --to {self.settings.to} --out NAME"
        )

    def _facts(self, made_from: Checkpoint) -> dict[str, str]:
        """Return what the export was made from, without any path of this machine."""
        facts = {"source": made_from.fingerprint, "version": __version__}
        record = read_record(made_from.directory)
        if record is not None:
            facts |= {"merged_into": record.base, "adapter": record.adapter_hash}
        return facts | ({} if self.report is None else self.report.facts())
