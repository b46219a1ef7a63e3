"""Which items choose a strength, which report it, and which stand for a suite at half its size."""

import hashlib


def in_selection_half(item_id: str) -> bool:
    """Return whether an item chooses (a strength); the others report what was chosen.

    The halves are the even and odd values of sha256(id), the same for every run and suite.
    """
    return _digest(item_id) % 2 == 0


def in_half_size(item_id: str) -> bool:
    """Return whether an item is measured where a suite is taken at half its size.

    Independent of `in_selection_half`: half a suite still has items that choose and that report.
    """
    return _digest(item_id) // 2 % 2 == 0


def _digest(item_id: str) -> int:
    return hashlib.sha256(item_id.encode()).digest()[-1]
