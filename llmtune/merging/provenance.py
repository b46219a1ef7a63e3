"""What a merged model was made from, kept beside it without any path of the machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.run_dir import atomic_write_json

PROVENANCE_FILE = "llmtune_merge.json"


def add_to_provenance(merged_dir: Path, values: Mapping[str, Any]) -> None:
    """Add what became known after the merge was written."""
    path = merged_dir / PROVENANCE_FILE
    known = json.loads(path.read_text(encoding="utf-8"))
    atomic_write_json(path, {**known, **values})


def merged_base(merged_dir: Path) -> str | None:
    """Return what an adapter was merged into: `original` or `dequantized`; None if not recorded."""
    path = merged_dir / PROVENANCE_FILE
    if not path.is_file():
        return None
    base = json.loads(path.read_text(encoding="utf-8")).get("base")
    return base if base in {"original", "dequantized"} else None
