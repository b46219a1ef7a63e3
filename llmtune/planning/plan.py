"""The plan of a run: memory, disk, time, and what to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmtune.planning.advice import advise_disk, advise_memory
from llmtune.planning.base import BaseNumbers, read_base
from llmtune.planning.devices import Device
from llmtune.planning.disk import DiskEstimate, estimate_disk
from llmtune.planning.estimate import MemoryEstimate
from llmtune.planning.rows import RowFacts, read_rows
from llmtune.planning.shape import ModelShape, read_shape
from llmtune.planning.speed import Rate, choose_rate, flops_a_token
from llmtune.planning.workload import PlanRequest, build_workload, count_steps, plan_memory_of


@dataclass(frozen=True)
class Plan:
    """What a run needs, and whether that is there."""

    device: Device
    base: BaseNumbers
    shape: ModelShape
    adapter_parameters: int
    rows: RowFacts
    memory: MemoryEstimate
    disk: DiskEstimate
    steps: int | None
    tokens: int | None
    rate: Rate
    seconds: float | None
    """Training alone; None if the number of rows is not known."""
    advice: tuple[str, ...]
    """What makes it fit; nothing where it does."""
    notices: tuple[str, ...]
    """What the user should know before starting."""

    @property
    def fits(self) -> bool:
        """Say whether both memory and disk are enough."""
        return self.memory.fits and self.disk.fits

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON values; bytes, seconds and counts."""
        memory, disk = self.memory, self.disk
        return {
            "fits": self.fits,
            "device": {"name": self.device.name, "memory_bytes": memory.memory_bytes},
            "parameters": self.shape.num_parameters,
            "active_parameters": self.shape.active_parameters,
            "adapter_parameters": self.adapter_parameters,
            "memory": {
                "total_bytes": memory.total_bytes,
                "components": dict(memory.components),
                "base": dict(memory.base),
                "bytes_a_token": round(memory.bytes_a_token),
                "micro_batch_tokens": memory.tokens,
                "recomputed_layers": memory.recomputed_layers,
                "layers": memory.layers,
            },
            "disk": {
                "total_bytes": disk.total_bytes,
                "components": dict(disk.components),
                "free_bytes": disk.free_bytes,
            },
            "rows": {
                "longest": self.rows.longest,
                "mean": self.rows.mean,
                "count": self.rows.num_rows,
                "source": self.rows.source,
            },
            "time": {
                "steps": self.steps,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "source": self.rate.source,
            },
            "advice": list(self.advice),
            "notices": list(self.notices),
        }


def make_plan(request: PlanRequest) -> Plan:
    """Plan a run from numbers alone; no weight is read and torch is not imported.

    Raises:
        LlmtuneError: the base or its architecture is not known, or the data is wrong.
    """
    base = read_base(request.model)
    shape = read_shape(base.config, base.place)
    rows = read_rows(
        request.data,
        base.tokenizer_dir,
        batch_size=request.train.batch_size,
        seed=request.seed,
        chat_template=request.model.chat_template,
    )
    memory = plan_memory_of(request, shape, rows)
    work = build_workload(request, shape, rows)
    disk = estimate_disk(
        request.train,
        adapter_parameters=work.adapter_parameters,
        merged_bytes=base.stored_bytes or shape.num_parameters * base.stored_element_bytes,
        run_dir=request.run_dir,
    )
    steps, tokens = count_steps(request.train, rows)
    rate = choose_rate(
        request.device,
        base=request.model.base,
        runs_dir=request.run_dir.parent,
        measure=request.measure,
    )
    flops = flops_a_token(work, mean_length=rows.mean, recomputed_layers=memory.recomputed_layers)
    speed = rate.tokens_per_second or rate.flops / flops
    return Plan(
        device=request.device,
        base=base,
        shape=shape,
        adapter_parameters=work.adapter_parameters,
        rows=rows,
        memory=memory,
        disk=disk,
        steps=steps,
        tokens=tokens,
        rate=rate,
        seconds=None if tokens is None else tokens / speed,
        advice=(
            *([] if memory.fits else advise_memory(request, shape, rows)),
            *([] if disk.fits else [advise_disk(request, disk)]),
        ),
        notices=tuple(_notices(base, rows, memory)),
    )


def _notices(base: BaseNumbers, rows: RowFacts, memory: MemoryEstimate) -> Iterator[str]:
    if memory.notice:
        yield memory.notice
    positions = base.config.get("max_position_embeddings")
    if isinstance(positions, int) and rows.longest > positions:
        yield (
            f"the longest row has {rows.longest} tokens, and the base was made for {positions} "
            f"(max_position_embeddings): set data.max_length={positions} or less"
        )
