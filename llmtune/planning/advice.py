"""What to change if a run does not fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmtune.io.sizes import MIB, format_in, format_size
from llmtune.models.quantization.config import SMALLEST
from llmtune.planning.estimate import DiskEstimate
from llmtune.planning.rows import RowFacts
from llmtune.planning.shape import ModelShape
from llmtune.planning.workload import PlanRequest, plan_memory_of

NUM_SUGGESTIONS = 2
SHORTEST = 256


def advise_memory(request: PlanRequest, shape: ModelShape, rows: RowFacts) -> list[str]:
    """Return two ways to make the run fit: single settings, else several together."""
    options = list(_options(request, rows))
    ways = [[option] for option in options] + [
        options[:count] for count in range(2, len(options) + 1)
    ]
    found: list[str] = []
    in_gib = ""
    for way in ways:
        changed, length = _apply(request, way)
        memory = plan_memory_of(changed, shape, _shorten(rows, length))
        in_gib = format_in(memory.total_bytes, "GiB")
        if memory.fits and len(found) < NUM_SUGGESTIONS:
            found.append(f"{_join(way)}: {in_gib} in all")
    return found or [
        f"even {_join(options)} needs {in_gib}: choose a smaller base, or a device with more memory"
    ]


@dataclass(frozen=True)
class _Option:
    """A change of settings: in words, the sections it replaces, and the longest row it leaves."""

    text: str
    sections: Mapping[str, Any]
    length: int | None = None


def _apply(request: PlanRequest, options: Sequence[_Option]) -> tuple[PlanRequest, int | None]:
    length = None
    for option in options:
        request = replace(request, **option.sections)
        length = option.length or length
    return request, length


def _join(options: Sequence[_Option]) -> str:
    return " ".join(option.text for option in options)


def _options(request: PlanRequest, rows: RowFacts) -> Iterator[_Option]:
    """Yield what can be changed, the mildest first."""
    model, train = request.model, request.train
    if train.gradient_checkpointing is False or train.micro_batch_size not in ("auto", 1):
        milder = {"gradient_checkpointing": "auto", "micro_batch_size": "auto"}
        yield _Option(
            "train.gradient_checkpointing=auto train.micro_batch_size=auto",
            {"train": train.model_copy(update=milder)},
        )
    if model.storage.bits > SMALLEST.bits:
        smaller = model.model_copy(update={"quantization": SMALLEST})
        yield _Option(f"model.quantization='{{method: {SMALLEST.method}}}'", {"model": smaller})
    if rows.longest > SHORTEST:
        half = max(rows.longest // 2, SHORTEST)
        yield _Option(f"data.max_length={half}", {}, half)
    lighter = request.adapter.lighter()
    if lighter is not None:
        text, adapter = lighter
        yield _Option(text, {"adapter": adapter})


def advise_disk(request: PlanRequest, disk: DiskEstimate) -> str:
    """Return how much room is missing, and where."""
    missing = disk.total_bytes - disk.free_bytes
    rounded_up = max(missing, MIB)
    return f"{format_size(rounded_up)} more room under {request.run_dir}, or a different run_dir"


def _shorten(rows: RowFacts, length: int | None) -> RowFacts:
    if length is None:
        return rows
    share = length / rows.longest
    return replace(rows, longest=length, largest_step=round(rows.largest_step * share))
