"""From the config's sources to tokenized examples with exact masks, in one pass.

How often each row is seen and in which order are functions of the config and the seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.cache import cache_path, load_prepared, open_entry, save_prepared
from llmtune.data.collect import Split, SplitCollector, read_evaluation_keys
from llmtune.data.config import DataConfig, MixtureConfig, SourceConfig
from llmtune.data.example import ExampleTable, PreparedData, fingerprint_table
from llmtune.data.hub import pin_sources
from llmtune.data.length import refuse_loss
from llmtune.data.problems import bad_rows_error, list_first
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
        shared = [f"{row.place} is {row.other}" for row in collector.shared]
        listed = list_first(shared, indent="  ")
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


@dataclass(frozen=True)
class SourceShare:
    """How many of a source's examples one epoch holds."""

    available: int
    wanted: float
    """Examples an epoch would hold without the repeat limit."""
    taken: int


def share_sources(
    sources: Sequence[SourceConfig], available: Sequence[int], mixture: MixtureConfig
) -> list[SourceShare]:
    """Return how many examples of each source one epoch holds.

    Without knobs every example is taken once. `rows` sets a count; otherwise rows x weight,
    tempered: shares proportional to `(rows x weight)^(1/temperature)` with the same total.
    Sources marked `replay` together take `replay_share` of the epoch, split by the same rule.
    """
    wanted = [0.0] * len(sources)
    for is_replay in (False, True):
        members = [i for i, source in enumerate(sources) if source.replay == is_replay]
        base = {i: sources[i].rows or available[i] * sources[i].weight for i in members}
        free = [i for i in members if sources[i].rows is None and available[i]]
        total = sum(base[i] for i in free)
        tempered = {i: base[i] ** (1.0 / mixture.temperature) for i in free}
        scale = total / sum(tempered.values()) if free else 0.0
        for i in members:
            wanted[i] = tempered[i] * scale if i in tempered else float(base[i])
    fresh = sum(w for w, source in zip(wanted, sources, strict=True) if not source.replay)
    replayed = sum(w for w, source in zip(wanted, sources, strict=True) if source.replay)
    if replayed:
        share = mixture.replay_share
        factor = fresh * share / (1 - share) / replayed
        wanted = [w * factor if s.replay else w for w, s in zip(wanted, sources, strict=True)]
    return [
        SourceShare(count, w, round(min(w, count * mixture.max_repeats)))
        for count, w in zip(available, wanted, strict=True)
    ]


def mix_order(source_indices: np.ndarray, shares: Sequence[SourceShare], seed: int) -> np.ndarray:
    """Return example indices int64 [M] in training order.

    Whole rounds of a source are taken first, then the part of a round whose keys are smallest.
    Keys are BLAKE2 of (seed, source, place in the source, round): no random generator whose
    stream could change between library versions.
    """
    keys = [np.empty((0, 2), dtype=np.uint64)]
    indices = [np.empty(0, dtype=np.int64)]
    for source, share in enumerate(shares):
        places = np.flatnonzero(source_indices == source)
        remaining, turn = share.taken, 0
        while remaining > 0 and len(places):
            drawn = _keys(seed, source, len(places), turn)
            first = _by_key(drawn)[:remaining]
            keys.append(drawn[first])
            indices.append(places[first])
            remaining -= len(first)
            turn += 1
    order: np.ndarray = np.concatenate(indices)[_by_key(np.concatenate(keys))]
    return order


def hash_order(order: np.ndarray) -> str:
    """Return the SHA-256 of an order, for the manifest."""
    return hashlib.sha256(np.ascontiguousarray(order, dtype="<i8").tobytes()).hexdigest()


def _keys(seed: int, source: int, count: int, turn: int) -> np.ndarray:
    """Return the keys of a source's places, each of 128 bits as two uint64 [count, 2]."""
    data = bytearray()
    for place in range(count):
        text = f"{seed} {source} {place} {turn}"
        data += hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _by_key(keys: np.ndarray) -> np.ndarray:
    """Return the order int64 [count] in which the keys rise."""
    return np.lexsort((keys[:, 1], keys[:, 0]))
