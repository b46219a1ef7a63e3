"""Which tensor of the base gets which part of one adapter, from headers alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmtune.adapters.update import ModuleTensors, Place, WeightUpdate, Widths
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import CheckpointIndex, TensorEntry
from llmtune.merging.adapter_files import AdapterFiles, agree
from llmtune.merging.changes import Block, PlannedTensor
from llmtune.merging.experts import EXPERT_DIMENSIONS, plan_experts
from llmtune.merging.names import BaseNames, near_misses
from llmtune.merging.packed import PackedWeights

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})

# Families whose linear layers are transformers' Conv1D, which stores its weight as [in, out].
CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


class Planner:
    """Collects the changed tensors; keys of `changed` are the parameters' names in the base.

    A tied head that the checkpoint does not hold is planned under its name in memory; `settle_ties`
    gives it its place.
    """

    def __init__(
        self,
        base: CheckpointIndex,
        config: Mapping[str, Any],
        adapter: AdapterFiles,
        strength: float,
        packed: PackedWeights,
        names: BaseNames,
    ) -> None:
        self.base = base.tensors
        self.packed = packed
        self.names = names
        self.model_type = str(config.get("model_type", ""))
        self.adapter = adapter
        self.strength = strength
        self.changed: dict[str, PlannedTensor] = {}
        self.base_copied: set[str] = set()

    def plan(self) -> dict[str, PlannedTensor]:
        """Give every tensor of the adapter its place, and return what changed."""
        for name, entry in self.adapter.base_copies.items():
            self.take_base_copy(name, entry)
        for name, entry in self.adapter.replaced.items():
            self.replace_tensor(name, entry)
        for module, entry in self.adapter.tokens.items():
            self.replace_rows(module, entry)
        for group in self.adapter.modules.values():
            self.add_group(group)
        return self.changed

    def take_base_copy(self, name: str, entry: TensorEntry) -> None:
        """Start from the base weight that PEFT saved along with an embedding's adapter."""
        planned = self._planned(name, entry.name)
        if planned.shape != entry.shape:
            self._check_grown(planned, entry)
        elif agree(planned.source, entry):
            return
        self.changed[planned.name] = replace(planned, shape=entry.shape, source=entry)
        self.base_copied.add(planned.name)

    def replace_tensor(self, name: str, entry: TensorEntry) -> None:
        """Take a tensor that was trained whole (`modules_to_save`, `bias`, grown embeddings)."""
        planned = self._planned(name, entry.name)
        if planned.shape != entry.shape:
            self._check_grown(planned, entry)
        blend_base = planned.source if self.strength != 1 else None
        self._add(
            replace(planned, shape=entry.shape, source=entry, blend_base=blend_base), entry.name
        )

    def replace_rows(self, module: str, entry: TensorEntry) -> None:
        """Take the rows of an embedding that were trained (`trainable_token_indices`)."""
        planned = self._planned(f"{module}.weight", entry.name)
        self._require_plain_table(module)
        indices = self._token_indices(module)
        if entry.shape != (len(indices), planned.num_columns) or len(planned.shape) != 2:
            raise self._misfit(entry, planned.name, (len(indices), planned.num_columns))
        if indices and not 0 <= min(indices) <= max(indices) < planned.shape[0]:
            raise LlmtuneError(
                f"{self.adapter.directory}: trainable_token_indices names row {max(indices)} of "
                f"{planned.name!r}, which has {planned.shape[0]} rows"
            )
        self._add(replace(planned, token_rows=entry, token_indices=tuple(indices)), entry.name)

    def _require_plain_table(self, module: str) -> None:
        """Refuse token rows where peft computes with the rows alone and the model with more."""
        others = self._beside_weight(module)
        if self.names.is_embedding(f"{module}.weight") and self.names.find_embedding() is not None:
            head = self.names.head or ""
            bias = f"{head.removesuffix('weight')}bias"
            is_tied = head and self.names.find(head) in (None, self.names.find_embedding())
            others += [bias] if is_tied and bias in self.names.parameters else []
        if others:
            raise LlmtuneError(
                f"{self.adapter.directory}: trainable_token_indices of {module!r}: while token "
                f"rows are trained peft leaves out {others[0]!r}, which this model computes with, "
                "so the adapter was not trained for this model; train the whole table "
                "(modules_to_save)"
            )

    def _require_sum(self, group: ModuleTensors, planned: PlannedTensor) -> None:
        """Refuse a table of which the model computes more, or something else, than its rows."""
        name = f"{group.module}.weight"
        is_table = self.adapter.method.widths(group).is_table
        others = self._beside_weight(group.module) if is_table else []
        if others:
            raise LlmtuneError(
                f"{self.adapter.directory}: the embedding {group.module!r} computes with "
                f"{others[0]!r} after it has looked a row up, so what an adapter adds to its "
                "output is not a change of its rows; leave it out of target_modules, or train the "
                "whole table (modules_to_save)"
            )
        is_tied = self.names.is_head(name) and self.names.find(name) in (
            None,
            self.names.find_embedding(),
        )
        if self.names.zeroed and (is_table or (is_tied and planned.name not in self.base_copied)):
            raise LlmtuneError(
                f"{self.adapter.directory}: transformers sets row {self.names.zeroed[0]} of the "
                f"embedding to zero whenever it loads a {self.model_type!r} model, so the merged "
                f"model would not compute what the adapter adds to {group.module!r}; leave it out "
                "of target_modules"
            )

    def _beside_weight(self, module: str) -> list[str]:
        return [
            name
            for name in self.names.parameters
            if name.startswith(f"{module}.") and name != f"{module}.weight"
        ]

    def add_group(self, group: ModuleTensors) -> None:
        """Add what the adapter method does to one module: its weight, and its bias maybe."""
        name = f"{group.module}.weight"
        found = self.names.find(name)
        is_stack = found is not None and len(self.base[found].shape) == EXPERT_DIMENSIONS
        if is_stack and not self.adapter.method.target_parameters(self.adapter.config):
            is_stack = False  # a convolution
        if is_stack or (found is None and not self.names.is_head(name)):
            self._add_experts(group)
            return
        planned = self._planned(name, group.first.name)
        self._require_sum(group, planned)
        try:
            updates = self.adapter.method.plan_updates(
                group, self._place(group, planned), self.adapter.config, self.strength
            )
        except ValueError as error:
            raise LlmtuneError(f"{self.adapter.directory}: {error}") from None
        for leaf, update in updates.items():
            self._add_update(f"{group.module}.{leaf}", update)

    def _add_update(self, name: str, update: WeightUpdate) -> None:
        entry = update.entries[0]
        if self.names.find(name) is None and not self.names.is_head(name):
            raise LlmtuneError(
                f"{self.adapter.directory}: {entry.name!r} changes {name!r}, which the base does "
                "not have; it cannot be merged"
            )
        planned = self._planned(name, entry.name)
        block = Block(0, planned.num_rows, (update,))
        self._add(replace(planned, blocks=(block,)), entry.name)

    def _add_experts(self, group: ModuleTensors) -> None:
        method = self.adapter.method
        if not method.target_parameters(self.adapter.config):
            raise self._unmatched(group.first.name, f"{group.module}.weight")
        if method.why_no_factors(group) is not None or method.widths(group).is_table:
            raise LlmtuneError(
                f"{self.adapter.directory}: {group.module!r} is a stack of experts; only plain "
                "LoRA on it can be merged"
            )
        for entry, blocks in plan_experts(
            group, self.adapter, self.base, self.names, strength=self.strength
        ):
            planned = replace(self._planned(entry.name, group.first.name), blocks=blocks)
            self._add(planned, group.first.name)

    def _place(self, group: ModuleTensors, planned: PlannedTensor) -> Place:
        """Return how the base holds the adapted layer, checked against the adapter's shapes."""
        widths = self.adapter.method.widths(group)
        if len(planned.shape) != 2:
            raise self._misfit(group.first, planned.name, planned.shape)
        is_transposed = self._is_transposed(group, planned, widths)
        num_out, num_in = reversed(planned.shape) if is_transposed else planned.shape
        if widths.num_out not in (None, num_out) or widths.num_in not in (None, num_in):
            raise self._misfit(group.first, planned.name, planned.shape)
        return Place(
            self._pattern_key(group.module),
            num_out,
            num_in,
            is_transposed,
            has_bias=self.names.find(f"{group.module}.bias") is not None,
        )

    def _is_transposed(self, group: ModuleTensors, planned: PlannedTensor, widths: Widths) -> bool:
        if widths.is_table:
            return True
        is_conv1d_family = self.model_type in CONV1D_FAMILIES
        fan_in_fan_out = bool(self.adapter.config.get("fan_in_fan_out"))
        if self.names.is_head(planned.name):
            return False
        num_rows, num_columns = planned.shape
        if num_rows != num_columns:
            has_swapped_shape = widths.num_out in (None, num_columns) and widths.num_in in (
                None,
                num_rows,
            )
            return has_swapped_shape and (is_conv1d_family or fan_in_fan_out)
        if is_conv1d_family:
            return True
        if fan_in_fan_out:
            raise LlmtuneError(
                f"{self.adapter.directory} sets fan_in_fan_out, and whether the square weight of "
                f"{group.module!r} in a {self.model_type!r} model is stored [in, out] is not known"
            )
        return False

    def _pattern_key(self, module: str) -> str:
        targets = self.adapter.method.target_parameters(self.adapter.config)
        parameter = f"{module}.weight"
        if any(parameter == target or parameter.endswith(f".{target}") for target in targets):
            return parameter
        return module

    def _token_indices(self, module: str) -> list[int]:
        setting = self.adapter.config.get("trainable_token_indices") or []
        if isinstance(setting, Mapping):
            for name, indices in setting.items():
                if module == name or module.endswith(f".{name}"):
                    return list(indices)
            raise LlmtuneError(
                f"{self.adapter.directory}: trainable_token_indices does not name {module!r}, "
                "whose rows the adapter holds"
            )
        return list(setting)

    def _planned(self, name: str, adapter_name: str) -> PlannedTensor:
        found = self.names.find(name)
        if found is None and self.names.is_head(name):
            # A tied head: its bytes are the embedding's.
            embedding = next(
                (tensor for tensor in self.base if self.names.is_embedding(tensor)), None
            )
            if embedding is not None:
                return self._start(name, self.base[embedding], adapter_name)
        if found is None:
            raise self._unmatched(adapter_name, name)
        return self._start(found, self.base[found], adapter_name)

    def _start(self, name: str, entry: TensorEntry, adapter_name: str) -> PlannedTensor:
        if name in self.packed.tensors:
            unpacked = replace(self.packed.tensors[name], strength=self.strength)
            return self.changed.get(name, unpacked)
        if entry.dtype not in FLOAT_DTYPES:
            raise LlmtuneError(
                f"{entry.path.parent}: {entry.name!r} is stored as {entry.dtype}, and the adapter "
                f"tensor {adapter_name!r} can only be merged into one of "
                f"{', '.join(sorted(FLOAT_DTYPES))}: give the original 16-bit model"
            )
        return self.changed.get(name) or PlannedTensor(
            name, entry.dtype, entry.shape, entry, strength=self.strength
        )

    def _add(self, planned: PlannedTensor, adapter_name: str) -> None:
        before = self.changed.get(planned.name)
        if before is not None and planned.name not in self.base_copied:
            raise LlmtuneError(
                f"{self.adapter.directory}: {adapter_name!r} is a second change of "
                f"{planned.name!r}, which merging does not combine with the first ({before.change})"
            )
        self.changed[planned.name] = planned
        self.base_copied.discard(planned.name)

    def _check_grown(self, planned: PlannedTensor, entry: TensorEntry) -> None:
        is_table = self.names.is_embedding(planned.name) or self.names.is_head(planned.name)
        has_width = len(entry.shape) == 2 and entry.shape[1:] == planned.shape[1:]
        if not (is_table and has_width and entry.shape[0] > planned.shape[0]):
            raise self._misfit(entry, planned.name, planned.shape)
        if self.strength != 1:
            raise LlmtuneError(
                f"{self.adapter.directory}: {entry.name!r} grew the vocabulary from "
                f"{planned.shape[0]} to {entry.shape[0]} rows, so it can only be merged at "
                f"strength 1, not {self.strength:g}"
            )

    def _misfit(self, entry: TensorEntry, name: str, shape: tuple[int, ...]) -> LlmtuneError:
        return LlmtuneError(
            f"{self.adapter.directory}: {entry.name!r} of shape {list(entry.shape)} does not fit "
            f"the base's {name!r} of shape {list(shape)}; is this the adapter's base?"
        )

    def _unmatched(self, adapter_name: str, name: str) -> LlmtuneError:
        parts = self.names.converted.get(name)
        if parts is not None:
            return LlmtuneError(
                f"{self.adapter.directory}: {adapter_name!r} changes {name!r}, which transformers "
                f"makes of {parts[0]!r} as it loads this base. Merging does not undo that: leave "
                "it out of target_modules"
            )
        return LlmtuneError(
            f"{self.adapter.directory}: {adapter_name!r} has no place in the base: no tensor is "
            f"named {name!r}; {near_misses(name, self.base)}"
        )
