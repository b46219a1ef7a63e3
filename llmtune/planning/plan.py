"""The plan of a run: memory, disk, time, and what to change where it does not fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.adapters.base import LowRankAdapter
from llmtune.adapters.targets import ModuleNames, choose_targets
from llmtune.data.config import DataConfig
from llmtune.models.config import ModelConfig, Nf4Quantization
from llmtune.planning.activations import Adapted
from llmtune.planning.base import BaseNumbers, read_base
from llmtune.planning.devices import Device
from llmtune.planning.disk import DiskEstimate, estimate_disk
from llmtune.planning.estimate import MemoryEstimate, Workload, estimate_memory
from llmtune.planning.rows import RowFacts, read_rows
from llmtune.planning.shape import ModelShape, read_shape
from llmtune.planning.speed import Rate, choose_rate, flops_a_token
from llmtune.training.config import TrainConfig

MASK_BYTES = {"cpu": 4, "cuda": 1}
NUM_SUGGESTIONS = 2
SHORTEST = 256
LOW_RANK = 8


@dataclass(frozen=True)
class PlanRequest:
    """The sections of a config that decide what a run needs."""

    model: ModelConfig
    adapter: LowRankAdapter
    data: DataConfig
    train: TrainConfig
    run_dir: Path
    seed: int
    device: Device
    measure: bool = False
    """Time a matrix product now for the time estimate."""


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
    """Training alone; None where the number of rows is not known."""
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
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
    memory = plan_memory_of(request, base, shape, rows)
    work = build_workload(request, base, shape, rows)
    disk = estimate_disk(
        request.train,
        adapter_parameters=work.adapter_parameters,
        merged_bytes=base.stored_bytes or shape.num_parameters * base.stored_element_bytes,
        run_dir=request.run_dir,
    )
    steps, tokens = _count_steps(request.train, rows)
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
            *([] if memory.fits else _advise(request, base, shape, rows)),
            *([] if disk.fits else [_advise_disk(request, disk)]),
        ),
    )


def plan_memory_of(
    request: PlanRequest, base: BaseNumbers, shape: ModelShape, rows: RowFacts
) -> MemoryEstimate:
    """Return the memory estimate for a request's sections."""
    work = build_workload(request, base, shape, rows)
    return estimate_memory(work, request.device.kind, request.device.memory_bytes)


def build_workload(
    request: PlanRequest, base: BaseNumbers, shape: ModelShape, rows: RowFacts
) -> Workload:
    """Turn a config's sections into the planner's numbers."""
    model, adapter, train = request.model, request.adapter, request.train
    chosen = choose_targets(adapter, _module_names(shape))
    adaptable: Mapping[str, tuple[int, ...]] = {**shape.linear, **shape.fused_experts}
    is_dora = adapter.method == "dora"
    is_quantized = model.quantization_method != "none"
    mapped = base.stored_bytes or shape.num_parameters * base.stored_element_bytes
    packed = request.data.packing != "off"
    return Workload(
        shape=shape,
        quantization=model.quantization,
        element_bytes=4 if model.dtype == "float32" else 2,
        adapted=Adapted(
            ranks={name: adapter.rank_of(name) for name in chosen},
            is_fused=not (is_dora or adapter.dropout > 0 or model.quantization_method == "int8"),
            dropout_mask_bytes=MASK_BYTES[request.device.kind] if adapter.dropout > 0 else 0,
            is_dora=is_dora,
        ),
        adapter_parameters=adapter.num_parameters({name: adaptable[name] for name in chosen}),
        optimizer=train.optimizer,
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size,
        checkpointing=train.gradient_checkpointing,
        rows=rows.sizes(packed=packed, batch_size=train.batch_size),
        trained_ratio=rows.trained_ratio,
        mapped_bytes=mapped if is_quantized else 0,
    )


def _module_names(shape: ModelShape) -> ModuleNames:
    parents = {name.rpartition(".")[0]: "block" for name in shape.linear}
    norms = {f"{shape.family.layers}.{index}": "layer" for index in range(shape.layers)}
    return ModuleNames(
        linear=shape.linear,
        experts=shape.fused_experts,
        head="lm_head",
        is_head_tied=shape.is_tied,
        others={**parents, **norms, "model.embed_tokens": "Embedding"},
    )


def _count_steps(train: TrainConfig, rows: RowFacts) -> tuple[int | None, int | None]:
    """Return the optimizer steps and the tokens they take, None where rows were not counted."""
    if train.max_steps is None and rows.num_rows is None:
        return None, None
    steps = train.total_steps(rows.num_rows or 0)
    trained_rows = float(steps * train.batch_size)
    if train.max_steps is None and rows.num_rows is not None:
        trained_rows = (train.num_epochs or 1) * rows.num_rows
    return steps, round(trained_rows * rows.mean)


def _advise(
    request: PlanRequest, base: BaseNumbers, shape: ModelShape, rows: RowFacts
) -> list[str]:
    """Return two ways to make the run fit: single settings, else several together."""
    options = list(_options(request, rows))
    ways = [[option] for option in options] + [
        options[:count] for count in range(2, len(options) + 1)
    ]
    found: list[str] = []
    needed = 0
    for way in ways:
        changed, length = _apply(request, way)
        memory = plan_memory_of(changed, base, shape, _shorten(rows, length))
        needed = memory.total_bytes
        if memory.fits and len(found) < NUM_SUGGESTIONS:
            found.append(f"{_join(way)}: {_write_gib(needed)} in all")
    return found or [
        f"even {_join(options)} needs {_write_gib(needed)}: choose a smaller base, or a device "
        "with more memory"
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
    if model.quantization_method in ("none", "int8"):
        smaller = model.model_copy(update={"quantization": Nf4Quantization()})
        yield _Option("model.quantization='{method: nf4}'", {"model": smaller})
    if rows.longest > SHORTEST:
        half = max(rows.longest // 2, SHORTEST)
        yield _Option(f"data.max_length={half}", {}, half)
    if request.adapter.rank > LOW_RANK:
        lower = request.adapter.model_copy(update={"rank": LOW_RANK})
        yield _Option(f"adapter.rank={LOW_RANK}", {"adapter": lower})


def _advise_disk(request: PlanRequest, disk: DiskEstimate) -> str:
    missing = disk.total_bytes - disk.free_bytes
    return f"{_write_gib(missing)} more room under {request.run_dir}, or another run_dir"


def _shorten(rows: RowFacts, length: int | None) -> RowFacts:
    if length is None:
        return rows
    share = length / rows.longest
    return replace(rows, longest=length, largest_step=round(rows.largest_step * share))


def _write_gib(size: float) -> str:
    return f"{size / (1 << 30):.1f} GiB"
