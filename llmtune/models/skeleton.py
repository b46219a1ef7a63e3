"""The model that a checkpoint is loaded into, without any weights, to ask it what it is made of."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import blamed_on
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint
from llmtune.models.probing import ProbeFailedError, probing
from llmtune.models.quiet import quiet_loading

READER = "the installed transformers"
READ_MARK = "_is_hf_initialized"
"""What transformers sets on a module and a parameter that were read from a file."""


def require_known_code(where: str, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Check that there is code for the model that a config.json describes, and that it may run.

    Raises:
        LlmtuneError: begins with `where`, and says what to do.
    """
    model_type = config.get("model_type")
    if model_type in CONFIG_MAPPING:
        return
    if "auto_map" not in config:
        raise LlmtuneError(
            f"{where}: model type {model_type!r} is unknown to the installed transformers. Upgrade "
            "it, or choose another base."
        )
    if not trust_remote_code:
        raise LlmtuneError(
            f"{where}: model type {model_type!r} needs the Python code that comes with the model. "
            "If you have read it and trust it, set model.trust_remote_code=true."
        )


def build_skeleton(
    source: Checkpoint, *, trust_remote_code: bool = False
) -> PreTrainedModel | None:
    """Return the checkpoint's model on the meta device.

    None if its code is not transformers' own, and not trusted.

    Raises:
        LlmtuneError: config.json does not describe a model that transformers can build.
    """
    if source.model_type not in CONFIG_MAPPING and not trust_remote_code:
        return None
    remote = {"trust_remote_code": trust_remote_code}
    with (
        blamed_on(source.directory / CONFIG_NAME, READER),
        quiet_loading(),
        torch.device("meta"),
    ):
        config = AutoConfig.from_pretrained(str(source.directory), local_files_only=True, **remote)
        config.quantization_config = None
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **remote)
        return model


@dataclass(frozen=True)
class StoredNames:
    """Where transformers finds a model's parameters in a checkpoint."""

    renamed: Mapping[str, str]
    """{parameter in memory: the one tensor that is it}."""
    converted: Mapping[str, tuple[str, ...]]
    """{parameter in memory: the tensors that it is made of, or the one that is reshaped}."""
    interleaved: frozenset[str] = frozenset()
    """Stacked parameters whose two halves take turns, output by output, in the one tensor."""


def stored_names(skeleton: PreTrainedModel, checkpoint: Iterable[str]) -> StoredNames:
    """Say which tensors of a checkpoint are which parameters, as transformers loads them."""
    transforms: list[Any] = get_model_conversion_mapping(skeleton)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    parameters: dict[str, Any] = skeleton.state_dict()
    renamed: dict[str, str] = {}
    converted: dict[str, list[str]] = defaultdict(list)
    interleaved: set[str] = set()
    for tensor in checkpoint:
        name, conversion = rename_source_key(
            tensor, renamings, converters, skeleton.base_model_prefix, parameters
        )
        if conversion is None and name in parameters:
            renamed[name] = tensor
        elif conversion is not None:
            used = [one for one in converters if conversion in one.source_patterns]
            for made in _made_at_once(name, used, parameters):
                converted[made].append(tensor)
            if any(map(_interleaves, used)):
                interleaved.add(name)
    made_of = {name: tuple(parts) for name, parts in converted.items()}
    return StoredNames(renamed, made_of, frozenset(interleaved))


def _made_at_once(
    name: str, converters: Iterable[WeightConverter], parameters: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a parameter, the first of a conversion, and all others that it makes of one tensor."""
    yield name
    for converter in converters:
        first, *others = converter.target_patterns
        for other in others:
            made = name.replace(first, other)
            if made != name and made in parameters:
                yield made


def _interleaves(converter: WeightConverter) -> bool:
    """Whether all it does is to part rows that take turns, in each matrix of a stack."""
    names = [type(operation).__name__ for operation in converter.operations]
    if names != ["Interleave"]:
        return False
    (operation,) = converter.operations
    return (operation.dim, operation.inverse) == (1, False)


def parameter_of(skeleton: PreTrainedModel, module: torch.nn.Module | None) -> str | None:
    """Return the name of a module's weight; None without a module."""
    found = (name for name, other in skeleton.named_modules() if other is module)
    name = None if module is None else next(found, None)
    return None if name is None else f"{name}.weight"


def zeroed_rows(skeleton: PreTrainedModel) -> tuple[int, ...]:
    """Return the rows of the input embedding that loading sets to zero, whatever is stored.

    Some families initialize the padding row of a table that was already read (Youtu).
    """
    embedding = skeleton.get_input_embeddings()
    row = getattr(embedding, "padding_idx", None)
    if row is None:
        return ()
    table = torch.nn.Embedding(2, 1, padding_idx=1)
    torch.nn.init.ones_(table.weight)
    for loaded in (table, table.weight):
        setattr(loaded, READ_MARK, True)
    try:
        with probing():
            skeleton._init_weights(table)
    except ProbeFailedError:  # code of a model's own that wants more than a table
        return ()
    return () if bool(table.weight[1, 0]) else (row,)
