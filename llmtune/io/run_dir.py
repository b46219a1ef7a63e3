"""The names of a run's files, and writing them so that a reader never sees half a file."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmtune.io.fingerprint import JsonValue

SEQUENCE_FILE = "sequence.json"
"""What `llmtune sequence` leaves beside the runs of its tasks."""
SWEEP_FILE = "sweep.json"
"""What a sweep leaves in the directory of its runs."""
SEEDS_FILE = "seeds.json"
"""What `llmtune run --seeds` leaves beside the runs of its seeds."""


@dataclass(frozen=True)
class RunDir:
    """Where a run keeps what. Paths inside a run are relative to it, so a moved run still works."""

    path: Path

    def name_in_run(self, path: str) -> str:
        """Return a path below the run relative to it, as it is recorded; any other as it is."""
        inside = Path(path).absolute()
        here = self.path.absolute()
        return str(inside.relative_to(here)) if inside.is_relative_to(here) else path

    def place(self, recorded: str) -> str:
        """Return where a path that was recorded is now."""
        return str(self.path / recorded)

    @property
    def adapter_dir(self) -> Path:
        """Return the folder of the trained adapter."""
        return self.path / "adapter"

    @property
    def merged_dir(self) -> Path:
        """Return the folder of the merged model."""
        return self.path / "merged"

    @property
    def checkpoints_dir(self) -> Path:
        """Return the folder of the training's checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluations_dir(self) -> Path:
        """Return the folder of the evaluations."""
        return self.path / "evaluations"

    @property
    def diagnostics_dir(self) -> Path:
        """Return the folder of the diagnoses."""
        return self.path / "diagnostics"

    @property
    def exports_dir(self) -> Path:
        """Return the folder of what was made for other programs."""
        return self.path / "exports"

    @property
    def metrics_path(self) -> Path:
        """Return the file of the training's metrics, one line a log."""
        return self.path / "metrics.jsonl"

    @property
    def manifest_path(self) -> Path:
        """Return the file that records what was done."""
        return self.path / "manifest.json"

    @property
    def lock_path(self) -> Path:
        """Return the file that one process at a time locks."""
        return self.path / ".lock"

    @property
    def generations_path(self) -> Path:
        """Return the file of texts that the model wrote."""
        return self.path / "generations.json"

    @property
    def own_text_path(self) -> Path:
        """What the base wrote to be held to, where `protect` asks for it."""
        return self.path / "own_text.json"

    @property
    def report_html_path(self) -> Path:
        """Return the file of the report page."""
        return self.path / "report.html"

    @property
    def report_md_path(self) -> Path:
        """Return the file of the report in Markdown."""
        return self.path / "report.md"

    @property
    def report_json_path(self) -> Path:
        """Return the file of the report's numbers."""
        return self.path / "report.json"


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all: a temporary file beside it, fsync, rename."""
    atomic_write_texts({path: text})


def atomic_write_texts(texts: Mapping[Path, str]) -> None:
    """Write files that belong together; if one of them cannot be written, none appears.

    Raises:
        OSError: with the name of the file that could not be written.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, text in texts.items():
            with _blaming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
                temporaries[path] = Path(name)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                temporaries[path].chmod(0o644)
        for path, temporary in temporaries.items():
            with _blaming(path):
                temporary.replace(path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Name the file that was asked for: the system names the temporary one, or none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def atomic_write_json(path: Path, value: JsonValue | Mapping[str, object]) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
