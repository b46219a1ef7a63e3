"""Laying several adapters' changes of one base over each other."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.merging.changes import PlannedTensor


def overlay(
    before: Mapping[str, PlannedTensor], added: Mapping[str, PlannedTensor], adapter_dir: Path
) -> dict[str, PlannedTensor]:
    """Add one adapter's changes to those of the adapters before it.

    Low-rank deltas of one tensor are kept side by side, in this order. A tensor that only one
    adapter changes may be changed in any way.

    Raises:
        LlmtuneError: a tensor is changed by two adapters and one of the changes is not a plain
            low-rank delta.
    """
    result = dict(before)
    for name, tensor in added.items():
        other = result.get(name)
        result[name] = tensor if other is None else _join(other, tensor, adapter_dir)
    return result


def _join(one: PlannedTensor, other: PlannedTensor, adapter_dir: Path) -> PlannedTensor:
    for tensor in (one, other):
        if tensor.change != "lora" or one.source != other.source:
            raise LlmtuneError(
                f"{adapter_dir}: it and an adapter before it both change {one.name!r}, one of them "
                f"not as a plain low-rank delta ({tensor.change}); such adapters cannot be combined"
            )
    places = [(block.first_row, block.num_rows) for block in one.blocks]
    if places != [(block.first_row, block.num_rows) for block in other.blocks]:
        raise LlmtuneError(
            f"{adapter_dir}: it and an adapter before it cut {one.name!r} differently; they cannot "
            "be combined"
        )
    blocks = tuple(
        replace(first, deltas=first.deltas + second.deltas)
        for first, second in zip(one.blocks, other.blocks, strict=True)
    )
    return replace(one, blocks=blocks)
