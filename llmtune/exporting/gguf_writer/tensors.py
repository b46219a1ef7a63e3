"""Plan a GGUF file's tensors from safetensors headers: what goes where, as which type."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.architectures import (
    Architecture,
    Config,
    rope_factors,
)
from llmtune.io.safetensors import TensorEntry
from llmtune.models.checkpoint import Checkpoint

EXPERT = re.compile(r"\.experts\.(\d+)\.")
FUSED_EXPERTS = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
ROTATED = re.compile(r"\.self_attn\.([qk])_proj\.(weight|bias)$")
SUFFIXES = (".weight", ".bias")
READABLE = ("F32", "F16", "BF16")
SMALL_TYPES = frozenset({"q4_0", "q4_1", "q5_0", "q5_1"})
ROPE_FACTORS = "rope_freqs.weight"
OUTER = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Rows:
    """A run of rows of one stored tensor, seen as [rows, columns]."""

    entry: TensorEntry
    first: int
    count: int


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file: the stored rows it is made of, and what is done to them."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    sources: tuple[Rows, ...]
    rotary_heads: int = 0
    """The rows of each of this many heads go from two halves to neighboring pairs."""
    factor: float = 1.0
    """Every number is multiplied by it, then `offset` is added."""
    offset: float = 0.0
    values: np.ndarray | None = None
    """A computed tensor, which has no sources."""

    @property
    def num_columns(self) -> int:
        """Return the length of a row."""
        return self.shape[-1]

    @property
    def num_bytes(self) -> int:
        """What it takes in the file."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return int(rows * (self.num_columns // block) * block_bytes)


def plan_tensors(
    source: Checkpoint, architecture: Architecture, config: Config, type: str
) -> list[PlannedTensor]:
    """Give every tensor of the checkpoint its place, name and type in the file.

    Vectors, norms and routers stay float32. With a 4- or 5-bit type the embedding and the output
    are q8_0, as llama.cpp keeps them better too. A matrix whose rows are not a multiple of a block
    becomes f16.

    Raises:
        LlmtuneError: a tensor has no place in this architecture, or a dtype that cannot be read.
    """
    directory, index = source.directory, source.index
    groups = _group(index.tensors, config)
    names = tensor_names(architecture, config)
    planned, unplaced = [], []
    for name, sources in sorted(groups.items(), key=lambda item: _order(item[0])):
        target = names.get_name(name, try_suffixes=SUFFIXES)
        if target is None:
            unplaced.append(name)
        else:
            planned.append(_plan_one(name, target, sources, (architecture, config, type)))
    if unplaced:
        raise LlmtuneError(
            f"{directory}: {len(unplaced)} tensors have no place in llama.cpp's "
            f"{architecture.name}, such as {unplaced[0]!r}; the model cannot be exported to GGUF"
        )
    factors = rope_factors(config)
    if factors is not None:
        values = np.array(factors, dtype=np.float32)
        planned.append(_computed(ROPE_FACTORS, values))
    _check_complete(directory, planned, architecture, config)
    return planned


def _computed(name: str, values: np.ndarray) -> PlannedTensor:
    return PlannedTensor(name, values.shape, GGMLQuantizationType.F32, (), values=values)


def tensor_names(architecture: Architecture, config: Config) -> gguf.TensorNameMap:
    """Return the official map from transformers' tensor names to those of the file."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    return gguf.get_tensor_name_map(arch, config["num_hidden_layers"])


def rotary_heads(name: str, architecture: Architecture, config: Config) -> int:
    """Return how many heads' rows must be paired in the weight `name`, or 0."""
    rotated = ROTATED.search(name)
    if not architecture.pairs_rotary or rotated is None:
        return 0
    heads = int(config["num_attention_heads"])
    return int(config.get("num_key_value_heads") or heads) if rotated[1] == "k" else heads


def _group(tensors: Mapping[str, TensorEntry], config: Config) -> dict[str, list[Rows]]:
    """Put the experts of a layer together, and cut fused gate and up projections apart."""
    groups: dict[str, list[Rows]] = defaultdict(list)
    is_tied = config.get("tie_word_embeddings", False)
    for name, entry in sorted(tensors.items(), key=lambda item: _order(item[0])):
        if is_tied and name == "lm_head.weight":
            continue  # a copy of the embedding, which llama.cpp uses for both
        if name.endswith(".rotary_emb.inv_freq"):
            continue  # old checkpoints store what is computed from the config
        if entry.dtype not in READABLE:
            raise LlmtuneError(
                f"{entry.path}: {name} is {entry.dtype}; expected one of {', '.join(READABLE)}"
            )
        fused = FUSED_EXPERTS.match(name)
        if fused:
            for part, rows in _split_fused(fused[2], entry):
                groups[f"{fused[1]}.{part}.weight"] += rows
        else:
            groups[EXPERT.sub(".experts.", name)].append(Rows(entry, 0, _num_rows(entry)))
    return groups


def _split_fused(kind: str, entry: TensorEntry) -> Iterable[tuple[str, list[Rows]]]:
    """Cut [expert, 2 x width, hidden] into gate and up; [expert, hidden, width] is whole."""
    experts, rows, _ = entry.shape
    if kind == "down_proj":
        yield "down_proj", [Rows(entry, expert * rows, rows) for expert in range(experts)]
        return
    half = rows // 2
    for place, part in enumerate(("gate_proj", "up_proj")):
        starts = [expert * rows + place * half for expert in range(experts)]
        yield part, [Rows(entry, start, half) for start in starts]


def _plan_one(
    name: str, target: str, sources: list[Rows], model: tuple[Architecture, Config, str]
) -> PlannedTensor:
    architecture, config, type = model
    shape = _shape(target, sources)
    is_norm = "norm" in target and target.endswith(".weight")
    return PlannedTensor(
        name=target,
        shape=shape,
        type=choose_tensor_type(target, shape, type),
        sources=tuple(sources),
        rotary_heads=rotary_heads(name, architecture, config),
        offset=architecture.norm_offset if is_norm else 0.0,
    )


def choose_tensor_type(name: str, shape: tuple[int, ...], type: str) -> GGMLQuantizationType:
    """Return the type of one tensor in a file of `type`; see `plan_tensors`."""
    if len(shape) == 1 or "norm" in name or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    chosen = GGMLQuantizationType[
        ("q8_0" if name in OUTER and type in SMALL_TYPES else type).upper()
    ]
    block, _ = gguf.GGML_QUANT_SIZES[chosen]
    return chosen if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _shape(target: str, sources: list[Rows]) -> tuple[int, ...]:
    first = sources[0]
    if len(first.entry.shape) == 1:
        return first.entry.shape
    columns = first.entry.shape[-1]
    if "_exps." in target:
        return (len(sources), first.count, columns)
    assert len(sources) == 1, target
    return (first.count, columns)


def _num_rows(entry: TensorEntry) -> int:
    return int(np.prod(entry.shape[:-1], dtype=np.int64)) if len(entry.shape) > 1 else 1


def _order(name: str) -> tuple[list[tuple[int, int | str]], str]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(part)) if part.isdigit() else (0, part) for part in parts], name


def _check_complete(
    directory: Path, planned: list[PlannedTensor], architecture: Architecture, config: Config
) -> None:
    """Check that no layer and no expert is missing; llama.cpp's own message names neither."""
    layers: dict[str, set[int]] = defaultdict(set)
    for tensor in planned:
        found = re.match(r"blk\.(\d+)\.(.*)", tensor.name)
        if found:
            layers[found[2]].add(int(found[1]))
        experts = config.get("num_local_experts") or config.get("num_experts")
        if "_exps." in tensor.name and tensor.shape[0] != experts:
            raise LlmtuneError(
                f"{directory}: {tensor.name} has {tensor.shape[0]} of {experts} experts"
            )
    for name, found_in in layers.items():
        missing = set(range(config["num_hidden_layers"])) - found_in
        if missing:
            raise LlmtuneError(f"{directory}: layers {sorted(missing)[:4]} have no {name}")
    names = {tensor.name for tensor in planned}
    needed = {"token_embd.weight", "output_norm.weight"}
    if not config.get("tie_word_embeddings", False) and architecture.norm_offset == 0:
        needed.add("output.weight")
    if not needed <= names:
        raise LlmtuneError(f"{directory}: no tensor for {', '.join(sorted(needed - names))}")
