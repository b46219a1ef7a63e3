"""One split, ready for training, and the fingerprint it is known by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from llmtune.data.example import ExampleTable
from llmtune.data.report import DataReport


@dataclass(frozen=True)
class PreparedData:
    """One split, ready for training."""

    examples: ExampleTable
    """Train: in the order of the seed. Evaluation: in the order of the files."""
    source_names: tuple[str, ...]
    report: DataReport
    fingerprint: str
    """SHA-256 over every token, mask, weight and their order."""
    order_hash: str


def fingerprint_table(table: ExampleTable) -> str:
    """Return the SHA-256 over a table's tokens and masks, and its examples and weights in order."""
    digest = hashlib.sha256(table.stored.content_hash.encode())
    for name in ("starts", "lengths", "weights"):
        digest.update(table.columns[name].tobytes())
    return digest.hexdigest()
