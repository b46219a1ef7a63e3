"""The memory and disk of a training run by component, and what fits: arithmetic on a shape."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from llmtune.io.sizes import MIB
from llmtune.models.quantization.base import Quantization
from llmtune.planning.activations import (
    Adapted,
    activation_cost,
    advise_capacity,
    count_sizes,
    kernel_bytes,
    merged_expert_bytes,
)
from llmtune.planning.shape import ModelShape
from llmtune.training.config import OptimizerName, TrainConfig
from llmtune.training.memory.arithmetic import (
    USABLE_SHARE,
    USEFUL_TOKENS,
    WORKSPACE_FACTOR,
    ActivationCost,
    MemoryPlan,
    RowSizes,
    plan_memory,
)
from llmtune.training.optimizers import OPTIMIZERS

RUNTIME_BYTES = MappingProxyType({"cpu": 680 * MIB, "cuda": 600 * MIB})
"""What is there beside weights. CPU: the resident memory of the process with torch, transformers,
trl, peft and bitsandbytes imported (546 MiB), rows prepared and a first forward pass done, less
base and adapter: measured alike on a 16-bit and an NF4 base, torch 2.13. CUDA: the context with its
kernels and cuBLAS' workspace; assumed, not measured."""
ACTIVATIONS = ("activations", "recomputed layers")
HEAD_CHUNK = 256
HEAD_TILE_BYTES = 8 * MIB
FLOAT32 = 4
GATHERED_LAYERS = 3
"""Layers of a sharded base that a device holds whole at once; from FSDP2's code, not measured."""

TOKENIZER_BYTES = 8 << 20
"""Tokenizer and small files beside an adapter or a merged model."""


@dataclass(frozen=True)
class Workload:
    """A run by its numbers: the planner needs no config."""

    shape: ModelShape
    quantization: Quantization
    element_bytes: int
    """Of the base's dtype, and of the activations."""
    adapted: Adapted
    adapter_parameters: int
    optimizer: OptimizerName
    batch_size: int
    micro_batch_size: Literal["auto"] | int
    checkpointing: Literal["auto"] | bool
    rows: RowSizes
    trained_ratio: float
    """Share of the tokens that carry a label."""
    steps: int | None = None
    """Optimizer steps; None if they are not known."""
    num_tokens: int | None = None
    """That all steps train on together; None if they are not known."""
    num_lengths: int | None = None
    """Different lengths among the rows; None if they are not known."""
    kept_state_bytes: int = 0
    """Hidden states of the base that `protect.kl_to_base` keeps."""
    state_numbers: int = 0
    """Float32 numbers that the adapter method keeps for each trained one."""
    shards: int = 1
    """Devices that have a part each of the base's layers."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak by component, and the micro-batch that it is for."""

    components: Mapping[str, int]
    """Bytes by name, in the order they are shown."""
    base: Mapping[str, int]
    """The component `base`, by how it is kept."""
    tokens: int
    """Of the largest micro-batch."""
    recomputed_layers: int
    layers: int
    bytes_a_token: float
    """With this many layers recomputed, workspace included."""
    memory_bytes: int
    """What the device has."""
    notice: str | None = None
    """What the user should know of it before starting."""

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all components."""
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        """Say whether the memory is enough."""
        return self.total_bytes <= self.memory_bytes


def estimate_memory(work: Workload, device_type: str, memory_bytes: int) -> MemoryEstimate:
    """Estimate the peak of training on a device with this much memory, and choose what fits.

    The choice is training's own (`plan_memory`) on the computed instead of the measured cost.
    """
    base = base_bytes(work.shape, work.quantization, work.element_bytes)
    if work.shards > 1:
        layers = work.shape.layer_parameters * work.element_bytes
        (name,) = base  # a quantized base is not sharded
        base[name] -= layers - math.ceil(layers / work.shards)
    fixed = _fixed_components(work, base, device_type)
    cost = activation_cost(
        work.shape,
        work.adapted,
        element_bytes=work.element_bytes,
        trained_ratio=work.trained_ratio,
    )
    plan = plan_memory(
        cost,
        USABLE_SHARE * max(memory_bytes - sum(fixed.values()), 0),
        work.rows,
        useful_tokens=USEFUL_TOKENS[device_type],
        micro_batch_size=work.micro_batch_size,
        checkpointing=work.checkpointing,
    )
    tokens = _largest_tokens(work, plan)
    components = {**fixed, **_activation_components(cost, plan, tokens)}
    if work.rows.step <= tokens:
        # One micro-batch a step: gradients come while activations go.
        kept = sum(components[name] for name in ACTIVATIONS if name in components)
        components["gradients"] = max(fixed["gradients"] - kept, 0)
    notice = None
    if device_type == "cpu" and work.element_bytes < FLOAT32:
        num_sizes = count_sizes(work.shape, tokens, longest=work.rows.longest)
        notice = advise_capacity(num_sizes)
        components["compiled kernels"], components["dropped kernels"] = kernel_bytes(
            num_sizes,
            micro_batches=_count_micro_batches(work, tokens),
            num_lengths=work.num_lengths,
        )
    components["workspace"] = _workspace_bytes(components, device_type)
    return MemoryEstimate(
        components={name: size for name, size in components.items() if size},
        base=base,
        tokens=tokens,
        recomputed_layers=plan.recomputed_layers,
        layers=work.shape.layers,
        bytes_a_token=cost.bytes_a_token(plan.recomputed_layers),
        memory_bytes=memory_bytes,
        notice=notice,
    )


def _workspace_bytes(components: Mapping[str, int], device_type: str) -> int:
    """Return what is held beside what is used.

    A CPU: glibc 2.36 held 1.26 to 1.32 times what was allocated at the peaks of eleven steps of two
    NF4 runs, in which activations, kernels and gradients came and went. A GPU: temporaries of the
    backward pass and blocks that its allocator cannot reuse; assumed.
    """
    whole = {"runtime", "base", "dropped kernels"}
    if device_type != "cpu":
        whole = set(components) - set(ACTIVATIONS)
    varying = sum(size for name, size in components.items() if name not in whole)
    return round((WORKSPACE_FACTOR - 1) * varying)


def _count_micro_batches(work: Workload, tokens: int) -> int | None:
    """Return how many micro-batches run, with the dry run's; None if steps are not known."""
    if work.steps is None or work.num_tokens is None:
        return None
    return 1 + max(work.steps, math.ceil(work.num_tokens / tokens))


def _largest_tokens(work: Workload, plan: MemoryPlan) -> int:
    if plan.limits.rows is None:
        return min(plan.limits.tokens, work.rows.step)
    return min(plan.limits.rows, work.batch_size) * work.rows.longest


def _fixed_components(work: Workload, base: Mapping[str, int], device_type: str) -> dict[str, int]:
    """Return what is there whatever the micro-batch."""
    shape, b = work.shape, work.element_bytes
    copies = b if work.adapted.is_fused else 0
    components = {
        "runtime": RUNTIME_BYTES[device_type],
        "base": sum(base.values()),
        **trained_bytes(work.adapter_parameters, work.optimizer, copy_bytes=copies),
        "merged experts": merged_expert_bytes(shape, work.adapted, b),
        "LM head chunk": _head_chunk_bytes(shape, b, device_type),
        "dequantization": _dequantization_bytes(work),
        "the base's states": work.kept_state_bytes,
        "gathered layers": _gathered_bytes(work),
        "scores": FLOAT32 * work.state_numbers * work.adapter_parameters,
    }
    return {name: size for name, size in components.items() if size}


def _gathered_bytes(work: Workload) -> int:
    """Return what is whole for a moment: the layer that runs, the next one, and its buffer."""
    if work.shards == 1:
        return 0
    layer = work.shape.layer_parameters * work.element_bytes / work.shape.layers
    return round(GATHERED_LAYERS * layer)


def _head_chunk_bytes(shape: ModelShape, element_bytes: int, device_type: str) -> int:
    """Return the logits of a chunk, and their float32 copy: a tile on a CPU, whole on a GPU."""
    logits = HEAD_CHUNK * shape.vocabulary
    copy = HEAD_TILE_BYTES if device_type == "cpu" else 2 * FLOAT32 * logits
    return element_bytes * logits + copy


def _dequantization_bytes(work: Workload) -> int:
    """Return the largest weight made dense, by quantization or by the adapter method."""
    largest = work.shape.largest_linear
    if work.adapted.dense_copies:
        return work.adapted.dense_copies * FLOAT32 * largest
    return work.element_bytes * largest if work.quantization.is_quantized else 0


def _activation_components(cost: ActivationCost, plan: MemoryPlan, tokens: int) -> dict[str, int]:
    recomputed = plan.recomputed_layers
    kept = (cost.layers - recomputed) * cost.layer_bytes + cost.other_bytes
    kept_name, recomputed_name = ACTIVATIONS
    components = {kept_name: round(kept * tokens)}
    if recomputed:
        once = cost.layer_bytes + recomputed * cost.recomputed_layer_bytes
        components[recomputed_name] = round(once * tokens)
    return components


def base_bytes(shape: ModelShape, quantization: Quantization, element_bytes: int) -> dict[str, int]:
    """Return the base's bytes by how they are kept: {"nf4": .., "bfloat16": ..} and the like.

    Quantized are the linear layers; embeddings, LM head, norms, biases, routers and fused experts
    stay in the model's dtype (`element_bytes`).
    """
    name = {2: "16-bit", 4: "float32"}[element_bytes]
    rest = shape.num_parameters - shape.linear_parameters
    if not quantization.is_quantized:
        return {name: shape.num_parameters * element_bytes}
    stored = sum(quantization.stored_bytes(size) for size in shape.linear.values())
    return {quantization.method: stored, name: rest * element_bytes}


def trained_bytes(
    adapter_parameters: int, optimizer: OptimizerName, *, copy_bytes: int
) -> Mapping[str, int]:
    """Return what training adds for float32 adapter weights.

    `copy_bytes` are those of an element of the copies that fused linears compute with; 0 without.
    """
    return {
        "adapter": FLOAT32 * adapter_parameters,
        "gradients": FLOAT32 * adapter_parameters,
        "optimizer": round(OPTIMIZERS[optimizer].state_bytes * adapter_parameters),
        "adapter copies": copy_bytes * adapter_parameters,
    }


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes a run writes, by what they are, and what is free where it writes."""

    components: Mapping[str, int]
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all components."""
        return sum(self.components.values())

    @property
    def fits(self) -> bool:
        """Say whether the free space is enough."""
        return self.total_bytes <= self.free_bytes


def estimate_disk(
    train: TrainConfig, *, adapter_parameters: int, merged_bytes: int, run_dir: Path
) -> DiskEstimate:
    """Estimate checkpoints, adapter and merged model.

    One checkpoint more than are kept exists while it is written, and another with early stopping.
    """
    checkpoint = adapter_parameters * (FLOAT32 + OPTIMIZERS[train.optimizer].state_bytes)
    kept = train.keep_checkpoints + 1 + (1 if train.early_stopping else 0)
    place = run_dir.absolute()
    while not place.exists():
        place = place.parent
    return DiskEstimate(
        {
            "checkpoints": round(kept * checkpoint),
            "adapter": FLOAT32 * adapter_parameters + TOKENIZER_BYTES,
            "merged model": merged_bytes + TOKENIZER_BYTES,
        },
        shutil.disk_usage(place).free,
    )
