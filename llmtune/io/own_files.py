"""Small files of a directory that somebody else made: read within limits, copied without its links.

A model or an adapter may come from anywhere. A link in it that leads out of its directory would
take a file of this machine along into what is made of it, and from there onto a hub.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError

MOST_JSON_BYTES = 256 << 20
"""A tokenizer.json of the largest vocabularies has about 35 MB."""


def copy_own(source: Path, destination: Path, *, root: Path) -> None:
    """Copy a file, or a directory of files, that belongs to the directory `root`.

    Raises:
        LlmtuneError: it, or a file in it, is a link that leads out of `root`.
    """
    require_own(source, root)
    if not source.is_dir():
        shutil.copyfile(source, destination)
        return
    for path in source.rglob("*"):
        require_own(path, root)
    shutil.copytree(source, destination)


def require_own(path: Path, root: Path) -> None:
    """Check that `path` is a file of the directory `root`, and not a link to one elsewhere.

    The hub's cache is made of links: those from a snapshot to the blobs beside it are its own.

    Raises:
        LlmtuneError: it leads elsewhere.
    """
    target, own = path.resolve(), [root.resolve()]
    if root.resolve().parent.name == "snapshots":
        own.append(root.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(directory) for directory in own):
        raise LlmtuneError(
            f"{path}: is a link to {target}, outside of {root}. It is not copied into what is "
            "made of that directory; put the file itself there if it belongs to it"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        LlmtuneError: it is missing, too large, not JSON, or something other than an object.
    """
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise LlmtuneError(
                f"{path}: has {path.stat().st_size} bytes; expected {MOST_JSON_BYTES} at most"
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LlmtuneError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise LlmtuneError(
            f"{path}: is not JSON ({error}); it may be damaged: fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise LlmtuneError(f"{path}: holds {type(content).__name__}; expected an object")
    return content
