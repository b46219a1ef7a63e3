"""Where the splits of a user's data are: files of a directory, or lists of one JSON file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.data.config import SourceConfig
from llmtune.data.files import TEXT_KINDS, file_kind, list_splits
from llmtune.data.hub import is_hub_id
from llmtune.data.init_guess import open_file
from llmtune.data.rows import find_files, walk_files
from llmtune.errors import LlmtuneError

EVALUATION_NAME = re.compile(
    r"(?:^|[._-])(?:val(?:id(?:ation)?)?|dev|eval(?:uation)?)(?:[._-]|$)", re.I
)
TEST_NAME = re.compile(r"(?:^|[._-])test(?:[._-]|$)", re.I)
TRAIN_NAME = re.compile(r"(?:^|[._-])train(?:ing)?(?:[._-]|$)", re.I)


@dataclass(frozen=True)
class Places:
    """Where the splits are: files of a directory, or lists of one file."""

    train: SourceConfig
    evaluation: SourceConfig | None = None
    test: SourceConfig | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What else is in a directory."""


def find_splits(path: str) -> Places:
    """Return the rows to train on, and evaluation and test rows beside them."""
    here = Path(path).expanduser()
    if is_hub_id(path) or not here.is_dir():
        if not is_hub_id(path):
            find_files(path)  # raises where nothing is there
        names = list_splits(here) if here.is_file() else ()
        return _choose_lists(path, names) if len(names) > 1 else Places(open_file(path))
    files = [file for file in find_files(path) if not _is_about_a_set(file)]
    notes = tuple(_note_unread(here))
    roles = {file: _role(file.relative_to(here)) for file in files}
    named = [file for file in files if roles[file] is not None]
    are_texts = all(file_kind(file) in TEXT_KINDS for file in files)
    if named and are_texts and 2 * len(named) < len(files):
        roles = dict.fromkeys(files)  # documents, of which a few are called as splits are
        notes += (f"{path}: {len(files)} documents; {named[0].name} is one of them, not a split",)
    train = [file for file in files if roles[file] == "train"] or [
        file for file in files if roles[file] is None
    ]
    evaluation = [file for file in files if roles[file] == "evaluation"]
    tests = [file for file in files if roles[file] == "test"]
    if not evaluation and not tests and len(train) == len(files):
        return Places(open_file(path), notes=notes)
    if not train:
        raise LlmtuneError(f"{path}: holds no file to train on ({', '.join(map(str, files))})")
    used = [_pattern(group) for group in (train, evaluation, tests)]
    if used[0] is None:
        listed = ", ".join(str(file) for file in files)
        raise LlmtuneError(
            f"{path}: which of its files to train on is not clear ({listed}); name one, or a glob"
        )
    left_out = [str(file) for file in files if file not in (*train, *evaluation, *tests)]
    for group, pattern in zip((evaluation, tests), used[1:], strict=True):
        left_out += [str(file) for file in group if pattern is None]
    first, second, third = (None if name is None else open_file(name) for name in used)
    assert first is not None, "there are files to train on"
    return Places(first, second, third, tuple(left_out), notes)


def _note_unread(folder: Path) -> Iterator[str]:
    """Say which kinds of files of a directory are not read, such as PDF."""
    unread = [file for file in walk_files(folder) if file.suffix and not file_kind(file)]
    kinds = sorted({file.suffix.lower() for file in unread})
    if kinds:
        are = "file is" if len(unread) == 1 else "files are"
        yield f"{folder}: {len(unread)} {are} of a kind that is not read ({', '.join(kinds)})"


def _role(file: Path) -> str | None:
    """Return which split a file seems to be, by its own name or its folder's."""
    for name in (file.stem, *reversed(file.parts[:-1])):
        for pattern, role in (
            (EVALUATION_NAME, "evaluation"),
            (TEST_NAME, "test"),
            (TRAIN_NAME, "train"),
        ):
            if pattern.search(name):
                return role
    return None


def _is_about_a_set(file: Path) -> bool:
    """Say whether a file is what `save_to_disk` writes beside the rows."""
    return file.name in ("dataset_info.json", "dataset_dict.json", "state.json")


def _pattern(files: Sequence[Path]) -> str | None:
    """Return one path for several files: itself, or the glob of shards; None if there is none."""
    if len(files) < 2:
        return str(files[0]) if files else None
    folder = files[0].parent
    if any(file.parent != folder for file in files):
        return None
    shared = files[0].name
    for file in files:
        shared = shared[: next((i for i, (a, b) in enumerate(zip(shared, file.name, strict=False))
                                if a != b), len(shared))]  # fmt: skip
    glob = folder / f"{shared}*{files[0].suffix}"
    is_exact = sorted(folder.glob(glob.name)) == sorted(files)
    return str(glob) if is_exact and shared else None


def _choose_lists(path: str, names: Sequence[str]) -> Places:
    """Return the lists of one JSON file, as CLINC150 has them."""
    train = next((name for name in names if TRAIN_NAME.fullmatch(name)), None)
    if train is None:
        raise LlmtuneError(
            f"{path}: holds the lists {', '.join(names)}, and none is called train; write the one "
            "to train on to a file of its own"
        )
    evaluation = next((name for name in names if EVALUATION_NAME.fullmatch(name)), None)
    test = next((name for name in names if TEST_NAME.fullmatch(name)), None)
    used = {train, evaluation, test}
    return Places(
        open_file(path, train),
        None if evaluation is None else open_file(path, evaluation),
        None if test is None else open_file(path, test),
        tuple(f"{path}: {name}" for name in names if name not in used),
    )
