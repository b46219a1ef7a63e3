"""The plan of a whole merge: every adapter's part, the base as it is read, shard by shard."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.adapters.manifest import check_adapter, has_effect
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import STORED_FLOATS, CheckpointIndex
from llmtune.merging.adapter_files import AdapterFiles
from llmtune.merging.changes import (
    MergePlan,
    PlannedShard,
    PlannedTensor,
    Requantized,
    WeightedAdapter,
)
from llmtune.merging.config import Combination
from llmtune.merging.names import BaseNames, safetensors_name
from llmtune.merging.packed import PackedWeights, find_packed_weights
from llmtune.merging.planner import CONV1D_FAMILIES, FLOAT_DTYPES, Planner
from llmtune.merging.tied_embeddings import settle_ties
from llmtune.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from llmtune.models.quantization.describe import QuantizedBase


@dataclass(frozen=True)
class PlanOptions:
    """How the base is read and the merged model is written."""

    dtype: str | None = None
    """float32, float16 or bfloat16 for every weight; None keeps the base's own."""
    quantized: "QuantizedBase | None" = None
    """Take the weights it names as the quantized base computes with them."""
    allow_pickle: bool = False
    """Also read `pytorch_model*.bin`, through PyTorch's restricted unpickler."""
    trust_remote_code: bool = False
    """The base's own Python code may say what its parameters are called."""
    is_untrained: bool = False
    """The adapter has names and shapes only, to plan with."""
    base_name: str | None = None
    """What the merged model records as its base; None is the last part of the base's path."""
    base_revision: str | None = None


DEFAULT_OPTIONS = PlanOptions()


def plan_merge(
    checkpoint: Checkpoint,
    adapter_dir: Path,
    *,
    strength: float = 1.0,
    options: PlanOptions = DEFAULT_OPTIONS,
) -> MergePlan:
    """Plan the merge of an adapter into a base, reading no weights but those a tie depends on.

    Args:
        checkpoint: the base, in 16 or 32 bits or in bitsandbytes' 4 bits.
        adapter_dir: an adapter in PEFT's format.
        strength: how much of the adapter is added; 1 is all of it.
        options: how the base is read and the result written.

    Raises:
        LlmtuneError: a file is missing or malformed, the base is quantized in a way that cannot be
            read back or is not the one the adapter was trained on, the adapter is all zero, or
            some tensor of it has no place in the base.
    """
    return plan_combined_merge(
        checkpoint, [WeightedAdapter(adapter_dir, strength)], options=options
    )


def plan_combined_merge(
    checkpoint: Checkpoint,
    adapters: Sequence[WeightedAdapter],
    *,
    combination: Combination | None = None,
    options: PlanOptions = DEFAULT_OPTIONS,
) -> MergePlan:
    """Plan the merge of several adapters of one base, their deltas combined in the order given.

    Raises:
        LlmtuneError: as `plan_merge`; or two adapters change one tensor in ways that cannot be
            combined.
    """
    checkpoint.require_whole(allow_pickle=options.allow_pickle, allow_quantized=True)
    base_dir, config = checkpoint.directory, checkpoint.config
    base = index_of(checkpoint)
    packed = find_packed_weights(base, config)
    names = _ask_names(checkpoint, base, options)
    _refuse_packed_conv1d(base_dir, config, packed)
    notices: list[str] = []
    changed: dict[str, PlannedTensor] = {}
    for adapter in adapters:
        if not options.is_untrained:
            notices += check_adapter(adapter.directory, base_fingerprint=checkpoint.fingerprint)
        files = AdapterFiles.open(adapter.directory)
        needs_effect = adapter.weight and not options.is_untrained
        if needs_effect and not has_effect(adapter.directory):
            raise LlmtuneError(
                f"{adapter.directory} has no effect: its tensors are as they were before training, "
                "so the merged model would be the base; was the adapter trained?"
            )
        part = Planner(base, config, files, adapter.weight, packed, names).plan()
        changed = _overlay(changed, part, adapter.directory)
    if options.quantized is not None:
        changed = _requantize(base, changed, options.quantized, names)
    planned, config_changes = settle_ties(base, config, changed, names)
    shards = _shards(base, planned, packed)
    if options.dtype is not None:
        shards = tuple(_cast(shard, STORED_FLOATS[options.dtype]) for shard in shards)
    return MergePlan(
        base_dir=base_dir,
        adapters=tuple(adapters),
        shards=shards,
        index_metadata=base.index_metadata,
        base_fingerprint=checkpoint.fingerprint,
        notices=tuple(dict.fromkeys(notices)),
        config_changes=config_changes,
        base="dequantized" if options.quantized or packed.tensors else "original",
        round_trip=options.quantized.round_trip if options.quantized else None,
        combination=combination,
        base_name=options.base_name or base_dir.name,
        base_revision=options.base_revision,
    )


def index_of(checkpoint: Checkpoint) -> CheckpointIndex:
    """Return where each tensor of a base is, in safetensors or pickled."""
    if checkpoint.has_safetensors:
        return checkpoint.index
    from llmtune.merging.pickled import open_pickled  # torch, which other bases do not need

    return open_pickled(checkpoint.directory)


def _ask_names(checkpoint: Checkpoint, base: CheckpointIndex, options: PlanOptions) -> BaseNames:
    # transformers, which no reader needs
    from llmtune.models.skeleton import build_skeleton, require_known_code

    trusts = options.trust_remote_code
    require_known_code(str(checkpoint.directory), checkpoint.config, trust_remote_code=trusts)
    skeleton = build_skeleton(checkpoint, trust_remote_code=trusts)
    return BaseNames.ask(skeleton, base.tensors)


def _refuse_packed_conv1d(base_dir: Path, config: Mapping[str, Any], packed: PackedWeights) -> None:
    if packed.tensors and config.get("model_type") in CONV1D_FAMILIES:
        raise LlmtuneError(
            f"{base_dir}: a {config['model_type']} model stored in 4 bits has its weights "
            "transposed, which merging does not undo; give the 16-bit model with model.base=..."
        )


def _overlay(
    before: Mapping[str, PlannedTensor], added: Mapping[str, PlannedTensor], adapter_dir: Path
) -> dict[str, PlannedTensor]:
    """Add one adapter's changes to those of the adapters before it.

    Deltas of one tensor are kept side by side, in this order. A tensor that only one
    adapter changes may be changed in any way.

    Raises:
        LlmtuneError: a tensor is changed by two adapters, and one of the changes is not a plain
            delta.
    """
    result = dict(before)
    for name, tensor in added.items():
        other = result.get(name)
        result[name] = tensor if other is None else _join(other, tensor, adapter_dir)
    return result


def _join(one: PlannedTensor, other: PlannedTensor, adapter_dir: Path) -> PlannedTensor:
    for tensor in (one, other):
        if not tensor.is_additive or one.source != other.source:
            raise LlmtuneError(
                f"{adapter_dir}: it and an adapter before it both change {one.name!r}, one of them "
                f"not as a plain delta ({tensor.change}); such adapters cannot be combined"
            )
    places = [(block.first_row, block.num_rows) for block in one.blocks]
    if places != [(block.first_row, block.num_rows) for block in other.blocks]:
        raise LlmtuneError(
            f"{adapter_dir}: it and an adapter before it cut {one.name!r} differently; they cannot "
            "be combined"
        )
    blocks = tuple(
        replace(first, updates=first.updates + second.updates)
        for first, second in zip(one.blocks, other.blocks, strict=True)
    )
    return replace(one, blocks=blocks)


def _requantize(
    base: CheckpointIndex,
    changed: Mapping[str, PlannedTensor],
    quantized: "QuantizedBase",
    names: BaseNames,
) -> dict[str, PlannedTensor]:
    """Mark every weight that the quantized model holds in few bits, changed or not."""
    marked = dict(changed)
    for parameter, is_transposed in quantized.weights.items():
        name = names.find(parameter)
        if name is None:
            raise LlmtuneError(
                f"{base.directory}: {parameter!r}, which {quantized.method} quantizes, is no "
                "single tensor in the checkpoint; use merge.base=original"
            )
        entry = base.tensors[name]
        planned = marked.get(name) or PlannedTensor(name, entry.dtype, entry.shape, entry)
        if entry in (planned.source, planned.blend_base):
            marked[name] = replace(planned, dequantized=Requantized(is_transposed))
    return marked


def _shards(
    base: CheckpointIndex, planned: Mapping[str, PlannedTensor], packed: PackedWeights
) -> tuple[PlannedShard, ...]:
    shards = []
    left = {**packed.tensors, **planned}
    for shard in base.shards:
        tensors = [
            left.pop(entry.name)
            if entry.name in left
            else PlannedTensor(entry.name, entry.dtype, entry.shape, entry)
            for entry in shard.tensors
            if entry.name not in packed.state_names
        ]
        if shard is base.shards[-1]:
            tensors += left.values()
        shards.append(PlannedShard(safetensors_name(shard.path.name), shard, tuple(tensors)))
    return tuple(shards)


def _cast(shard: PlannedShard, dtype: str) -> PlannedShard:
    tensors = tuple(
        replace(tensor, dtype=dtype) if tensor.dtype in FLOAT_DTYPES else tensor
        for tensor in shard.tensors
    )
    return replace(shard, tensors=tensors)
