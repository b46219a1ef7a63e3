"""Where an adapter on a stack of experts lands: on one fused tensor, or on one per expert."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llmtune.adapters.update import ModuleTensors, Place, Widths
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import TensorEntry
from llmtune.merging.adapter_files import AdapterFiles
from llmtune.merging.changes import Block
from llmtune.merging.names import BaseNames

EXPERT_DIMENSIONS = 3
"""Of a weight that is a stack of experts."""

# Parameters that transformers 5 fuses over the experts, and the linear layers a checkpoint holds
# for each expert instead, in the order in which their rows are stacked.
EXPERT_LINEARS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "gate_proj": (("gate_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor of the checkpoint, and the part of the stack that they are."""

    first_row: int
    num_rows: int
    place: Place


@dataclass(frozen=True)
class _Layout:
    """Which tensors of the checkpoint make up one stacked parameter."""

    whole: Place
    tensors: tuple[tuple[TensorEntry, tuple[_Rows, ...]], ...]

    def interleaved(self) -> "_Layout":
        """Return it with the halves of each expert's outputs taking turns."""
        return _Layout(
            self.whole,
            tuple(
                (
                    entry,
                    tuple(replace(p, place=replace(p.place, is_interleaved=True)) for p in parts),
                )
                for entry, parts in self.tensors
            ),
        )


def plan_experts(
    group: ModuleTensors,
    adapter: AdapterFiles,
    base: Mapping[str, TensorEntry],
    names: BaseNames,
    *,
    strength: float = 1.0,
) -> list[tuple[TensorEntry, tuple[Block, ...]]]:
    """Return the base tensors that an adapter on a stacked expert parameter changes, and how.

    PEFT does not save which parameter of a module an adapter belongs to (several nest as
    `.base_layer`), so the method finds it by the shapes of its tensors, and if these are alike by
    the order in which PEFT nests.

    Raises:
        LlmtuneError: no parameter of that module, or more than one, has these shapes.
    """
    module = group.module.replace(".base_layer", "")
    fitting = [
        layout
        for layout in _layouts(module, adapter, base, names, group)
        if adapter.method.fits_experts(group, layout.whole, adapter.config)
    ]
    if len(fitting) > 1:
        nested = _nested_parameter(group, adapter, names)
        fitting = [layout for layout in fitting if nested in (None, layout.whole.key)]
    if len(fitting) != 1:
        state = "fits none" if not fitting else "fits more than one"
        shapes = ", ".join(f"{part} {list(entry.shape)}" for part, entry in group.parts.items())
        raise LlmtuneError(
            f"{adapter.directory}: the adapter of module {group.module!r} ({shapes}) {state} of "
            f"the base's tensors under {module!r}"
        )
    planned = []
    for entry, parts in fitting[0].tensors:
        blocks = []
        for rows in parts:
            updates = adapter.method.plan_updates(group, rows.place, adapter.config, strength)
            blocks.append(Block(rows.first_row, rows.num_rows, (updates["weight"],)))
        planned.append((entry, tuple(blocks)))
    return planned


def _nested_parameter(group: ModuleTensors, adapter: AdapterFiles, names: BaseNames) -> str | None:
    """Return the parameter that a nested wrapper is of: peft wraps them in the module's order.

    The first is the innermost, with the most `.base_layer` in its name.
    """
    module, depth = group.module.replace(".base_layer", ""), group.module.count(".base_layer")
    targets = adapter.method.target_parameters(adapter.config)
    wrapped = [
        name
        for name in names.parameters
        if name.rpartition(".")[0] == module
        and any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    return wrapped[-1 - depth] if depth < len(wrapped) else None


def _layouts(
    module: str,
    adapter: AdapterFiles,
    base: Mapping[str, TensorEntry],
    names: BaseNames,
    group: ModuleTensors,
) -> Iterator[_Layout]:
    targets = adapter.method.target_parameters(adapter.config)
    widths = adapter.method.widths(group)
    for leaf in sorted({target.rpartition(".")[2] for target in targets}):
        key = f"{module}.{leaf}"
        fused = names.find(key)
        if fused is not None and len(base[fused].shape) == EXPERT_DIMENSIONS:
            yield _fused_layout(
                key, base[fused], widths, is_square_transposed=module in names.transposed
            )
            continue
        if key in names.interleaved:
            entry = base[names.converted[key][0]]
            taking_turns = _fused_layout(key, entry, widths, is_square_transposed=False)
            if not taking_turns.whole.is_transposed:
                yield taking_turns.interleaved()
            continue
        for linears in EXPERT_LINEARS.get(leaf, ()):
            layout = _per_expert_layout(key, module, linears, base, names)
            if layout is not None:
                yield layout


def _fused_layout(
    key: str, entry: TensorEntry, widths: Widths, *, is_square_transposed: bool
) -> _Layout:
    """Return the layout of a stack; PEFT asks the module how a square one is stored."""
    num_experts, rows, columns = entry.shape
    is_transposed = (widths.num_out, widths.num_in) == (columns, rows)
    if rows == columns:
        is_transposed = is_square_transposed
    num_in, num_out = (rows, columns) if is_transposed else (columns, rows)
    whole = Place(key, num_out, num_in, is_transposed, num_experts=num_experts)
    parts = tuple(
        _Rows(expert * rows, rows, replace(whole, expert=expert)) for expert in range(num_experts)
    )
    return _Layout(whole, ((entry, parts),))


def _per_expert_layout(
    key: str,
    module: str,
    linears: tuple[str, ...],
    base: Mapping[str, TensorEntry],
    names: BaseNames,
) -> _Layout | None:
    # What transformers makes the parameter of, by its ending `expert.linear.weight`.
    sources = {_ending(name): name for name in reversed(names.converted.get(key, ()))}
    found: list[tuple[TensorEntry, int, int]] = []  # tensor, expert, first of its outputs
    num_experts = num_out = 0
    while all(parts := _tensors_of_expert(module, num_experts, linears, sources, names)):
        num_out = 0
        for name in parts:
            assert name is not None
            entry = base[name]
            if len(entry.shape) != 2:
                return None
            found.append((entry, num_experts, num_out))
            num_out += entry.shape[0]
        num_experts += 1
    if not found:
        return None
    whole = Place(key, num_out, found[0][0].shape[1], num_experts=num_experts)
    tensors = []
    for entry, expert, first_out in found:
        rows = entry.shape[0]
        place = replace(whole, num_out=rows, expert=expert, first_out=first_out)
        tensors.append((entry, (_Rows(0, rows, place),)))
    return _Layout(whole, tuple(tensors))


def _tensors_of_expert(
    module: str,
    expert: int,
    linears: tuple[str, ...],
    sources: Mapping[str, str],
    names: BaseNames,
) -> list[str | None]:
    """Return the names of one expert's linear layers in the checkpoint, None for one it lacks.

    What transformers makes the parameter of (`sources`) comes first; a model that was not asked is
    guessed.
    """
    endings = (f"{expert}.{linear}.weight" for linear in linears)
    return [sources.get(ending) or names.find(f"{module}.{ending}") for ending in endings]


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-3:])
