"""The runs in a folder, each with how far it came and what its report said."""

from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import read_json_object
from llmtune.io.manifest import STAGES, Manifest, read_manifest
from llmtune.io.run_dir import RunDir

PAST = {"train": "trained", "merge": "merged", "evaluate": "evaluated"}


@dataclass(frozen=True)
class RunSummary:
    """One line of `llmtune runs`."""

    path: str
    state: str
    verdict: str | None
    base: str
    created: str

    @property
    def minute(self) -> str:
        """When it was made, in UTC and without the seconds."""
        return self.created[:16].replace("T", " ")


def list_runs(directory: Path) -> list[RunSummary]:
    """Return the runs directly under `directory`, newest first.

    Raises:
        LlmtuneError: there is no such directory.
    """
    if directory.is_file():
        raise LlmtuneError(f"{directory}: is a file; expected a directory of runs")
    if not directory.is_dir():
        raise LlmtuneError(f"{directory}: no such directory; runs are made by: llmtune run CONFIG")
    found = [_summarize(RunDir(path.parent)) for path in sorted(directory.glob("*/manifest.json"))]
    return sorted(found, key=lambda summary: summary.created, reverse=True)


def _summarize(run: RunDir) -> RunSummary:
    try:
        manifest = read_manifest(run)
    except LlmtuneError:
        return RunSummary(str(run.path), "damaged manifest", None, "", "")
    base = str(manifest.base.get("origin") or manifest.config.get("model", {}).get("base", ""))
    return RunSummary(str(run.path), _state(manifest), _verdict(run), base, manifest.created)


def _state(manifest: Manifest) -> str:
    finished = [name for name in STAGES if manifest.record(name).get("finished")]
    begun = [name for name, record in manifest.stages.items() if not record.get("finished")]
    if begun:
        return f"{begun[0]} unfinished"
    return PAST[finished[-1]] if finished else "not started"


def _verdict(run: RunDir) -> str | None:
    try:
        value = read_json_object(run.report_json_path).get("verdict")
    except LlmtuneError:
        return None
    return value if isinstance(value, str) else None
