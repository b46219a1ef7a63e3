"""The plan of a run: memory, disk, time, and what to change if it does not fit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.io.manifest import Manifest, TrainRecord, read_manifest
from llmtune.io.run_dir import RunDir
from llmtune.io.sizes import MIB, format_in, format_size
from llmtune.models.quantization.config import SMALLEST
from llmtune.planning.base import BaseNumbers, read_base
from llmtune.planning.devices import Device
from llmtune.planning.estimate import DiskEstimate, MemoryEstimate, Workload, estimate_disk
from llmtune.planning.rows import RowFacts, read_rows
from llmtune.planning.scaling import Scaling, Spread, plan_card, plan_scaling
from llmtune.planning.shape import ModelShape, read_shape
from llmtune.planning.workload import PlanRequest, build_workload, count_steps, plan_memory_of

NUM_SUGGESTIONS = 2
SHORTEST = 256
ASSUMED_UTILIZATION = MappingProxyType({"cpu": 0.4, "cuda": 0.35})
"""Share of the matrix products' peak that training reaches. CPU: measured on SmolLM2-135M; CUDA:
assumed, in the middle of what is published for LoRA on one GPU."""
ASSUMED_TERAFLOPS = MappingProxyType({"cpu": 0.2, "cuda": 100.0})
MEASURED_SIZE = 1024
MEASURED_REPEATS = 8


@dataclass(frozen=True)
class _Option:
    """A change of settings: in words, the sections it replaces, and the longest row it leaves."""

    text: str
    sections: Mapping[str, Any]
    length: int | None = None


@dataclass(frozen=True)
class Rate:
    """Operations a second, and where the figure is from."""

    flops: float
    source: str
    tokens_per_second: float | None = None
    """What an earlier run of the same base measured; it wins over the operations."""


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
    """What makes it fit; nothing if it does."""
    notices: tuple[str, ...]
    """What the user should know before starting."""
    scaling: Scaling | None = None
    """What several cards bring, if they were asked for; `memory` is then that of one of them."""

    @property
    def fits(self) -> bool:
        """Say whether both memory and disk are enough."""
        return self.memory.fits and self.disk.fits

    def as_json(self) -> JsonObject:
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
            **({} if self.scaling is None else {"scaling": self.scaling.as_json()}),
        }


def make_plan(request: PlanRequest, spread: Spread | None = None) -> Plan:
    """Plan a run from numbers alone; no weight is read and torch is not imported.

    Args:
        spread: the cards that share its steps; None is one.

    Raises:
        LlmtuneError: the base or its architecture is not known, or the data is wrong.
    """
    base = read_base(request.model, request.opened)
    shape = read_shape(base.config, base.place)
    rows = read_rows(
        request.data,
        base.tokenizer_dir,
        batch_size=request.train.batch_size,
        seed=request.seed,
        template=request.model.template,
    )
    work = build_workload(request, shape, rows)
    cards = 1 if spread is None else spread.cards
    memory = plan_card(request, shape, rows, cards, parameters=work.adapter_parameters)
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
    alone = memory if cards == 1 else plan_memory_of(request, shape, rows)
    flops = flops_a_token(work, mean_length=rows.mean, recomputed_layers=alone.recomputed_layers)
    speed = rate.tokens_per_second or rate.flops / flops
    scaling = None
    if spread is not None:
        step_seconds = request.train.batch_size * rows.mean / speed
        scaling = plan_scaling(
            request,
            shape,
            rows,
            spread,
            parameters=work.adapter_parameters,
            estimated=(step_seconds, rate.source),
        )
        speed *= scaling.speedup
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
        scaling=scaling,
    )


def _notices(base: BaseNumbers, rows: RowFacts, memory: MemoryEstimate) -> Iterator[str]:
    if base.notice:
        yield base.notice
    if memory.notice:
        yield memory.notice
    positions = base.config.get("max_position_embeddings")
    if isinstance(positions, int) and rows.longest > positions:
        yield (
            f"the longest row has {rows.longest} tokens, and the base was made for {positions} "
            f"(max_position_embeddings): set data.max_length={positions} or less"
        )


def flops_a_token(work: Workload, *, mean_length: float, recomputed_layers: int) -> float:
    """Return the operations of a training token: forward, backward, and what is recomputed.

    4 P for the frozen linears (forward, and the gradient of their input), 4 V W for a labelled
    token in the frozen head, 3.5 times the causal attention's forward pass, 6 a trained weight;
    a recomputed layer adds its forward pass.
    """
    shape = work.shape
    attention = 2 * mean_length * shape.query_width * shape.layers
    head = 4 * shape.embedding_parameters * work.trained_ratio
    adapters = 6 * work.adapter_parameters
    again = recomputed_layers / shape.layers * (2 * shape.active_parameters + attention)
    return 4 * shape.active_parameters + head + 3.5 * attention + adapters + again


def choose_rate(device: Device, *, base: str, runs_dir: Path, measure: bool) -> Rate:
    """Return how fast this goes: an earlier run's speed, a short measurement, or an assumption."""
    if device.kind == "cpu" and measure:
        flops = measure_products()
        used = ASSUMED_UTILIZATION["cpu"]
        return Rate(used * flops, f"{used:.0%} of {flops / 1e9:.0f} GFLOP/s, measured just now")
    if device.kind == "cpu" and (found := _find_run(runs_dir, base)):
        name, speed = found
        return Rate(0.0, f"{speed:.0f} tokens/s, measured by {name}", speed)
    teraflops = device.teraflops or ASSUMED_TERAFLOPS[device.kind]
    used = ASSUMED_UTILIZATION[device.kind]
    known = "the maker's" if device.teraflops else "an assumed"
    return Rate(used * teraflops * 1e12, f"assumed: {used:.0%} of {known} {teraflops:g} TFLOP/s")


def measure_products() -> float:
    """Return the operations a second of a bfloat16 matrix product here, the fastest of some."""
    import time

    import torch

    left = torch.randn(MEASURED_SIZE, MEASURED_SIZE).bfloat16()
    seconds = []
    for _ in range(MEASURED_REPEATS):
        started = time.perf_counter()
        left @ left
        seconds.append(time.perf_counter() - started)
    return 2 * MEASURED_SIZE**3 / min(seconds)


def _find_run(runs_dir: Path, base: str) -> tuple[str, float] | None:
    """Return the newest finished CPU run on this base beside the planned one, and its speed."""
    found: list[tuple[str, str, float]] = []
    for path in runs_dir.glob("*/manifest.json"):
        try:
            manifest = read_manifest(RunDir(path.parent))
        except LlmtuneError:
            continue
        result = manifest.trained
        if _is_like(manifest, result, base):
            speed = result["tokens"] / result["seconds"]
            found.append((manifest.created, path.parent.name, speed))
    return max(found)[1:] if found else None


def _is_like(manifest: Manifest, result: TrainRecord, base: str) -> bool:
    is_measured = bool(result.get("tokens")) and bool(result.get("seconds"))
    origin = str(manifest.base.get("origin", ""))
    is_same = origin == base or Path(origin).name == Path(base).name
    return is_measured and is_same and result.get("device") == "cpu"


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
