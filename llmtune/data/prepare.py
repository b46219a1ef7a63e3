"""From the config's sources to tokenized examples with exact masks, in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.cache import cache_path, load_prepared, open_entry, save_prepared
from llmtune.data.collect import Split, SplitCollector, read_evaluation_keys
from llmtune.data.config import DataConfig
from llmtune.data.example import ExampleTable
from llmtune.data.hub import pin_sources
from llmtune.data.length import refuse_loss
from llmtune.data.mixture import hash_order, mix_order, share_sources
from llmtune.data.prepared import PreparedData, fingerprint_table
from llmtune.data.problems import LISTED_PROBLEMS, bad_rows_error
from llmtune.errors import LlmtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PreparedData", "order_epoch", "prepare_examples"]


def prepare_examples(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, split: Split, seed: int
) -> PreparedData:
    """Read, check, render, mask, fit, mix and order one split of the data.

    Tokens are not held in memory but mapped from a file: with `data.cache` one that is kept by
    content and read back when nothing has changed, else one without a name.
    With `split="evaluation"` and no evaluation source nor share, the result is empty.

    Raises:
        LlmtuneError: bad rows (the first ten are named), too much lost to `max_length`, a row
            that train and evaluation share, no row left, or a tokenizer that cannot serve.
    """
    config = pin_sources(config)
    if not config.cache:
        return _prepare(config, tokenizer, (split, seed), None)
    kept_at = cache_path(config, tokenizer, split=split, seed=seed)
    kept = load_prepared(kept_at)
    if kept is not None:
        return kept
    with open_entry(kept_at) as directory:
        prepared = _prepare(config, tokenizer, (split, seed), directory)
        if directory is not None and prepared.source_names:
            save_prepared(kept_at, prepared, directory)
    return prepared


def _prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    wanted: tuple[Split, int],
    directory: Path | None,
) -> PreparedData:
    split, seed = wanted
    other_keys = read_evaluation_keys(config) if split == "train" else {}
    collector = SplitCollector(config, tokenizer, split, other_keys)
    table = collector.read(directory)
    refuse_problems(collector)
    if collector.sources and not len(table):
        raise LlmtuneError(f"{split}: no row is left to use; see what was left out and why")
    order, taken = order_epoch(collector, table, seed)
    mixed = table.take(order)
    return PreparedData(
        examples=mixed,
        source_names=tuple(source.path for source in collector.sources),
        report=collector.report(mixed, taken),
        fingerprint=fingerprint_table(mixed),
        order_hash=hash_order(order),
    )


def order_epoch(
    collector: SplitCollector, table: ExampleTable, seed: int
) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """Return the order of one epoch, and what each source gives to it and would give at most."""
    available = np.bincount(table.source_indices, minlength=len(collector.sources)).tolist()
    if collector.split == "evaluation":
        return np.arange(len(table), dtype=np.int64), [(n, float(n)) for n in available]
    shares = share_sources(collector.sources, available, collector.config.mixture)
    order = mix_order(table.source_indices, shares, seed)
    return order, [(share.taken, share.wanted) for share in shares]


def refuse_problems(collector: SplitCollector) -> None:
    """Stop where rows are bad, shared between the splits, or too long, as the config says."""
    config = collector.config
    if collector.num_bad and config.on_bad_row == "error":
        raise bad_rows_error(collector.problems, collector.num_bad, collector.rows_read)
    if collector.shared:
        listed = [f"  {row.place} is {row.other}" for row in collector.shared[:LISTED_PROBLEMS]]
        more = len(collector.shared) - LISTED_PROBLEMS
        listed += [f"  ... and {more} more"] if more > 0 else []
        raise LlmtuneError(
            "\n".join(
                [
                    f"{len(collector.shared)} train rows are also in the evaluation data (case and "
                    "spaces aside), so its loss would not be held out:",
                    *listed,
                    "Take them out of one of the two, or use data.evaluation_share.",
                ]
            )
        )
    refuse_loss(collector.count, config.max_length, config.length_policy, collector.split)
