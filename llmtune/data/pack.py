"""First-fit-decreasing packing: which examples share a row of a batch."""

from collections.abc import Sequence


def pack_lengths(
    lengths: Sequence[int], max_length: int, *, max_rows: int | None = None
) -> list[list[int]]:
    """Return bins of indices into `lengths`: at most `max_length` tokens and `max_rows` examples.

    First-fit-decreasing: the longest first, each into the first bin with room; at most 11/9 of
    the best number of bins, plus 6/9 (Dósa 2007). Equal lengths keep their order, so the
    result is a function of the arguments alone. O(n log n) through a tree of the bins' room.
    An example longer than `max_length` has a bin to itself.
    """
    lengths = [min(int(length), max_length) for length in lengths]
    if not lengths:
        return []
    leaves = 1 << (len(lengths) - 1).bit_length()
    # room[1] is the root; a node holds the largest room below it, the leaves those of the bins.
    room = [max_length] * (2 * leaves)
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < lengths[index]:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        packed = bins[node - leaves]
        packed.append(index)
        # A bin with all its rows takes nothing more; lengths are at least 0, so -1 is no room.
        room[node] = -1 if len(packed) == max_rows else room[node] - lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
