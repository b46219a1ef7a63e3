"""The exporters, the config's `export` section, and the settings of one export (light)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtune.errors import LlmtuneError
from llmtune.exporting.adapter_gguf import AdapterGgufExporter
from llmtune.exporting.base import Exporter
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

    def exports(self) -> Iterator[tuple[Exporter, str | None]]:
        """Yield each exporter and the type that it is asked to write; None is its default."""
        for name in self.to:
            exporter = find_exporter(name)
            yield exporter, self.type if exporter.has_type_of_run else None


@dataclass(frozen=True)
class ExportSettings:
    """One export as asked for on the command line."""

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
    exporter = find_exporter(to)
    exporter.choose_type(type)
    exporter.check_base(base)
