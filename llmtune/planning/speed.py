"""How long a run takes: operations from the shape, and the rate they go at from a named source."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmtune.planning.devices import Device
from llmtune.planning.estimate import Workload

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
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            continue
        result = manifest.get("stages", {}).get("train", {}).get("result") or {}
        if _is_like(manifest, result, base):
            speed = result["tokens"] / result["seconds"]
            found.append((manifest["created"], path.parent.name, speed))
    return max(found)[1:] if found else None


def _is_like(manifest: dict[str, Any], result: dict[str, Any], base: str) -> bool:
    is_measured = bool(result.get("tokens")) and bool(result.get("seconds"))
    origin = str(manifest.get("base", {}).get("origin", ""))
    is_same = origin == base or Path(origin).name == Path(base).name
    return is_measured and is_same and result.get("device") == "cpu"
