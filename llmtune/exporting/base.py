"""What an exporter says of itself, and what an export is made from, in plain values (light)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmtune.checks.provenance import EXPORT_FILE
from llmtune.errors import LlmtuneError
from llmtune.exporting.card import card_lines, read_report
from llmtune.io.fingerprint import JsonObject, JsonValue, hash_json
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.resolve import Loadable

if TYPE_CHECKING:
    from llmtune.exporting.export import ExportJob
    from llmtune.models.live import LiveModel


@dataclass(frozen=True)
class ExportSource(Loadable):
    """What is to be exported: a run, an adapter on its base, or a whole model."""

    run_dir: Path | None = None
    """The run that all of it belongs to, if it is one."""


@dataclass(frozen=True)
class ExportOption:
    """An option of `llmtune export` that an exporter reads, under its name with dashes."""

    name: str
    help: str
    kind: Literal["text", "flag", "switch", "limit"]
    """A text; a flag that is given or not; a switch between --x and --no-x, None by default; a
    number that is not negative."""


@dataclass(frozen=True)
class ExportSettings:
    """One export as asked for, on the command line or by a config."""

    to: str
    """The name of an exporter."""
    type: str | None = None
    """One of the exporter's types; None is its default."""
    out: Path | None = None
    """The file or directory to make; None is `exports/` of the run."""
    force: bool = False
    """Replace what is there."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of the exporter's own options, by their names."""


@dataclass(frozen=True)
class Written:
    """What an exporter wrote."""

    details: JsonObject
    """The result in JSON values: `num_bytes`, `notices` and more."""
    files: Mapping[str, str] = field(default_factory=dict)
    """What each file of a directory is, for its model card."""
    live: "LiveModel | None" = None
    """The model in memory that was written, for a check against itself."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know about what was written."""
        return _notices(self.details)


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    to: str
    """The exporter's name."""
    out: str
    """The file, directory or address."""
    details: JsonObject
    """The exporter's own result in JSON values."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know about the export."""
        return _notices(self.details)

    def to_dict(self) -> JsonObject:
        """Return the result as JSON."""
        return {"to": self.to, "out": self.out, **self.details}


def _notices(details: JsonObject) -> tuple[str, ...]:
    found = details.get("notices", ())
    return tuple(map(str, found)) if isinstance(found, list | tuple) else ()


class Exporter(ABC):
    """One kind of export; it is listed in `exporting.config.EXPORTERS`."""

    name: ClassVar[str]
    """Its name for `--to` and `export.to`."""
    made_from: ClassVar[Literal["merged", "adapter"]] = "merged"
    """The run's result that it is made from."""
    types: ClassVar[tuple[str, ...]] = ()
    """The types of numbers that it can write; () means that there is nothing to choose."""
    default_type: ClassVar[str | None] = None
    has_type_of_run: ClassVar[bool] = False
    """Whether `export.type` of a config applies to it."""
    is_made_by_runs: ClassVar[bool] = True
    """Whether `export.to` of a config may name it."""
    options: ClassVar[tuple[ExportOption, ...]] = ()

    def has_option(self, name: str) -> bool:
        """Whether the exporter reads the option of this name."""
        return any(option.name == name for option in self.options)

    def choose_type(self, type: str | None) -> str | None:
        """Return the type to write, or None if there is nothing to choose.

        Raises:
            LlmtuneError: the type is unknown, or needs a program that is not on this machine.
        """
        if not self.types:
            if type is not None:
                raise LlmtuneError(f"--type {type}: --to {self.name} has no types; leave it out")
            return None
        chosen = type or self.default_type
        if chosen not in self.types:
            raise LlmtuneError(f"--type {chosen}: --to {self.name} writes {', '.join(self.types)}")
        return chosen

    def find_route(self, base: Checkpoint, settings: ExportSettings) -> str:
        """Return in words how models of this base are exported; reads its small files only.

        Args:
            base: the 16-bit base, or a model merged from it.
            settings: what is asked for; where it goes does not matter.

        Raises:
            LlmtuneError: they cannot be exported so.
        """
        self.choose_type(settings.type)
        return "written by llmtune"

    def taken_from(self, report_path: Path) -> JsonValue:
        """Return what of a run's report.json gets into the export, as JSON values."""
        return None

    @abstractmethod
    def export(self, job: "ExportJob") -> Exported:
        """Make the export and check it; nothing is left by a failed check.

        Raises:
            LlmtuneError: there is nothing to export, or it cannot be exported so.
            CheckFailed: what was written is not what it was made from.
        """


class WritingExporter(Exporter):
    """An exporter that writes on this machine: a `FileExporter` or a `DirectoryExporter`."""

    product: ClassVar[str]
    """What it makes, in words."""

    @abstractmethod
    def output_name(self, stem: str) -> str:
        """Return the name under `exports/` of a run; `stem` is `run-type`."""

    @abstractmethod
    def is_own(self, out: Path) -> bool:
        """Whether an earlier export is there, which may be replaced."""

    @abstractmethod
    def write(self, job: "ExportJob", path: Path) -> Written:
        """Write the file `path`, or into the empty directory `path`; it is put in place later.

        Raises:
            LlmtuneError: there is nothing to export, or it cannot be exported so.
            OSError: the disk ran full.
        """

    @abstractmethod
    def check(self, job: "ExportJob", path: Path, written: Written) -> JsonObject:
        """Check what was written to `path`; return what is added to the result's details.

        Raises:
            CheckFailed: it is not what it was made from; it is not kept.
        """


class FileExporter(WritingExporter):
    """An exporter that writes one file, with the base's name and the verdict in its head."""

    def taken_from(self, report_path: Path) -> JsonValue:
        """Return the facts of the head."""
        report = read_report(report_path)
        return None if report is None else {**report.facts()}

    def export(self, job: "ExportJob") -> Exported:
        """Write the file, check it, and put it in its place."""
        return job.write_file(self)


class DirectoryExporter(WritingExporter):
    """An exporter that writes a directory, which gets a model card and a mark of its own."""

    def taken_from(self, report_path: Path) -> JsonValue:
        """Return the facts of the head, and the card."""
        report = read_report(report_path)
        facts = {} if report is None else report.facts()
        return {**facts, "card": hash_json(list(card_lines(report)))}

    def is_own(self, out: Path) -> bool:
        """Whether a directory with the mark is there."""
        return (out / EXPORT_FILE).is_file()

    def export(self, job: "ExportJob") -> Exported:
        """Write the directory, check it, and put it in its place, whole."""
        return job.write_directory(self)
