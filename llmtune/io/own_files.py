"""Files of a directory that somebody else made, copied without its links.

A model or an adapter may come from anywhere. A link in it that leads out of its directory would
take a file of this machine along into what is made of it, and from there onto a hub.
"""

import shutil
from pathlib import Path

from llmtune.errors import LlmtuneError


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
