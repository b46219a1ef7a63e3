"""Where an adapter on a stack of experts lands: on one fused tensor, or on one per expert."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import TensorEntry
from llmtune.merging.adapter_files import AdapterFiles, LoraGroup
from llmtune.merging.changes import Block, LowRankDelta
from llmtune.merging.names import find_tensor

# Parameters that transformers 5 fuses over the experts, and the linear layers a checkpoint holds
# for each expert instead, in the order in which their rows are stacked.
EXPERT_LINEARS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "gate_proj": (("gate_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}

# Families that store a stack as [experts, in, out]; the others store [experts, out, in].
TRANSPOSED_FAMILIES = frozenset({"gpt_oss", "llama4", "llama4_text"})


@dataclass(frozen=True)
class _Layout:
    """Which tensors of the checkpoint make up one stacked parameter."""

    key: str  # the parameter's path in memory, which rank and alpha patterns match
    num_experts: int
    num_in: int
    num_out: int
    tensors: tuple[tuple[TensorEntry, tuple[Block, ...]], ...]  # deltas without the adapter yet


def plan_experts(
    group: LoraGroup,
    adapter: AdapterFiles,
    base: Mapping[str, TensorEntry],
    model_type: str,
    *,
    strength: float = 1.0,
) -> list[tuple[TensorEntry, tuple[Block, ...]]]:
    """Return the base tensors that an adapter on a stacked expert parameter changes, and how.

    PEFT does not save which parameter of a module an adapter belongs to (several nest as
    `.base_layer`), so it is told by the shapes of A [experts * rank, in] and B [out, experts *
    rank].

    Raises:
        LlmtuneError: no parameter of that module, or more than one, has these shapes.
    """
    assert group.a is not None and group.b is not None
    module = group.module.replace(".base_layer", "")
    fitting = []
    for layout in _layouts(module, adapter, base, model_type, group):
        columns = layout.num_experts * adapter.rank(layout.key)
        if group.a.shape == (columns, layout.num_in) and group.b.shape == (layout.num_out, columns):
            fitting.append(layout)
    if len(fitting) != 1:
        state = "fits none" if not fitting else "fits more than one"
        raise LlmtuneError(
            f"{adapter.directory}: the adapter of module {group.module!r} (lora_A "
            f"{list(group.a.shape)}, lora_B {list(group.b.shape)}) {state} of the base's tensors "
            f"under {module!r}"
        )
    layout = fitting[0]
    delta = LowRankDelta(group.a, group.b, adapter.scaling(layout.key), strength)
    return [
        (entry, tuple(_with_adapter(block, delta, layout.num_experts) for block in blocks))
        for entry, blocks in layout.tensors
    ]


def _with_adapter(block: Block, delta: LowRankDelta, num_experts: int) -> Block:
    (place,) = block.deltas
    placed = replace(
        place,
        a=delta.a,
        b=delta.b,
        scaling=delta.scaling,
        weight=delta.weight,
        num_experts=num_experts,
    )
    return replace(block, deltas=(placed,))


def _layouts(
    module: str,
    adapter: AdapterFiles,
    base: Mapping[str, TensorEntry],
    model_type: str,
    group: LoraGroup,
) -> Iterator[_Layout]:
    targets = adapter.config.get("target_parameters") or ()
    for leaf in sorted({target.rpartition(".")[2] for target in targets}):
        key = f"{module}.{leaf}"
        fused = find_tensor(key, base)
        if fused is not None and len(base[fused].shape) == 3:
            yield from _fused_layout(key, base[fused], model_type, group)
            continue
        for linears in EXPERT_LINEARS.get(leaf, ()):
            layout = _per_expert_layout(key, module, linears, base, group)
            if layout is not None:
                yield layout


def _fused_layout(
    key: str, entry: TensorEntry, model_type: str, group: LoraGroup
) -> Iterator[_Layout]:
    assert group.a is not None and group.b is not None
    num_experts, rows, columns = entry.shape
    is_transposed = (group.b.shape[0], group.a.shape[1]) == (columns, rows)
    if rows == columns:
        is_transposed = model_type in TRANSPOSED_FAMILIES
    num_in, num_out = (rows, columns) if is_transposed else (columns, rows)
    blocks = tuple(
        Block(
            expert * rows,
            rows,
            (_place(group, expert, 0, num_out, is_transposed=is_transposed),),
        )
        for expert in range(num_experts)
    )
    yield _Layout(key, num_experts, num_in, num_out, ((entry, blocks),))


def _per_expert_layout(
    key: str,
    module: str,
    linears: tuple[str, ...],
    base: Mapping[str, TensorEntry],
    group: LoraGroup,
) -> _Layout | None:
    tensors: list[tuple[TensorEntry, tuple[Block, ...]]] = []
    num_experts = 0
    while all(find_tensor(f"{module}.{num_experts}.{one}.weight", base) for one in linears):
        first_out = 0
        for linear in linears:
            name = find_tensor(f"{module}.{num_experts}.{linear}.weight", base)
            assert name is not None
            entry = base[name]
            if len(entry.shape) != 2:
                return None
            rows = entry.shape[0]
            delta = _place(group, num_experts, first_out, rows, is_transposed=False)
            tensors.append((entry, (Block(0, rows, (delta,)),)))
            first_out += rows
        num_experts += 1
    if not tensors:
        return None
    num_in = tensors[0][0].shape[1]
    return _Layout(key, num_experts, num_in, first_out, tuple(tensors))


def _place(
    group: LoraGroup, expert: int, first_out: int, num_out: int, *, is_transposed: bool
) -> LowRankDelta:
    assert group.a is not None and group.b is not None
    return LowRankDelta(
        group.a,
        group.b,
        scaling=0.0,
        is_transposed=is_transposed,
        expert=expert,
        first_out=first_out,
        num_out=num_out,
    )
