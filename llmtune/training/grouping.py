"""Which rows of a step go through the model together: by length, and by what they begin with."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.training.memory.arithmetic import BatchLimits

MIN_BEGINNING = 8
"""Tokens from which rows that begin with the same ones go together."""
PASS_TOKENS = 128
"""What one more micro-batch costs beside its tokens, in tokens."""


def deal_rows(rows: Sequence[Example], shares: int, *, by_beginning: bool) -> list[list[int]]:
    """Deal the rows of a step out to `shares` processes, by their tokens.

    The longest row first, each to the share that has the fewest tokens; `by_beginning` deals out
    neighbors in the order of their tokens, so that rows that begin alike stay together.

    Returns:
        `shares` lists of indices into `rows`; a share is empty if there are fewer rows.
    """
    lengths = [len(row.input_ids) for row in rows]
    dealt: list[list[int]] = [[] for _ in range(shares)]
    if by_beginning:
        order = sorted(range(len(rows)), key=lambda index: (rows[index].input_ids, index))
        done, total = 0, max(sum(lengths), 1)
        for index in order:
            middle = done + lengths[index] / 2
            dealt[min(int(middle * shares / total), shares - 1)].append(index)
            done += lengths[index]
        return dealt
    tokens = [0] * shares
    for index in sorted(range(len(rows)), key=lambda index: (-lengths[index], index)):
        share = tokens.index(min(tokens))
        dealt[share].append(index)
        tokens[share] += lengths[index]
    return [sorted(share) for share in dealt]


def plan_micro_batches(
    lengths: Sequence[int], limits: BatchLimits, *, packed: bool, switch: int | None = None
) -> list[list[int]]:
    """Split the rows of one optimizer step into micro-batches.

    Args:
        lengths: tokens of each row.
        limits: what a micro-batch may hold.
        packed: rows are laid end to end; otherwise they are padded to the longest one.
        switch: rows of more tokens change how the rows beside them are computed, so they are kept
            apart (see `models.decoder.rotary_switch`).

    Returns:
        Lists of indices into `lengths`; every index occurs exactly once.
    """
    if switch is not None and min(lengths, default=0) <= switch < max(lengths, default=0):
        return [
            [part[position] for position in batch]
            for part in (
                [index for index, length in enumerate(lengths) if (length > switch) == is_long]
                for is_long in (True, False)
            )
            for batch in plan_micro_batches(
                [lengths[index] for index in part], limits, packed=packed
            )
        ]
    if packed:
        return pack_lengths(lengths, limits.tokens, max_rows=limits.rows)
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return _plan_padded(order, lengths, limits)


def plan_shared(rows: Sequence[Example], limits: BatchLimits) -> list[list[int]] | None:
    """Split the packed rows of a step so that rows with a common beginning go together.

    Returns:
        As `plan_micro_batches`; None if not fewer tokens would be computed, all in all.
    """
    loose: list[int] = []
    plan: list[list[int]] = []
    for group in _group_by_beginning(rows):
        members = [rows[index] for index in group]
        shared = shared_beginning(members)
        if shared < MIN_BEGINNING:
            loose += group
            continue
        lengths = [len(row.input_ids) - shared for row in members]
        room = max(limits.tokens, shared + max(lengths)) - shared
        packed = pack_lengths(lengths, room, max_rows=limits.rows)
        plan += [[group[place] for place in one] for one in packed]
    lengths = [len(rows[index].input_ids) for index in loose]
    packed = pack_lengths(lengths, limits.tokens, max_rows=limits.rows)
    plan += [[loose[place] for place in one] for one in packed]
    lengths = [len(row.input_ids) for row in rows]
    plain = plan_micro_batches(lengths, limits, packed=True)
    plain_cost = PASS_TOKENS * len(plain) + sum(lengths)
    return plan if _shared_cost(rows, plan) < plain_cost else None


def _shared_cost(rows: Sequence[Example], plan: Sequence[Sequence[int]]) -> int:
    members = ([rows[index] for index in one] for one in plan)
    return sum(PASS_TOKENS + computed_tokens(each) for each in members)


def _group_by_beginning(rows: Sequence[Example]) -> list[list[int]]:
    """Put rows together whose first tokens are the same, as many as pays."""
    return [
        part for group in _children(rows, range(len(rows)), 0) for part in _split_group(rows, group)
    ]


def _split_group(rows: Sequence[Example], group: list[int]) -> list[list[int]]:
    """Split a group at longer beginnings that parts of it share, where fewer tokens are left."""
    shared = shared_beginning([rows[index] for index in group])
    children = _children(rows, group, shared)
    if len(children) in (1, len(group)):
        return [group]
    alone = [index for child in children if len(child) == 1 for index in child]
    together = [child for child in children if len(child) > 1]
    parts = [part for child in together for part in _split_group(rows, child)]
    parts += [alone] if alone else []
    return parts if _shared_cost(rows, parts) < _shared_cost(rows, [group]) else [group]


def _children(rows: Sequence[Example], group: Iterable[int], start: int) -> list[list[int]]:
    """Put those of a group together whose next tokens from `start` on are the same."""
    found: dict[tuple[int, ...], list[int]] = {}
    for index in group:
        next_tokens = tuple(rows[index].input_ids[start : start + MIN_BEGINNING])
        found.setdefault(next_tokens, []).append(index)
    return list(found.values())


def shared_beginning(rows: Sequence[Example]) -> int:
    """Return how many tokens all rows begin with; none of them is trained, nor any row's last.

    A single row shares nothing.
    """
    if len(rows) < 2:
        return 0
    first, last = (kind(row.input_ids for row in rows) for kind in (min, max))
    pairs = zip(first, last, strict=False)
    common = next((place for place, (a, b) in enumerate(pairs) if a != b), len(first))
    common = min(common, *(len(row.input_ids) - 1 for row in rows))
    for row in rows:
        labels = enumerate(row.labels[:common])
        common = next((place for place, label in labels if label != IGNORE_INDEX), common)
    return common


def computed_tokens(rows: Sequence[Example]) -> int:
    """Return the tokens of a micro-batch that `pack_sharing` lays."""
    total = sum(len(row.input_ids) for row in rows)
    shared = shared_beginning(rows)
    return total - shared * (len(rows) - 1) if shared >= MIN_BEGINNING else total


def _plan_padded(order: list[int], lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Cut the rows, longest first, into runs of neighbors in length: the least padding."""
    batches: list[list[int]] = []
    for index in order:
        current = batches[-1] if batches else None
        if (
            current is None
            or len(current) == limits.rows
            or (len(current) + 1) * lengths[current[0]] > limits.tokens
        ):
            batches.append([index])
        else:
            current.append(index)
    return batches


def largest_micro_batches(
    longest_first: Sequence[Example], limits: BatchLimits, *, packed: bool
) -> list[list[Example]]:
    """Return the micro-batches that need the most memory under `limits`.

    Rows are cut at their start where they would pass the limit, so that it is met exactly. With
    padding the longest rows may leave a gap below the limit that shorter rows would fill: then the
    second micro-batch is one of those.
    """
    if limits.rows is not None:
        return [list(longest_first[: limits.rows])]
    longest = len(longest_first[0].input_ids)
    if not packed:
        fitting = max(limits.tokens // longest, 1)
        most = min(-(-limits.tokens // longest), len(longest_first))
        plans = [(fitting, longest), (most, limits.tokens // most)]
        return [
            [_keep_end(example, length) for example in longest_first[:count]]
            for count, length in plans[: 1 if fitting == most else 2]
        ]
    rows: list[Example] = []
    left = limits.tokens
    for example in longest_first:
        if left > 0:
            rows.append(_keep_end(example, left))
            left -= len(rows[-1].input_ids)
    return [rows]


def _keep_end(example: Example, length: int) -> Example:
    return replace(example, input_ids=example.input_ids[-length:], labels=example.labels[-length:])


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
