"""How often each row is seen and in which order: functions of the config and the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtune.data.config import MixtureConfig, SourceConfig


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
