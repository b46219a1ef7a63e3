"""The rows of a config before training, and a first config for a file of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from llmtune.data.config import DataConfig
from llmtune.data.init import DataDescription, describe_data, render_config
from llmtune.data.init_suite import SuiteDraft, render_items, render_suite
from llmtune.errors import LlmtuneError
from llmtune.evaluation.tasks.base import is_suite_name
from llmtune.io.run_dir import atomic_write_text
from llmtune.models.config import ModelConfig
from llmtune.models.resolve import resolve_base
from llmtune.runs.targets import require_run


@dataclass(frozen=True)
class Rows:
    """The data that a run trains on, and the tokenizer that its rows go through."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerFast


def open_rows(name: str, overrides: Sequence[str] = (), *, use_cache: bool = True) -> Rows:
    """Return the rows of a run directory or a YAML file.

    Raises:
        LlmtuneError: there is no such run, or its base cannot be found.
    """
    more = () if use_cache else ("data.cache=false",)
    config = require_run(name, (*overrides, *more))
    return Rows(config.mixed_data, resolve_base(config.model).tokenizer)


@dataclass(frozen=True)
class Draft:
    """A first config for some rows: what is known of them, and the files that were written."""

    found: DataDescription
    config: Path
    suite: Path | None


def draft_config(
    data: str,
    out: Path,
    *,
    base: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Draft:
    """Look at rows, and write a commented config and a suite for them.

    Args:
        data: a file, a directory, a glob or a hub id.
        out: the config to write; the suite is written next to it.
        base: the base model; with it lengths are counted in its tokens.
        format: what the rows are; None guesses.
        columns: where the format's columns are, as `format's name: file's name`.

    Raises:
        LlmtuneError: the rows cannot be read, or a file exists already.
    """
    tokenizer = resolve_base(ModelConfig(base=base)).tokenizer if base else None
    found = describe_data(data, tokenizer=tokenizer, format=format, columns=columns)
    files: dict[Path, str] = {}
    suite = None
    if isinstance(found.suite, SuiteDraft):
        suite, items = (out.with_name(f"{out.stem}_{end}") for end in ("suite.yaml", "items.jsonl"))
        source = found.evaluation_path or found.train_path
        files[items] = render_items(found.suite)
        name = out.stem if is_suite_name(out.stem) else "task"
        files[suite] = render_suite(found.suite, name=name, items_name=items.name, source=source)
    files[out] = render_config(found, base=base, suite=str(suite) if suite else None)
    _write_new(files)
    return Draft(found, out, suite)


def _write_new(files: Mapping[Path, str]) -> None:
    """Write all files or none; an existing one is never replaced."""
    for path in files:
        if path.exists():
            raise LlmtuneError(f"{path}: exists already; choose another name with --out")
        if not path.parent.is_dir():
            raise LlmtuneError(
                f"{path.parent}: no such directory; make it, or choose another --out"
            )
    for path, text in files.items():
        atomic_write_text(path, text)
