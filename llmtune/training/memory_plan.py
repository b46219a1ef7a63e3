"""What a token's activations cost, measured, and how much may go through the model at once."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from llmtune.training.batch import BatchLimits

# More tokens at once than this gain nothing: the products are large enough to run at full speed.
USEFUL_TOKENS = {"cpu": 4096, "cuda": 16384}
USABLE_SHARE = 0.8
WORKSPACE_FACTOR = 1.3
UNLIMITED_TOKENS = 2**62
UNLIMITED = BatchLimits(None, UNLIMITED_TOKENS)


@dataclass(frozen=True)
class ActivationCost:
    """Bytes that a token holds from its forward to its backward pass."""

    layers: int
    layer_bytes: float
    """One layer that keeps its activations, per token."""
    recomputed_layer_bytes: float
    """One layer that recomputes them, per token."""
    other_bytes: float
    """Everything outside the layers, per token."""

    def bytes_a_token(self, recomputed: int) -> float:
        """Return the bytes a token holds with `recomputed` layers recomputed, workspace included.

        While a recomputed layer runs backward its own activations exist once.
        """
        kept = self.layers - recomputed + min(recomputed, 1)
        layers = kept * self.layer_bytes + recomputed * self.recomputed_layer_bytes
        return WORKSPACE_FACTOR * (layers + self.other_bytes)


@dataclass(frozen=True)
class RowSizes:
    """The lengths that matter: of the longest row, and of the largest optimizer step (tokens)."""

    longest: int
    step: int


@dataclass(frozen=True)
class MemoryPlan:
    """How much goes through the model at once, and how many layers are recomputed."""

    limits: BatchLimits
    recomputed_layers: int
    needed_bytes: float


def plan_memory(
    cost: ActivationCost,
    available: float,
    sizes: RowSizes,
    *,
    useful_tokens: int,
    micro_batch_size: Literal["auto"] | int,
    checkpointing: Literal["auto"] | bool,
) -> MemoryPlan:
    """Choose the tokens of a micro-batch and the number of recomputed layers.

    Args:
        cost: what a token costs.
        available: bytes that activations may take.
        sizes: how long the rows are.
        useful_tokens: more at once than this gains nothing (see `USEFUL_TOKENS`).
        micro_batch_size: rows at once, or "auto".
        checkpointing: recompute all layers, none, or ("auto") as few as fit.

    Returns:
        The plan; what does not fit even with every layer recomputed is found by the rehearsal.
    """
    if micro_batch_size == "auto":
        wanted = max(sizes.longest, min(useful_tokens, sizes.step))
        # Rather smaller micro-batches than recomputation, down to a quarter of the useful size.
        tolerable = max(sizes.longest, min(wanted, useful_tokens // 4))
    else:
        wanted = tolerable = micro_batch_size * sizes.longest
    recomputed = cost.layers if checkpointing else 0
    if checkpointing == "auto":
        fitting = (
            count
            for count in range(cost.layers)
            if cost.bytes_a_token(count) * tolerable <= available
        )
        recomputed = next(fitting, cost.layers)
    per_token = cost.bytes_a_token(recomputed)
    if micro_batch_size != "auto":
        limits = BatchLimits(micro_batch_size, UNLIMITED_TOKENS)
        return MemoryPlan(limits, recomputed, per_token * wanted)
    tokens = max(sizes.longest, min(wanted, int(available / per_token)))
    return MemoryPlan(BatchLimits(None, tokens), recomputed, per_token * tokens)


def shrink_plan(
    plan: MemoryPlan, cost: ActivationCost, longest: int, checkpointing: Literal["auto"] | bool
) -> MemoryPlan | None:
    """Return the next smaller plan after one did not fit, or None if there is none.

    Half the tokens, down to the longest row; then, if it is left to us, every layer recomputed.
    """
    tokens, recomputed = plan.limits.tokens, plan.recomputed_layers
    if plan.limits.rows is None and tokens > longest:
        tokens = max(longest, tokens // 2)
    elif checkpointing == "auto" and recomputed < cost.layers:
        recomputed = cost.layers
    else:
        return None
    planned_tokens = plan.needed_bytes / cost.bytes_a_token(plan.recomputed_layers)
    needed = cost.bytes_a_token(recomputed) * min(tokens, planned_tokens)
    return MemoryPlan(BatchLimits(plan.limits.rows, tokens), recomputed, needed)


def measure_activations(
    model: nn.Module, layers: list[nn.Module], run_forward: Callable[[], Tensor], tokens: int
) -> ActivationCost:
    """Count the bytes that autograd keeps for a forward pass of `tokens` tokens.

    `layers` are those that could be recomputed; each would then keep only its input.
    """
    saved = _SavedBytes(model)
    with (
        saved.inside(layers),
        torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor),
    ):
        run_forward()
    embedding = model.get_input_embeddings().weight
    return ActivationCost(
        layers=len(layers),
        layer_bytes=saved.layer_bytes / max(len(layers), 1) / tokens,
        recomputed_layer_bytes=embedding.shape[1] * embedding.element_size(),
        other_bytes=saved.other_bytes / tokens,
    )


class _SavedBytes:
    """Adds up the storages that autograd saves, each once, weights and buffers never."""

    def __init__(self, model: nn.Module) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._counted = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        # Holding the tensors keeps their addresses from being used twice.
        self._held: list[Tensor] = []
        self._depth = 0
        self.layer_bytes = 0
        self.other_bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._counted:
            self._counted.add(storage.data_ptr())
            self._held.append(tensor)
            if self._depth:
                self.layer_bytes += storage.nbytes()
            else:
                self.other_bytes += storage.nbytes()
        return tensor

    @contextmanager
    def inside(self, layers: list[nn.Module]) -> Iterator[None]:
        """Tell what is saved inside a layer from the rest."""

        def enter(_module: nn.Module, _inputs: tuple) -> None:
            self._depth += 1

        def leave(_module: nn.Module, _inputs: tuple, _output: object) -> None:
            self._depth -= 1

        handles = [layer.register_forward_pre_hook(enter) for layer in layers]
        handles += [layer.register_forward_hook(leave) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def available_bytes(device: torch.device) -> float:
    """Return the bytes that activations may take on a device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return USABLE_SHARE * (free + cached)
    return USABLE_SHARE * min(psutil.virtual_memory().available, _container_bytes())


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: allocated on a GPU, resident (with loading) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _container_bytes() -> float:
    """Return what a container's memory limit leaves free; infinity without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = float((root / "memory.current").read_text())
        return float("inf") if limit == "max" else float(limit) - used
    except (OSError, ValueError):
        return float("inf")
