"""Which items choose a strength, which report it, and which represent a suite at a smaller size."""

import hashlib
from collections.abc import Sequence


def in_selection_half(item_id: str) -> bool:
    """Return whether an item chooses (a strength); the others report what was chosen.

    Items of a cluster go by its name, since they are not independent: all choose or none.

    The halves are the even and odd values of sha256(id), the same for every run and suite.
    """
    return _digest(item_id) % 2 == 0


def in_half_size(item_id: str) -> bool:
    """Return whether an item is measured where a suite is taken at half its size.

    Independent of `in_selection_half`: half a suite still has items that choose and that report.
    """
    return _digest(item_id) // 2 % 2 == 0


def choose_ids(ids: Sequence[str], limit: int | None, seed: int) -> set[str]:
    """Choose `limit` ids by a seeded hash of each, so that a larger limit chooses these too."""
    if limit is None or limit >= len(ids):
        return set(ids)
    order = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    return set(order[:limit])


def _digest(item_id: str) -> int:
    return hashlib.sha256(item_id.encode()).digest()[-1]
