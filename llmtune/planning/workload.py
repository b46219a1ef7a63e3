"""From the sections of a config to the planner's numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from llmtune.adapters.base import Adapter
from llmtune.adapters.module_selection import (
    ALL_LINEAR,
    ModuleNames,
    choose_targets,
    means,
)
from llmtune.data.config import DataConfig
from llmtune.data.example import PreparedData
from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.planning.activations import Adapted
from llmtune.planning.base import read_base
from llmtune.planning.devices import Device
from llmtune.planning.estimate import MemoryEstimate, Workload, estimate_memory
from llmtune.planning.rows import RowFacts, measure_rows
from llmtune.planning.shape import ModelShape, read_shape
from llmtune.training.config import TrainConfig
from llmtune.training.protect.config import ProtectConfig

MASK_BYTES = {"cpu": 4, "cuda": 1}
"""Of a dropped feature: a CPU keeps the mask in float32."""

VOCABULARY_TABLES = ("lm_head", "embed_out", "output", "embed_tokens", "embed_in", "wte")
"""What architectures call the LM head and the token embedding."""


@dataclass(frozen=True)
class PlanRequest:
    """The sections of a config that decide what a run needs."""

    model: ModelConfig
    adapter: Adapter
    data: DataConfig
    train: TrainConfig
    run_dir: Path
    seed: int
    device: Device
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    measure: bool = False
    """Time a matrix product now for the time estimate."""
    opened: Checkpoint | None = None
    """The base, if it is open already."""
    cards: int = 1
    """That share each step, and with `train.shard` the base's layers."""


def plan_memory_of(request: PlanRequest, shape: ModelShape, rows: RowFacts) -> MemoryEstimate:
    """Return the memory estimate for a request's sections."""
    work = build_workload(request, shape, rows)
    return estimate_memory(work, request.device.kind, request.device.memory_bytes)


def build_workload(request: PlanRequest, shape: ModelShape, rows: RowFacts) -> Workload:
    """Turn a config's sections into the planner's numbers."""
    model, adapter, train = request.model, request.adapter, request.train
    names = _module_names(shape)
    chosen = choose_targets(_with_known_names(adapter, names), names)
    offered = names.offered_to(adapter)
    packed = request.data.packing != "off"
    steps, num_tokens = count_steps(train, rows)
    element_bytes = 4 if model.dtype == "float32" else 2
    penalty = request.protect.kl_to_base
    return Workload(
        shape=shape,
        quantization=model.storage,
        element_bytes=element_bytes,
        kept_state_bytes=0
        if penalty is None
        else penalty.kept_bytes(width=shape.width, element_bytes=element_bytes, steps=steps),
        adapted=Adapted(
            ranks={name: adapter.thin_width(name) for name in chosen if name in names.adaptable},
            is_fused=adapter.is_fusable and model.storage.fusable_layer is not None,
            dropout_mask_bytes=MASK_BYTES[request.device.kind] if adapter.drops_inputs else 0,
            kept_outputs=adapter.KEPT_OUTPUTS,
            kept_inputs=adapter.kept_inputs,
            dense_copies=adapter.DENSE_COPIES,
        ),
        adapter_parameters=adapter.num_parameters(
            {name: offered[name] for name in chosen}, biased=names.biased
        )
        + _whole_parameters(adapter.modules_to_save, shape)
        + len(adapter.token_rows) * shape.width,
        optimizer=train.optimizer,
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size,
        checkpointing=train.gradient_checkpointing,
        rows=rows.sizes(packed=packed, batch_size=train.batch_size),
        trained_ratio=rows.trained_ratio,
        steps=steps,
        num_tokens=num_tokens,
        num_lengths=rows.num_lengths,
        state_numbers=adapter.STATE_NUMBERS,
        shards=request.cards if train.shard == "full" else 1,
    )


def _with_known_names(adapter: Adapter, names: ModuleNames) -> Adapter:
    """Return the section without names that only a loaded model knows; training checks them there.

    A norm that is named counts as all of its layer.
    """
    wanted = adapter.target_modules
    if "norms" in adapter.trained_parts and wanted != ALL_LINEAR:
        if isinstance(wanted, str):
            wanted = wanted if any(means(wanted, name) for name in names.linear) else ["norms"]
        else:
            known = (any(means([one], name) for name in names.linear) for one in wanted)
            wanted = [
                one if is_linear else "norms" for one, is_linear in zip(wanted, known, strict=True)
            ]
    return adapter.model_copy(update={"modules_to_save": [], "target_modules": wanted})


def _whole_parameters(modules: Sequence[str], shape: ModelShape) -> int:
    """Return the parameters of modules that are trained whole; norms and the like count nothing."""
    endings = [module.rpartition(".")[2] for module in modules]
    tables = sum(ending in VOCABULARY_TABLES for ending in endings) * shape.embedding_parameters
    return tables + sum(
        math.prod(size) for name, size in shape.linear.items() if name.rpartition(".")[2] in endings
    )


def _module_names(shape: ModelShape) -> ModuleNames:
    parents = {name.rpartition(".")[0]: "block" for name in shape.linear}
    norms = {f"{shape.family.layers}.{index}": "layer" for index in range(shape.layers)}
    return ModuleNames(
        linear=shape.linear,
        experts=shape.fused_experts,
        head="lm_head",
        is_head_tied=shape.is_tied,
        biased=shape.biased,
        norms=shape.norms,
        others={**parents, **norms, "model.embed_tokens": "Embedding"},
    )


def count_steps(train: TrainConfig, rows: RowFacts) -> tuple[int | None, int | None]:
    """Return the optimizer steps and the tokens they take, None if rows were not counted."""
    if train.max_steps is None and rows.num_rows is None:
        return None, None
    steps = train.total_steps(rows.num_rows or 0)
    trained_rows = float(steps * train.batch_size)
    if train.max_steps is None and rows.num_rows is not None:
        trained_rows = (train.num_epochs or 1) * rows.num_rows
    return steps, round(trained_rows * rows.mean)


class TrainingEstimate(TypedDict):
    """What the planner says of a run that is about to be trained."""

    total_bytes: int
    """The peak that `TrainResult.peak_bytes` measures."""
    components: dict[str, int]
    micro_batch_tokens: int
    recomputed_layers: int


def estimate_training(
    request: PlanRequest, train: PreparedData, evaluation: PreparedData
) -> TrainingEstimate | None:
    """Return the estimated peak by component; None for an architecture that is not known.

    Call it before the base is loaded: it counts with the memory that is free then. On a GPU the
    total is what is allocated, without the context.

    Args:
        request: the sections, with the opened base; its device is `devices.free_device`'s.
        train: the prepared rows.
        evaluation: the prepared rows of evaluation.
    """
    try:
        base = read_base(request.model, request.opened)
        shape = read_shape(base.config, base.place)
        rows = measure_rows(train, evaluation, batch_size=request.train.batch_size)
        memory = plan_memory_of(request, shape, rows)
    except LlmtuneError:
        return None
    components = dict(memory.components)
    if request.device.kind == "cuda":
        del components["runtime"]
    return {
        "total_bytes": sum(components.values()),
        "components": components,
        "micro_batch_tokens": memory.tokens,
        "recomputed_layers": memory.recomputed_layers,
    }
