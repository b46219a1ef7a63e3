"""What a merged model was made from, kept beside it without any path of the machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import read_json_object
from llmtune.io.run_dir import atomic_write_json

PROVENANCE_FILE = "llmtune_merge.json"
EXPORT_FILE = "llmtune_export.json"
"""In a directory that was exported: what it was made from, without any path of this machine. It
marks the directory as ours."""


def add_to_provenance(merged_dir: Path, values: Mapping[str, object]) -> None:
    """Add what became known after the merge was written."""
    path = merged_dir / PROVENANCE_FILE
    known = read_json_object(path, advice="merge again")
    atomic_write_json(path, {**known, **values})


@dataclass(frozen=True)
class MergeRecord:
    """What a merged directory says of itself."""

    base: str
    """What the adapter was added to: `original` or `dequantized`."""
    strength: float
    adapter_hash: str
    num_adapters: int


def read_record(merged_dir: Path) -> MergeRecord | None:
    """Return what a directory was merged from; None for a model that was not merged here."""
    path = merged_dir / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        content = read_json_object(path, advice="merge again")
        return MergeRecord(
            str(content["base"]),
            float(content["strength"]),
            str(content["adapter_hash"]),
            max(1, len(content.get("adapters") or ())),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LlmtuneError(
            f"{path}: damaged ({type(error).__name__}: {error}); merge again"
        ) from error


def adapter_in(record: MergeRecord | None) -> str | None:
    """Return the fingerprint of the adapter in what was merged."""
    return None if record is None else record.adapter_hash


def exported_adapter(directory: Path) -> str | None:
    """Return the fingerprint of the adapter in an exported directory, if it records one."""
    path = directory / EXPORT_FILE
    adapter = read_json_object(path).get("adapter") if path.is_file() else None
    return adapter if isinstance(adapter, str) else None


def strength_of(record: MergeRecord | None) -> float:
    """Return how much of the adapter is in what was merged."""
    return 1.0 if record is None else record.strength
