"""From rows to micro-batches: the rows of a step that go together, packed or not, as tensors."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.io.processes import ALONE
from llmtune.training.grouping import (
    MIN_BEGINNING,
    deal_rows,
    plan_micro_batches,
    plan_shared,
    shared_beginning,
)
from llmtune.training.memory.arithmetic import BatchLimits
from llmtune.training.noise import name_rows
from llmtune.training.objectives import DEFAULT_OBJECTIVE
from llmtune.training.objectives.base import MicroBatch, Objective
from llmtune.training.rows import Examples

SMALLEST_WEIGHT = 1e-30


class StepRows(TypedDict):
    """The rows of one optimizer step, of which several processes have a share each.

    The numbers are those of the whole step.
    """

    micro_batches: list[MicroBatch]
    """Those of this process: see `pack_rows` and `pad_rows`; their `target_weights` are divided by
    `target_weight`."""
    rows: list[list[int]]
    """Indices of the examples, one list a micro-batch; a last list holds the other processes'."""
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
        self.names_rows = False
        """Whether micro-batches say which rows they hold, for noise of their own."""
        self.switch = switch
        self.processes = ALONE
        """Those that share the rows of each step."""

    def __call__(self, rows: Sequence[dict[str, int]]) -> StepRows:
        """Return this process's share of one step, from the numbers that the data loader draws."""
        indices = [row["row"] for row in rows]
        if not self.processes.are_many:
            return self.collate(indices)
        examples = [self.examples[index] for index in indices]
        dealt = deal_rows(examples, self.processes.world_size, by_beginning=self.shares_beginnings)
        step = self._build_step([indices[place] for place in dealt[self.processes.rank]])
        numbers = (step["target_weight"], step["tokens"], step["trained_tokens"])
        weight, tokens, trained_tokens = self.processes.total(numbers)
        step["target_weight"] = weight
        step["tokens"], step["trained_tokens"] = int(tokens), int(trained_tokens)
        own = {row for rows in step["rows"] for row in rows}
        step["rows"].append([index for index in indices if index not in own])
        return _divide_weights(step)

    def collate(self, indices: Sequence[int]) -> StepRows:
        """Build the step that holds the examples `indices`, all of them here."""
        return _divide_weights(self._build_step(indices))

    def _build_step(self, indices: Sequence[int]) -> StepRows:
        examples = [self.examples[index] for index in indices]
        lengths = [len(example.input_ids) for example in examples]
        shared = self.plan_shared(examples)
        plan = shared or self.plan(lengths)
        lay = self.lay if shared is None else pack_sharing
        micro_batches = [
            self.objective.collate([examples[position] for position in one], lay) for one in plan
        ]
        target_weight = sum(float(one["target_weights"].sum()) for one in micro_batches)
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
        laid = pack_rows(examples) if self.packed else pad_rows(examples, self.pad_token_id)
        if self.names_rows:
            laid["row_lengths_and_keys"] = name_rows(examples)
        return laid


def _divide_weights(step: StepRows) -> StepRows:
    for micro_batch in step["micro_batches"]:
        micro_batch["target_weights"] /= max(step["target_weight"], SMALLEST_WEIGHT)
    return step


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
