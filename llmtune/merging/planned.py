"""What merges would write, as JSON and in words; nothing is written."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from llmtune.io.sizes import MIB, format_apart, format_in
from llmtune.io.unfinished import free_bytes
from llmtune.merging.changes import ChangedTensorJson, MergePlan, MergePlanJson
from llmtune.merging.merge import needed_bytes

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class PlannedJson(TypedDict):
    """What merges would write, as JSON."""

    out_dir: str
    needed_bytes: int
    free_bytes: int
    plans: list[MergePlanJson]


@dataclass(frozen=True)
class PlannedMerges:
    """What merges would write, one for each base."""

    plans: Sequence[MergePlan]
    out_dir: Path

    @property
    def needed_bytes(self) -> int:
        """The bytes of all that would be on the disk at once."""
        return sum(needed_bytes(plan) for plan in self.plans)

    @property
    def num_changed(self) -> int:
        """How many tensors of the base get the adapter."""
        return sum(bool(one.blocks) for one in self.plans[0].tensors)

    def to_dict(self) -> PlannedJson:
        """Return the plans as JSON: every changed tensor, and the disk's needed and free bytes."""
        return {
            "out_dir": str(self.out_dir),
            "needed_bytes": self.needed_bytes,
            "free_bytes": free_bytes(self.out_dir),
            "plans": [plan.to_dict() for plan in self.plans],
        }

    def describe(self) -> str:
        """Say which tensors get which delta, one line for like-named ones, and the disk's needs."""
        lines = [line for plan in self.plans for line in _format_plan(plan.to_dict())]
        needed, free = format_apart(self.needed_bytes, free_bytes(self.out_dir))
        return "\n".join(
            [*lines, f"on the disk: {needed} needed, {free} free", "nothing was written"]
        )


def _format_plan(plan: MergePlanJson) -> Iterator[str]:
    adapters = ", ".join(f"{one['directory']} x {one['weight']:g}" for one in plan["adapters"])
    yield f"{adapters} into the {plan['base']} base {plan['base_dir']}"
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for tensor in plan["changed"]:
        key = (
            LAYER_NUMBER.sub("*", tensor["tensor"]),
            tensor["change"] + (" on dequantized" if _is_delta_on_dequantized(tensor) else ""),
            " x ".join(map(str, tensor["shape"])),
            tensor["dtype"],
            ", ".join(_delta_text(delta) for delta in tensor["deltas"]),
        )
        groups[key].append(tensor["bytes"])
    for (pattern, change, shape, dtype, deltas), sizes in groups.items():
        yield (
            f"  {len(sizes):>4} x {pattern} [{shape}] {dtype}: {change}"
            f"{', ' + deltas if deltas else ''}, {format_in(sum(sizes), 'MiB')}"
        )
    untouched = plan["tensors"] - len(plan["changed"])
    yield f"  {untouched:>4} tensors copied; {plan['bytes'] / MIB:,.1f} MiB in all"
    yield from (f"  config.json: {key} = {value}" for key, value in plan["config_changes"].items())
    yield from (f"  {notice}" for notice in plan["notices"])


def _is_delta_on_dequantized(tensor: ChangedTensorJson) -> bool:
    return tensor["is_dequantized"] and tensor["change"] != "dequantized"


def _delta_text(delta: Mapping[str, float | str]) -> str:
    numbers = {name: value for name, value in delta.items() if not isinstance(value, str)}
    strength = numbers.pop("weight", 1)
    weight = f" x {strength:g}" if strength != 1 else ""
    return " ".join(f"{name} {value:g}" for name, value in numbers.items()) + weight
