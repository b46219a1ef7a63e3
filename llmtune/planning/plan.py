"""The plan of a run: memory, disk, time, and what to change if it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.manifest import Manifest, TrainRecord, read_manifest
from llmtune.io.run_dir import RunDir
from llmtune.planning.advice import advise_disk, advise_memory
from llmtune.planning.base import BaseNumbers, read_base
from llmtune.planning.devices import Device
from llmtune.planning.estimate import DiskEstimate, MemoryEstimate, Workload, estimate_disk
from llmtune.planning.rows import RowFacts, read_rows
from llmtune.planning.shape import ModelShape, read_shape
from llmtune.planning.workload import PlanRequest, build_workload, count_steps, plan_memory_of

ASSUMED_UTILIZATION = MappingProxyType({"cpu": 0.4, "cuda": 0.35})
"""Share of the matrix products' peak that training reaches. CPU: measured on SmolLM2-135M; CUDA:
assumed, in the middle of what is published for LoRA on one GPU."""
ASSUMED_TERAFLOPS = MappingProxyType({"cpu": 0.2, "cuda": 100.0})
MEASURED_SIZE = 1024
MEASURED_REPEATS = 8


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
        template=request.model.template,
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
