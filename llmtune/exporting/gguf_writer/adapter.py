"""Write a LoRA adapter as a GGUF file that llama.cpp applies on a GGUF of the same base."""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, GGUFWriter

from llmtune.adapters.update import Factors, Place
from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.architectures import (
    Architecture,
    Config,
    find_architecture,
    read_full_config,
)
from llmtune.exporting.gguf_writer.tensors import (
    SUFFIXES,
    PlannedTensor,
    Rows,
    rotary_heads,
    tensor_names,
)
from llmtune.exporting.gguf_writer.write import (
    GgufResult,
    check_file,
    write_tensors,
)
from llmtune.io.safetensors import TensorEntry
from llmtune.merging.adapter_files import AdapterFiles
from llmtune.merging.names import find_tensor
from llmtune.merging.plan import index_of
from llmtune.models.checkpoint import Checkpoint

LOW_RANK_TYPE = "lora"
"""What llama.cpp calls a pair of factors."""


def write_adapter_gguf(
    adapter_dir: Path, base: Checkpoint, path: Path, *, type: str, provenance: Mapping[str, str]
) -> GgufResult:
    """Write the adapter in `adapter_dir` as the GGUF file `path`.

    llama.cpp adds `alpha / rank * B @ A` with one alpha for all modules; where a module's scaling
    differs, its B is multiplied so that the product is the same.

    Args:
        adapter_dir: a LoRA adapter in PEFT's format.
        base: its base, for the architecture.
        path: the file to make.
        type: one of `ADAPTER_TYPES`.
        provenance: further text for the file's head, by key.

    Raises:
        LlmtuneError: it trains something other than plain LoRA of a linear layer, or the base has
            no layer of that shape, or llama.cpp does not support the base.
    """
    start = time.monotonic()
    architecture, config = find_architecture(base), read_full_config(base)
    adapter = AdapterFiles.open(adapter_dir)
    _refuse_more_than_factors(adapter)
    alpha = float(adapter.method.usual_alpha(adapter.config))
    _check_shapes(adapter, index_of(base).tensors)
    tensors = _plan(adapter, architecture, config, (type, alpha))
    writer = GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, LOW_RANK_TYPE)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, text in provenance.items():
        writer.add_string(key, text)
    write_tensors(writer, tensors)
    check_file(path, tensors, None)
    return GgufResult(
        path=path,
        architecture=architecture.name,
        pre_tokenizer="",
        type=type,
        num_tensors=len(tensors),
        tensor_types=dict(Counter(tensor.type.name.lower() for tensor in tensors)),
        num_bytes=path.stat().st_size,
        seconds=time.monotonic() - start,
        notices=(),
    )


def _refuse_more_than_factors(adapter: AdapterFiles) -> None:
    more = adapter.beside_factors()
    if not more:
        tables = [name for name in adapter.modules if adapter.factors(name).is_embedding]
        more = {"an embedding": tables[0]} if tables else {}
    if more:
        found = ", ".join(f"{kind} ({name})" for kind, name in more.items())
        raise LlmtuneError(
            f"{adapter.directory}: llama.cpp adapters hold LoRA of linear layers only, and this "
            f"one has {found}. Merge it and export the model: --to gguf"
        )


def _check_shapes(adapter: AdapterFiles, base: Mapping[str, TensorEntry]) -> None:
    """Check that every pair of factors fits its layer of the base, and has its config's rank.

    llama.cpp is not relied on to refuse what does not fit: it may read past a tensor's end.
    """
    for module, group in sorted(adapter.modules.items()):
        name = find_tensor(f"{module}.weight", base)
        if name is None:
            continue  # a tied head, or no such layer: refused when its place is looked for
        widths, shape = adapter.method.widths(group), base[name].shape
        if shape != (widths.num_out, widths.num_in):
            raise LlmtuneError(
                f"{adapter.directory}: the adapter of module {module!r} is for a weight of "
                f"{[widths.num_out, widths.num_in]}, and the base's {name!r} is {list(shape)}"
            )
        try:
            place = Place(module, shape[0], shape[1])
            adapter.method.plan_updates(group, place, adapter.config, 1.0)
        except ValueError as error:
            raise LlmtuneError(f"{adapter.directory}: {error}") from error


def _plan(
    adapter: AdapterFiles, architecture: Architecture, config: Config, how: tuple[str, float]
) -> list[PlannedTensor]:
    names = tensor_names(architecture, config)
    planned = []
    for module in sorted(adapter.modules):
        target = names.get_name(f"{module}.weight", try_suffixes=SUFFIXES)
        if target is None:
            raise LlmtuneError(
                f"{adapter.directory}: module {module!r} has no place in llama.cpp's "
                f"{architecture.name}"
            )
        if target == "output.weight" and config.get("tie_word_embeddings", False):
            raise LlmtuneError(
                f"{adapter.directory}: it adapts {module!r}, which this base shares with its "
                "embedding; merge it and export the model: --to gguf"
            )
        heads = rotary_heads(f"{module}.weight", architecture, config)
        factors = adapter.factors(module)
        factor = factors.scaling * factors.a.shape[0] / how[1]
        planned += _pair(target, factors, how[0], (heads, factor))
    return planned


def _pair(
    target: str, factors: Factors, type: str, layout: tuple[int, float]
) -> list[PlannedTensor]:
    heads, factor = layout
    kind = GGMLQuantizationType[type.upper()]
    rows_a, rows_b = Rows(factors.a, 0, factors.a.shape[0]), Rows(factors.b, 0, factors.b.shape[0])
    return [
        PlannedTensor(f"{target}.lora_a", factors.a.shape, kind, (rows_a,)),
        PlannedTensor(
            f"{target}.lora_b", factors.b.shape, kind, (rows_b,), rotary_heads=heads, factor=factor
        ),
    ]
