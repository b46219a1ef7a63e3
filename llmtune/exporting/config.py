"""The exporters, the config's `export` section, and the settings of one export (light)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from llmtune.errors import LlmtuneError
from llmtune.exporting.adapter_gguf import AdapterGgufExporter
from llmtune.exporting.base import Exporter, ExportSettings
from llmtune.exporting.gguf import GgufExporter
from llmtune.exporting.hub import HubExporter
from llmtune.exporting.nf4 import Nf4Exporter
from llmtune.exporting.ollama import OllamaExporter
from llmtune.models.checkpoint import Checkpoint
from llmtune.schema import Section

EXPORTERS: tuple[Exporter, ...] = (
    GgufExporter(),
    OllamaExporter(),
    AdapterGgufExporter(),
    Nf4Exporter(),
    HubExporter(),
)
"""Every exporter, in the order in which the command line names them."""

EXPORT_TYPES = tuple(dict.fromkeys(type for exporter in EXPORTERS for type in exporter.types))
"""The types of numbers that any exporter writes."""

if TYPE_CHECKING:
    ConfiguredExport = str
    ConfiguredType = str
else:
    ConfiguredExport = Literal[
        tuple(exporter.name for exporter in EXPORTERS if exporter.is_made_by_runs)
    ]
    ConfiguredType = Literal[
        tuple(
            dict.fromkeys(
                type
                for exporter in EXPORTERS
                if exporter.has_type_of_run
                for type in exporter.types
            )
        )
    ]


class ExportConfig(Section):
    """What `run` exports at its end, and is checked for before it trains."""

    to: tuple[ConfiguredExport, ...] = ()
    """gguf, ollama, adapter-gguf, nf4: any of them, into the run's `exports/`."""
    type: ConfiguredType | None = None
    """Numbers in the file, for gguf and ollama; null is q8_0."""
    converter: Path | None = None
    """llama.cpp's convert_hf_to_gguf.py or its directory: for gguf and ollama, writes the families
    that llmtune does not write itself."""

    @model_validator(mode="after")
    def _check_readers(self) -> Self:
        if self.converter is not None and not any(one.options for one in self.exports()):
            named = ", ".join(self.to) or "nothing"
            raise ValueError(
                f"converter is for exports to gguf or ollama, and `to` names {named}; leave "
                "converter out"
            )
        return self

    def exports(self) -> Iterator[ExportSettings]:
        """Yield what each exporter is asked to make."""
        for name in self.to:
            exporter = find_exporter(name)
            type = self.type if exporter.has_type_of_run else None
            yield ExportSettings(name, type, options=self.options_of(exporter))

    def options_of(self, exporter: Exporter) -> dict[str, str]:
        """Return the exporter's options that are set here, by their names."""
        is_read = self.converter is not None and exporter.has_option("converter")
        return {"converter": str(self.converter)} if is_read else {}


def find_exporter(name: str) -> Exporter:
    """Return the exporter of this name.

    Raises:
        LlmtuneError: there is none.
    """
    for exporter in EXPORTERS:
        if exporter.name == name:
            return exporter
    known = ", ".join(exporter.name for exporter in EXPORTERS)
    raise LlmtuneError(f"--to {name}: expected one of {known}")


def check_exportable(base: Checkpoint, to: str, type: str | None = None) -> None:
    """Check that a checkpoint of this base can be exported; reads its small files only.

    Args:
        base: the 16-bit base, or a model merged from it.
        to: the name of an exporter.
        type: one of the exporter's types; None is its default.

    Raises:
        LlmtuneError: an unknown exporter or type, or a base that cannot be exported so.
    """
    find_route(base, ExportSettings(to, type))


def find_route(base: Checkpoint, settings: ExportSettings) -> str:
    """Return in one line how an export of this base will be made; reads its small files only.

    Raises:
        LlmtuneError: as `check_exportable`.
    """
    exporter = find_exporter(settings.to)
    type = exporter.choose_type(settings.type)
    named = settings.to if type is None else f"{settings.to} ({type})"
    return f"{named}: {exporter.find_route(base, settings)}"
