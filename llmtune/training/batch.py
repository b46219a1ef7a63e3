"""From rows to micro-batches: which rows of a step go together, packed or not, as which tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.training.memory.arithmetic import BatchLimits
from llmtune.training.objectives import DEFAULT_OBJECTIVE
from llmtune.training.objectives.base import MicroBatch, Objective
from llmtune.training.rows import Examples

SMALLEST_WEIGHT = 1e-30
MIN_BEGINNING = 8
"""Tokens from which rows that begin with the same ones go together."""
PASS_TOKENS = 128
"""What one more micro-batch costs beside its tokens, in tokens."""


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


class StepRows(TypedDict):
    """The rows of one optimizer step."""

    micro_batches: list[MicroBatch]
    """See `pack_rows` and `pad_rows`; their `target_weights` are divided by `target_weight`."""
    rows: list[list[int]]
    """Indices of the examples, one list a micro-batch."""
    tokens: int
    """Without padding."""
    trained_tokens: int
    target_weight: float
    """The weights of the trained tokens, summed."""


class StepCollator:
    """Turns the rows of one optimizer step into micro-batches of tensors.

    The weights of a step's targets add up to 1: the step's loss is the plain sum of its
    micro-batches' losses.
    """

    def __init__(
        self,
        examples: Examples,
        limits: BatchLimits,
        *,
        packed: bool,
        pad_token_id: int,
        objective: Objective = DEFAULT_OBJECTIVE,
        switch: int | None = None,
    ) -> None:
        self.examples = examples
        self.limits = limits
        self.packed = packed
        self.pad_token_id = pad_token_id
        self.objective = objective
        self.shares_beginnings = False
        """Whether what rows of a packed micro-batch begin with is computed once."""
        self.switch = switch

    def __call__(self, rows: Sequence[dict[str, int]]) -> StepRows:
        """Return the rows of one step, from the numbers that the data loader draws."""
        return self.collate([row["row"] for row in rows])

    def collate(self, indices: Sequence[int]) -> StepRows:
        """Build the step that holds the examples `indices`."""
        examples = [self.examples[index] for index in indices]
        lengths = [len(example.input_ids) for example in examples]
        shared = self.plan_shared(examples)
        plan = shared or self.plan(lengths)
        lay = self.lay if shared is None else pack_sharing
        micro_batches = [
            self.objective.collate([examples[position] for position in one], lay) for one in plan
        ]
        target_weight = sum(float(one["target_weights"].sum()) for one in micro_batches)
        for micro_batch in micro_batches:
            micro_batch["target_weights"] /= max(target_weight, SMALLEST_WEIGHT)
        return {
            "micro_batches": micro_batches,
            "rows": [[indices[position] for position in one] for one in plan],
            "tokens": sum(lengths),
            "trained_tokens": sum(one["targets"].numel() for one in micro_batches),
            "target_weight": target_weight,
        }

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split the rows of a step, of these lengths, into micro-batches."""
        return plan_micro_batches(lengths, self.limits, packed=self.packed, switch=self.switch)

    def plan_shared(self, examples: Sequence[Example]) -> list[list[int]] | None:
        """Split the rows by what they begin with; None if that is not shared, or saves nothing.

        A row that has to be kept apart changes the others' beginnings, too.
        """
        longest = max((len(example.input_ids) for example in examples), default=0)
        is_apart = self.switch is not None and longest > self.switch
        if not self.shares_beginnings or is_apart:
            return None
        return plan_shared(examples, self.limits)

    def build(self, examples: Sequence[Example]) -> MicroBatch:
        """Build one micro-batch as the objective wants it."""
        return self.objective.collate(examples, self.lay)

    def lay(self, examples: Sequence[Example]) -> MicroBatch:
        """Pack or pad rows, with their next tokens as targets."""
        return pack_rows(examples) if self.packed else pad_rows(examples, self.pad_token_id)


def pack_rows(examples: Sequence[Example]) -> MicroBatch:
    """Lay rows end to end, without padding.

    Returns:
        `input_ids` and `position_ids` [1, T] (positions restart with every row), the keyword
        arguments of transformers' variable-length attention (`cu_seq_lens_q` [rows + 1], ...),
        `row_lengths` as ints for our own, and the targets: see `_targets`.
    """
    lengths = [len(example.input_ids) for example in examples]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    input_ids = torch.tensor([token for example in examples for token in example.input_ids])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": input_ids[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "row_lengths": tuple(lengths),
        **_targets(examples, starts.tolist()),
    }


def pack_sharing(examples: Sequence[Example]) -> MicroBatch:
    """Lay rows end to end like `pack_rows`, the longest first, but once what they all begin with.

    Returns:
        `row_lengths` are those of the beginning and of what follows it in each row; there is
        `shares_beginning` (True), and nothing for transformers' own attention: no row is whole.
        Rows without a common beginning are packed as ever.
    """
    shared = shared_beginning(examples)
    if shared < MIN_BEGINNING:
        return pack_rows(examples)
    examples = sorted(examples, key=lambda example: -len(example.input_ids))
    rest = [example.input_ids[shared:] for example in examples]
    lengths = [shared, *map(len, rest)]
    input_ids = [*examples[0].input_ids[:shared], *(token for ids in rest for token in ids)]
    positions = [torch.arange(shared), *(shared + torch.arange(len(ids)) for ids in rest)]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return {
        "input_ids": torch.tensor(input_ids)[None],
        "position_ids": torch.cat(positions)[None],
        "row_lengths": tuple(lengths),
        "shares_beginning": True,
        **_targets(examples, [end - shared for end in ends[:-1]], shared=shared),
    }


def pad_rows(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    """Pad rows on the right to the longest one; what is padding is known by position, not by id.

    Returns:
        `input_ids`, `attention_mask` and `position_ids` [rows, longest], and the targets: see
        `_targets`.
    """
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    longest = int(lengths.max())
    input_ids = torch.full((len(examples), longest), pad_token_id)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
    positions = torch.arange(longest)[None].expand(len(examples), -1)
    return {
        "input_ids": input_ids,
        "attention_mask": (positions < lengths[:, None]).long(),
        "position_ids": positions.contiguous(),
        **_targets(examples, [row * longest for row in range(len(examples))]),
    }


def _targets(examples: Sequence[Example], starts: Sequence[int], *, shared: int = 0) -> MicroBatch:
    """Return where a token is trained and which one.

    The first `shared` tokens of all rows are the first of the batch; the others of a row are where
    they would be if it began at its `start`.

    `target_positions` [N] index the flattened batch at the position *before* the trained token,
    `targets` [N] are the token ids, `target_weights` [N] (float32) the weights of their rows and
    `target_sources` [N] the sources of those.
    """
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    sources: list[int] = []
    for example, start in zip(examples, starts, strict=False):
        for index, label in enumerate(example.labels[1:]):
            if label != IGNORE_INDEX:
                positions.append(index if index < shared else start + index)
                targets.append(label)
                weights.append(example.weight)
                sources.append(example.source_index)
    return {
        "target_positions": torch.tensor(positions, dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "target_weights": torch.tensor(weights, dtype=torch.float32),
        "target_sources": torch.tensor(sources, dtype=torch.int64),
    }


def move_to(micro_batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Return a micro-batch with its tensors on `device`."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in micro_batch.items()
    }


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
