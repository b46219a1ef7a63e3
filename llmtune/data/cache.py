"""Prepared data kept by content: never stale, whole or absent, safe for several processes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import tempfile
import time
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.collect import Split, choose_sources
from llmtune.data.config import DataConfig
from llmtune.data.example import ExampleTable
from llmtune.data.hub import is_hub_id
from llmtune.data.prepared import PreparedData, fingerprint_table
from llmtune.data.report import DataReport
from llmtune.data.rows import find_files
from llmtune.fingerprint import hash_file, hash_json, hash_text
from llmtune.models.gguf import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KEPT_ENTRIES = 32
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
NOT_IN_KEY = {"packing", "cache"}
"""Knobs that do not change a token."""


def cache_path(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, split: Split, seed: int
) -> Path | None:
    """Return where this very preparation is kept, or None where it cannot be known beforehand.

    The name is a hash of everything the result depends on: the bytes of every file, the options,
    the seed, the tokenizer with its template, this package's code and the libraries' versions.
    Rows from the hub have no bytes to hash before they are read; they are not kept. A template
    that prints the date makes another entry each day.
    """
    sources = [*config.train, *config.evaluation]
    if any(is_hub_id(source.path) for source in sources):
        return None
    needed = sources if split == "train" else choose_sources(config, split)[0]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    template = tokenizer.chat_template or ""
    key = {
        "files": {
            str(file): hash_file(file) for source in needed for file in find_files(source.path)
        },
        "options": config.model_dump(mode="json", exclude=NOT_IN_KEY),
        "split": split,
        "seed": seed,
        "tokenizer": hash_text(backend.to_str()),
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "template": template,
        "date": time.strftime("%Y-%m-%d") if "strftime_now" in str(template) else "",
        "code": _code_hash(),
    }
    return cache_dir() / "data" / f"{hash_json(key)}.npz"


def load_prepared(path: Path) -> PreparedData | None:
    """Return what `save_prepared` wrote, or None where there is nothing whole.

    The tokens are hashed again: an entry that was damaged counts as absent.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            meta = json.loads(stored["meta"].tobytes())
            arrays = {name: stored[name] for name in ExampleTable.ARRAYS}
        table = ExampleTable(arrays, meta["file_names"])
        prepared = PreparedData(
            examples=table,
            source_names=tuple(meta["source_names"]),
            report=DataReport.from_json(meta["report"]),
            fingerprint=meta["fingerprint"],
            order_hash=meta["order_hash"],
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    if fingerprint_table(table) != prepared.fingerprint:
        return None
    path.touch()
    return prepared


def save_prepared(path: Path, prepared: PreparedData) -> None:
    """Write `prepared` to a file of its own, then rename it: no reader sees half an entry."""
    meta = {
        "file_names": list(prepared.examples.file_names),
        "source_names": list(prepared.source_names),
        "report": prepared.report.to_json(),
        "fingerprint": prepared.fingerprint,
        "order_hash": prepared.order_hash,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    encoded = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez(data, meta=encoded, **prepared.examples.arrays)  # type: ignore[arg-type]
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.getbuffer())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _forget_oldest(path.parent)


def _forget_oldest(directory: Path) -> None:
    """Keep the entries that were used last."""
    ages = []
    for entry in directory.glob("*.npz"):
        try:
            ages.append((entry.stat().st_mtime, entry))
        except FileNotFoundError:
            continue  # another process was faster
    for _, entry in sorted(ages, reverse=True)[KEPT_ENTRIES:]:
        entry.unlink(missing_ok=True)


@lru_cache
def _code_hash() -> str:
    """Return the hash of this package's code and of what it renders and tokenizes with."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in sorted(here.rglob("*.py")):
        digest.update(file.relative_to(here).as_posix().encode() + b"\0" + file.read_bytes())
    for name in LIBRARIES:
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return digest.hexdigest()
