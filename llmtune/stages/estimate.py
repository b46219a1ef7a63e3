"""What the planner says of a run that is about to be trained, to be held against what it takes."""

from pathlib import Path
from typing import Any

import torch

from llmtune.config import RunConfig
from llmtune.data.prepared import PreparedData
from llmtune.errors import LlmtuneError
from llmtune.planning.base import read_base
from llmtune.planning.devices import Device, this_cpu
from llmtune.planning.rows import measure_rows
from llmtune.planning.shape import read_shape
from llmtune.planning.workload import PlanRequest, plan_memory_of


def estimate_training(
    config: RunConfig,
    base_dir: Path,
    device: torch.device,
    data: tuple[PreparedData, PreparedData],
) -> dict[str, Any] | None:
    """Return the estimated peak by component; None for an architecture that is not known.

    Call it before the base is loaded: it counts with the memory that is free then. `total_bytes`
    is what `TrainResult.peak_bytes` measures: on a GPU what is allocated, without the context.
    """
    if device.type == "cuda":
        place = Device(str(device), "cuda", torch.cuda.mem_get_info(device)[0])
    else:
        place = this_cpu()
    request = PlanRequest(
        model=config.model.model_copy(update={"base": str(base_dir), "revision": None}),
        adapter=config.adapter,
        data=config.data,
        train=config.train,
        run_dir=config.run_dir,
        seed=config.seed,
        device=place,
    )
    try:
        base = read_base(request.model)
        shape = read_shape(base.config, base.place)
    except LlmtuneError:
        return None
    rows = measure_rows(*data, batch_size=config.train.batch_size)
    memory = plan_memory_of(request, shape, rows)
    components = dict(memory.components)
    if place.kind == "cuda":
        del components["runtime"]
    return {
        "total_bytes": sum(components.values()),
        "components": components,
        "micro_batch_tokens": memory.tokens,
        "recomputed_layers": memory.recomputed_layers,
    }
