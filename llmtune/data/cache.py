"""Prepared data kept by content: never stale, whole or absent, safe for several processes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.collect import Split, choose_sources
from llmtune.data.config import DataConfig
from llmtune.data.example import ExampleTable, PreparedData, fingerprint_table
from llmtune.data.hub import is_hub_id
from llmtune.data.report import DataReport
from llmtune.data.rows import find_files
from llmtune.data.stored import read_stored
from llmtune.io.cached import cache_dir
from llmtune.io.fingerprint import hash_file, hash_json, hash_text
from llmtune.io.json_files import parse_json
from llmtune.io.unfinished import new_entry, replace_entry
from llmtune.models.template_date import template_date_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

KEPT_ENTRIES = 32
META_FILE, INDEX_FILE = "meta.txt", "index.npz"
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
NOT_IN_KEY = {"packing", "cache"}
"""Knobs that do not change a token."""


def cache_path(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, split: Split, seed: int
) -> Path:
    """Return where this very preparation is kept.

    The name is a hash of everything the result depends on: the bytes of every file, the options,
    the seed, the tokenizer with its template, this package's code and the libraries' versions.
    A hub source's bytes are known by its commit, which must stand in its `revision`. A template
    that prints the date makes an entry for each date.
    """
    sources = [*config.train, *config.evaluation]
    needed = sources if split == "train" else choose_sources(config, split)[0]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    template = tokenizer.chat_template or ""
    key = {
        "files": {
            str(file): hash_file(file)
            for source in needed
            if not is_hub_id(source.path)
            for file in find_files(source.path)
        },
        "options": config.model_dump(mode="json", exclude=NOT_IN_KEY),
        "split": split,
        "seed": seed,
        "tokenizer": hash_text(backend.to_str()),
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "template": template,
        "date": template_date_of(tokenizer) or "",
        "code": _code_hash(),
    }
    return cache_dir() / "data" / hash_json(key)


def load_prepared(entry: Path) -> PreparedData | None:
    """Return what `save_prepared` left at `entry`, or None if there is nothing whole.

    The tokens are hashed again: an entry that was damaged counts as absent.
    """
    try:
        seal, _, text = (entry / META_FILE).read_text(encoding="utf-8").partition("\n")
        if seal != hash_text(text):
            return None
        meta = parse_json(text)
        with np.load(entry / INDEX_FILE, allow_pickle=False) as stored:
            index = {name: stored[name] for name in ExampleTable.COLUMNS}
        table = ExampleTable(read_stored(entry), index, meta["file_names"])
        prepared = PreparedData(
            examples=table,
            source_names=tuple(meta["source_names"]),
            report=DataReport.from_json(meta["report"]),
            fingerprint=meta["fingerprint"],
            order_hash=meta["order_hash"],
        )
        if fingerprint_table(table) != prepared.fingerprint or meta["index"] != _hash_index(table):
            return None
        os.utime(entry)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return prepared


@contextmanager
def open_entry(entry: Path) -> Iterator[Path | None]:
    """Give a directory beside `entry` to write to; it is gone at the end, unless it was saved.

    None if the cache cannot be written: it saves time, and a run needs none.
    """
    with ExitStack() as stack:
        directory = None
        try:
            directory = stack.enter_context(new_entry(entry))
        except OSError as error:
            logger.warning("prepared data is not kept in %s: %s", entry.parent, error)
        yield directory


def save_prepared(entry: Path, prepared: PreparedData, directory: Path) -> None:
    """Complete `directory`, which holds the tokens, and rename it: no reader sees half an entry."""
    table = prepared.examples
    meta = {
        "file_names": list(table.file_names),
        "source_names": list(prepared.source_names),
        "report": prepared.report.to_json(),
        "fingerprint": prepared.fingerprint,
        "order_hash": prepared.order_hash,
        "index": _hash_index(table),
    }
    try:
        with (directory / INDEX_FILE).open("wb") as file:
            np.savez(file, **table.columns)  # type: ignore[arg-type]
        text = json.dumps(meta)
        (directory / META_FILE).write_text(f"{hash_text(text)}\n{text}", encoding="utf-8")
        replace_entry(directory, entry, num_kept=KEPT_ENTRIES)
    except OSError as error:
        logger.warning("prepared data is not kept in %s: %s", entry.parent, error)


def _hash_index(table: ExampleTable) -> str:
    """Return the SHA-256 of a table's whole index."""
    digest = hashlib.sha256()
    for array in table.columns.values():
        digest.update(array.tobytes())
    return digest.hexdigest()


@lru_cache
def _code_hash() -> str:
    """Return the hash of this package's code and of what it renders and tokenizes with."""
    digest = hashlib.sha256()
    here = Path(__file__).parent.parent
    for file in [*sorted((here / "data").rglob("*.py")), here / "models" / "turns.py"]:
        digest.update(file.relative_to(here).as_posix().encode() + b"\0" + file.read_bytes())
    for name in LIBRARIES:
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return digest.hexdigest()
