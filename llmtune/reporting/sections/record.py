"""What the run rests on: its data, its fingerprints, and what was not measured."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from llmtune.io.manifest import Manifest
from llmtune.reporting.facts import HASH_ENDINGS
from llmtune.reporting.missing import Missing
from llmtune.reporting.sections.training import TIMED_STAGES


class DataSection(TypedDict):
    """Nothing of its own: the template shows the manifest's splits."""


class RecordSection(TypedDict):
    """Nothing of its own: the template shows the manifest and the report's fingerprints."""


class MissingSection(TypedDict):
    """What was not measured, by the command that measures it."""

    by_command: dict[str | None, list[str]]


def show_data(manifest: Manifest) -> DataSection | None:
    """Return the section if the manifest describes data."""
    return {} if manifest.data else None


def show_record() -> RecordSection:
    """Return the section, which every report has."""
    return {}


def show_missing(missing: Sequence[Missing]) -> MissingSection | None:
    """Return what was not measured, by the command that measures it."""
    return {"by_command": group_by_command(missing)} if missing else None


def group_by_command(missing: Sequence[Missing]) -> dict[str | None, list[str]]:
    """Return the names of what was not measured by the command that measures them."""
    by_command: dict[str | None, list[str]] = {}
    for each in missing:
        by_command.setdefault(each.command, []).append(each.name)
    return by_command


def find_fingerprints(manifest: Manifest) -> dict[str, str]:
    """Return every hash that the manifest holds of base, data and stages, by its dotted path."""
    stages = {name: stage for name, stage in manifest.stages.items() if name in TIMED_STAGES}
    return _find_hashes({"base": manifest.base, "data": manifest.data, "stages": stages})


def _find_hashes(value: Any, path: str = "") -> dict[str, str]:
    """Return every text under a key that ends like a hash's name, by its dotted path."""
    found: dict[str, str] = {}
    if not isinstance(value, Mapping):
        return found
    for key, inner in value.items():
        place = f"{path}.{key}" if path else str(key)
        if isinstance(inner, str) and str(key).endswith(HASH_ENDINGS):
            found[place] = inner
        found |= _find_hashes(inner, place)
    return found
