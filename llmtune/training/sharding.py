"""A base that is larger than a card: each process keeps a part of every layer (FSDP2).

Before a layer runs, forward or backward, the processes put its weights together, and drop them
again after it. So every forward pass is one that all processes do at the same moment: a process
that has fewer micro-batches than another runs on a few tokens that count for nothing. What is
outside of the layers (embeddings, LM head, last norm) and the adapter are whole in every process,
as they are without sharding; the adapter's gradients are added up by `Reduction`.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from llmtune.data.example import Example
from llmtune.errors import LlmtuneError
from llmtune.io.processes import Processes
from llmtune.io.sizes import format_size
from llmtune.models.decoder import decoder_of
from llmtune.models.live import is_sharded
from llmtune.training.batch import StepCollator
from llmtune.training.memory.dry_run import recomputable_layers
from llmtune.training.objectives.base import MicroBatch

NO_LAYER = -1
"""What ends the lending."""
IDLE_TOKENS = 8
"""Tokens that a process without work runs on."""


@dataclass(frozen=True)
class ShardTable:
    """Bytes of the base by where they are."""

    num_layers: int
    layer_bytes: int
    """Of all layers, over all processes."""
    own_bytes: int
    """Of all layers, in this process."""
    whole_bytes: int
    """Of what every process has."""

    def describe(self, world_size: int) -> str:
        """Return it in words."""
        return (
            f"shard: {format_size(self.own_bytes)} of the {format_size(self.layer_bytes)} in "
            f"{self.num_layers} layers are in each of {world_size} processes, and "
            f"{format_size(self.whole_bytes)} of embeddings and the like in every one"
        )


def shard_base(
    model: PeftModel | PreTrainedModel,
    device: torch.device,
    processes: Processes,
    base: Collection[nn.Parameter] | None = None,
) -> ShardTable:
    """Cut the layers of the frozen base over the processes, one by one, and move all to `device`.

    Args:
        model: with or without an adapter; the base's weights may be mapped from their files.
        device: where this process computes.
        processes: connected; all of them call this.
        base: the base's own weights; None is those that are not trained.

    Raises:
        LlmtuneError: the architecture or the adapter is one whose layers cannot be cut, or this
            process's part does not fit on `device`.
    """
    decoder = decoder_of(_base_of(model))
    layers = _layers_to_shard(model, decoder)
    if base is None:
        base = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    adapter = set(model.parameters()) - set(base)
    mesh = init_device_mesh(device.type, (processes.world_size,))
    with _too_large_is_an_error(device, processes.world_size):
        for layer in layers:
            # what is outside of the layers' own parameters must not be moved or cut with them
            own = adapter.intersection(layer.parameters())
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=own)
        # The root of all layers has no parameters of its own: it lets the next layer be fetched
        # early.
        fully_shard(decoder, mesh=mesh, ignored_params=set(_whole(decoder)))
        for tensor in (*_whole(model), *model.buffers()):
            tensor.data = tensor.data.to(device)
    cut = [parameter for parameter in model.parameters() if is_sharded(parameter)]
    whole = [parameter for parameter in _whole(model) if parameter not in adapter]
    return ShardTable(
        num_layers=len(layers),
        layer_bytes=sum(parameter.nbytes for parameter in cut),
        own_bytes=sum(parameter.to_local().nbytes for parameter in cut),
        whole_bytes=sum(parameter.nbytes for parameter in whole),
    )


def cut_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that `shard_base` has cut, in their order."""
    cut = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return cut[1:]  # the first one is the decoder, the root of all layers


@contextmanager
def borrowing(model: nn.Module, processes: Processes) -> Iterator[None]:
    """Let the first process alone run the model inside, while the others are in `lend`.

    Before a layer runs it says which; the others bring their parts of it together with its own.
    """

    def ask(number: int, layer: FSDPModule, _: object) -> None:
        layer.reshard()  # whole still if memory ran out in the last pass
        processes.copy_first(torch.tensor([number]))

    hooks = [
        layer.register_forward_pre_hook(partial(ask, number), prepend=True)
        for number, layer in enumerate(cut_layers(model))
    ]
    del model  # whoever has it inside may let go of it
    yield  # after an error the process ends, and the others with it
    for hook in hooks:
        hook.remove()
    processes.copy_first(torch.tensor([NO_LAYER]))


def lend(model: nn.Module, processes: Processes) -> None:
    """Lend this process's part of every layer that the first one asks for, until it is done."""
    layers, wanted = cut_layers(model), torch.tensor([NO_LAYER])
    while True:
        processes.copy_first(wanted)
        if wanted.item() == NO_LAYER:
            return
        layer: Any = layers[int(wanted)]
        layer.unshard()
        layer.reshard()


@contextmanager
def _too_large_is_an_error(device: torch.device, world_size: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise LlmtuneError(
            f"train.shard=full: the base does not fit into the memory of {device}: 1/{world_size} "
            "of its layers, one whole layer, and all of its embeddings. Start more processes, "
            "choose a smaller base, or free the GPU."
        ) from error


def _base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def _whole(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in module.parameters() if not is_sharded(parameter))


def _layers_to_shard(model: PeftModel | PreTrainedModel, decoder: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers, none of them inside of another."""
    inside: set[nn.Module] = set()
    layers: list[nn.Module] = []
    within = set(decoder.modules())
    for layer in recomputable_layers(model):  # outer ones come first
        if layer in within and layer not in inside:
            layers.append(layer)
            inside.update(layer.modules())
    name = type(_base_of(model)).__name__
    if not layers:
        raise LlmtuneError(
            f"train.shard=full: {name} does not say what its layers are, so the base cannot be cut "
            "layer by layer; set train.shard=none"
        )
    for layer in layers:
        for part in layer.modules():
            if isinstance(part, ParamWrapper | AuxiliaryTrainingWrapper):
                raise LlmtuneError(
                    "train.shard=full cuts the layers' linear weights under an adapter, and not "
                    "fused experts or modules that are trained whole: leave them out of "
                    "adapter.target_modules and adapter.modules_to_save, or set train.shard=none"
                )
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    rest = (module for module in model.modules() if module not in inside)
    outside = {parameter for module in rest for parameter in module.parameters(recurse=False)}
    shared = len(parameters) != len(set(parameters)) or bool(outside & set(parameters))
    scalars = any(not parameter.dim() for parameter in parameters)
    if shared or scalars:
        reason = "its layers share weights" if shared else "a layer has a weight that is one number"
        raise LlmtuneError(
            f"train.shard=full: {name} cannot be cut layer by layer: {reason}; set train.shard=none"
        )
    return layers


def idle_micro_batch(collator: StepCollator) -> MicroBatch:
    """Return a few tokens for a process that has no work while others run a forward pass."""
    row = collator.examples[0]
    ids = row.input_ids[:IDLE_TOKENS]
    return collator.build([Example(ids, ids, row.source, row.line)])
