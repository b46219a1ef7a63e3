"""Rows of a data set on the hub: pinned to a commit, streamed; an unreachable hub fails at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.data.columnar import drop_nulls
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.data.files import file_kind
from llmtune.errors import LlmtuneError
from llmtune.io.stopping import call_within, first_line
from llmtune.models.hub import COMMIT, HUB_ID

HUB_KNOBS = ("revision", "split", "subset")
LOOKUP_SECONDS = 4.0
"""The whole look-up, so that an unreachable hub is an error within 5 s."""


def is_hub_id(path: str) -> bool:
    """Say whether `path` reads as `org/name`, is not meant as a file, and nothing is there."""
    return (
        HUB_ID.fullmatch(path) is not None
        and file_kind(Path(path)) is None
        and not os.path.lexists(path)
    )


def refuse_hub_knobs(source: SourceConfig) -> None:
    """Refuse what only a data set of the hub has, where `source` is a file or a directory.

    Raises:
        LlmtuneError: `revision`, `split` or `subset` is set and would choose nothing.
    """
    for name in HUB_KNOBS:
        value = getattr(source, name)
        if name == "split" and file_kind(Path(source.path)) == ".json":
            continue  # one list of several
        if value != SourceConfig.model_fields[name].default:
            raise LlmtuneError(
                f"{source.path}: {name} ({value!r}) is only for a data set of the hub (org/name); "
                "take it out, or name the files to read in path"
            )


def pin_sources(config: DataConfig) -> DataConfig:
    """Return `config` with the hub's branches and tags as the commits they are now.

    Raises:
        LlmtuneError: neither a file nor a data set of a source's name can be reached.
    """
    return config.model_copy(
        update={
            "train": [_pin_source(source) for source in config.train],
            "evaluation": [_pin_source(source) for source in config.evaluation],
        }
    )


def iter_hub_rows(source: SourceConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(number, row)` of a hub data set, never holding it in memory.

    The branch or tag is turned into a commit first, so one pass reads one state of the data.

    Raises:
        LlmtuneError: no such data set, revision, subset or split, or the hub does not answer.
    """
    commit = look_up_commit(source)
    import datasets  # the only place it is needed, and it takes a second to import
    from huggingface_hub.errors import HTTPError

    try:
        rows = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=commit, streaming=True
        )
        for number, row in enumerate(rows, 1):
            yield number, drop_nulls(row)
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise LlmtuneError(
            f"{source.path}: the hub's data set cannot be read (subset {source.subset!r}, split "
            f"{source.split!r}): {first_line(error)}"
        ) from error


def look_up_commit(source: SourceConfig) -> str:
    """Return the commit that the source's revision is now.

    Raises:
        LlmtuneError: neither a file nor a data set of this name can be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    def ask() -> str:
        info = HfApi().dataset_info(source.path, revision=source.revision, timeout=LOOKUP_SECONDS)
        return info.sha or ""

    try:
        return call_within(LOOKUP_SECONDS, ask)
    except HfHubHTTPError as error:
        raise LlmtuneError(
            f"{source.path}: no such file, and the hub has no such data set or revision "
            f"{source.revision!r} (or it is private: set HF_TOKEN): {first_line(error)}"
        ) from error
    except (HTTPError, OSError, HFValidationError) as error:
        raise LlmtuneError(
            f"{source.path}: no such file here, and as a data set of the hub it cannot be reached: "
            f"{first_line(error)}"
        ) from error


def _pin_source(source: SourceConfig) -> SourceConfig:
    is_pinned = COMMIT.fullmatch(source.revision or "") is not None
    if is_pinned or not is_hub_id(source.path):
        return source
    return source.model_copy(update={"revision": look_up_commit(source)})
