"""What a token's activations cost, measured, and the memory there is and was used."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from llmtune.io.environment import peak_memory_bytes
from llmtune.models.live import is_sharded
from llmtune.training.memory.arithmetic import USABLE_SHARE, ActivationCost


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
        self._counted = {_storage(tensor) for tensor in tensors if not is_sharded(tensor)}
        # Holding the tensors keeps their addresses from being used twice.
        self._held: list[Tensor] = []
        self._depth = 0
        self.layer_bytes = 0
        self.other_bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        # A node that saves its own output would own itself if it got the output back, for good.
        tensor = tensor.detach()
        if tensor.is_sparse:  # it has no storage of its own
            for part in (tensor._indices(), tensor._values()):
                self.note(part)
            return tensor
        storage = _storage(tensor)
        if storage not in self._counted:
            self._counted.add(storage)
            self._held.append(tensor)
            if self._depth:
                self.layer_bytes += tensor.untyped_storage().nbytes()
            else:
                self.other_bytes += tensor.untyped_storage().nbytes()
        return tensor

    @contextmanager
    def inside(self, layers: list[nn.Module]) -> Iterator[None]:
        """Tell what is saved inside a layer from the rest."""

        def enter(module: nn.Module, _inputs: tuple[Any, ...]) -> None:
            self._depth += 1
            # a sharded layer has whole weights now; their storage stays theirs when it is emptied
            self._counted.update(_storage(parameter) for parameter in module.parameters())

        def leave(_module: nn.Module, _inputs: tuple[Any, ...], _output: object) -> None:
            self._depth -= 1

        handles = [layer.register_forward_pre_hook(enter) for layer in layers]
        handles += [layer.register_forward_hook(leave) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _storage(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from any other, also from one at the same address."""
    number: int = tensor.untyped_storage()._cdata
    return number


def available_bytes(device: torch.device, num_here: int = 1) -> float:
    """Return the bytes that activations may take on a device now.

    The computer's memory is shared by `num_here` processes; each has a GPU of its own.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return USABLE_SHARE * float(free + cached)
    free = min(float(psutil.virtual_memory().available), _container_bytes())
    return USABLE_SHARE * free / num_here


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: allocated on a GPU, resident (with loading) on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory_bytes()


def _container_bytes() -> float:
    """Return what a container's memory limit leaves free; infinity without a limit."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = float((root / "memory.current").read_text())
        return float("inf") if limit == "max" else float(limit) - used
    except (OSError, ValueError):
        return float("inf")
