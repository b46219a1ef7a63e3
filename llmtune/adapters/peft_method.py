"""Methods that peft alone computes: its layers in training, its own merge, one module at a time."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from llmtune.adapters.base import Adapter, SavedConfig
from llmtune.adapters.update import ModuleTensors, Part, Place, WeightUpdate, Widths, Workspace
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import blamed_on
from llmtune.io.safetensors import TensorEntry

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor, nn

PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that say which modules are adapted."""
ELSEWHERE = ("modules_to_save", "base_model_name_or_path", "revision", "auto_mapping")
"""Settings that have nothing to do with one module."""
ADAPTER = "default"
COPY_AGAIN = "copy the adapter again, or make it again"


class SavedPart(NamedTuple):
    """One of the tensors that such an adapter has for a module."""

    name: str
    """As it is saved behind the module's name, such as `oft_R.weight`."""
    neutral: float | None = None
    """What all of it is while the adapter has no effect; it then learns from the first step."""
    is_optional: bool = False
    """Whether some modules have no such tensor."""
    is_late: bool = False
    """Whether peft only lays it out with the base's weights, so that a plan does not see it."""


class PeftMethod(Adapter):
    """A method of peft: a member says its knobs, its tensors and its size, and peft does the rest.

    A merge makes peft's layer around the base's weight in float32, sets its tensors and takes what
    the layer's own `merge` gives, so that the weight of one module is held whole.
    """

    PEFT_CONFIG: ClassVar[str]
    """The name of its config's class in peft."""
    PARTS: ClassVar[tuple[SavedPart, ...]]
    """The tensors of a module; what is between `|` in a name are alternatives."""
    PEFT_CONSTANTS: ClassVar[JsonObject] = {}
    """Settings of peft's config that no knob decides."""
    SHARED_PARTS: ClassVar[Mapping[str, str]] = {}
    """Tensors that all modules have in common, {their whole saved name: part}."""
    UNSAVED_PARTS: ClassVar[frozenset[str]] = frozenset()
    """Parameters of peft's layer that follow from its config, and are in no file."""
    TAKES_TRANSPOSED: ClassVar[bool] = False
    """Whether peft also adapts layers that store their weight as [in, out] (GPT-2's Conv1D)."""

    def peft_settings(self, target_modules: Sequence[str]) -> JsonObject:
        """Return the method's own settings of peft's config: its shape, and its constants."""
        knobs = {name: knob for name, knob in self.SHAPE_KNOBS.items() if knob != "method"}
        return {
            **self.PEFT_CONSTANTS,
            **{name: getattr(self, knob) for name, knob in knobs.items()},
        }

    def to_peft(
        self,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        *,
        fan_in_fan_out: bool = False,
    ) -> "PeftConfig":
        """Return peft's config for exactly these targets."""
        import peft

        turned = {"fan_in_fan_out": fan_in_fan_out} if self.TAKES_TRANSPOSED else {}
        config: PeftConfig = getattr(peft, self.PEFT_CONFIG)(
            task_type="CAUSAL_LM",
            target_modules=list(target_modules),
            modules_to_save=list(self.modules_to_save) or None,
            **turned,
            **self.peft_settings(target_modules),
        )
        return config

    def why_no_layer(self, layer: "nn.Module") -> str | None:
        """Say why peft has no layer of this method for a module of the base."""
        from transformers.pytorch_utils import Conv1D

        if isinstance(layer, Conv1D) and not self.TAKES_TRANSPOSED:
            return "it stores its weight transposed, and peft has no layer of this method for that"
        return None

    @classmethod
    def learns_at_once(cls, name: str) -> bool:
        """The parts do that are at rest without effect; the others wait until these have moved."""
        return cls.neutral_value(name) is not None

    @classmethod
    def neutral_value(cls, name: str) -> float | None:
        """Return what the part is without effect."""
        last = name.replace(f".{ADAPTER}", "")
        for part in cls.PARTS:
            names = part.name.split("|")
            if any(last.endswith(f".{one}") for one in names) and part.neutral is not None:
                return part.neutral
        return None

    @classmethod
    def check_settings(cls, directory: Path, config: SavedConfig) -> None:
        """Check that peft, which carries them out, knows all of them."""
        import peft

        known = set(getattr(peft, cls.PEFT_CONFIG).__dataclass_fields__) | {"peft_version"}
        for setting, value in config.items():
            reason = cls.REFUSED_SETTINGS.get(setting) if value else None
            if value and setting not in known:
                reason = "the installed peft does not know this setting of its method"
            if reason is not None:
                raise LlmtuneError(f"{directory} cannot be merged: it sets {setting}, and {reason}")

    @classmethod
    def shared_part(cls, name: str) -> str | None:
        """Return the part that a tensor of the whole adapter is for every module."""
        return cls.SHARED_PARTS.get(name)

    @classmethod
    def part_of(cls, name: str) -> Part | None:
        """Return the part by the end of the tensor's name."""
        mark = re.escape(cls.TENSOR_MARK)
        match = re.match(rf"^(?P<module>.+?)(?P<part>{mark}\w+(?:\.weight)?)$", name)
        if match is None:
            return None
        part = match["part"].removeprefix(".")
        if not any(part in one.name.split("|") for one in cls.PARTS):
            raise ValueError("is of a kind that merging does not know")
        return Part(match["module"], part)

    @classmethod
    def missing_part(cls, tensors: ModuleTensors) -> str | None:
        """Name a part of which no alternative is there."""
        for part in cls.PARTS:
            names = part.name.split("|")
            is_needed = not (part.is_optional or part.is_late)
            if is_needed and not any(name in tensors.parts for name in names):
                return " or ".join(names)
        return None

    @classmethod
    def widths(cls, tensors: ModuleTensors) -> Widths:
        """The layer's own shapes are compared when it is merged."""
        return Widths(None, None)

    @classmethod
    def plan_updates(
        cls, tensors: ModuleTensors, place: Place, config: SavedConfig, strength: float
    ) -> dict[str, WeightUpdate]:
        """Return the update of the weight, and that of the bias if the method changes it."""
        parts = tuple(tensors.parts.items())
        return {
            leaf: PeftUpdate(cls, tensors.module, parts, config, place, leaf, strength)
            for leaf in cls.changed_leaves(tensors, config)
            if leaf == "weight" or place.has_bias
        }

    @classmethod
    def changed_leaves(cls, tensors: ModuleTensors, config: SavedConfig) -> tuple[str, ...]:
        """Return which parameters of a module the method changes."""
        return ("weight",)

    @classmethod
    def settings_for(cls, config: SavedConfig, module: str) -> JsonObject:
        """Return the settings that mean for this module alone what the saved ones mean for it."""
        return {}


@dataclass(frozen=True)
class PeftUpdate(WeightUpdate):
    """A module's parameter as peft's own layer merges it, in float32."""

    word = "peft"

    method: type[PeftMethod]
    module: str
    parts: tuple[tuple[str, TensorEntry], ...]
    config: SavedConfig = field(hash=False, compare=False)
    place: Place
    leaf: str  # weight or bias
    weight: float = 1.0

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """All of the module's tensors."""
        return tuple(entry for _, entry in self.parts)

    @property
    def strength(self) -> float:
        """How far the result is moved from the base."""
        return self.weight

    def describe(self) -> Mapping[str, float | str]:
        """Return the weight and the name of the first tensor."""
        return {"weight": self.weight, "tensor": self.parts[0][1].name}

    def survey(self, tiles: "Iterable[Tensor]", work: Workspace) -> "Tensor | None":
        """Return the whole merged parameter: some methods need all of it for any row."""
        import torch

        rows = torch.cat([tile.clone() for tile in tiles])
        first = self.parts[0][1]
        with blamed_on(first.path.parent, "peft", advice=COPY_AGAIN), torch.no_grad():
            layer = self._layer(rows)
            for name, entry in self.parts:
                values = work.load(entry)
                _set_part(layer, name, values, entry, self.method)
                self._check_places(values, entry)
            _require_all_set(layer, [name for name, _ in self.parts], first, self.method)
            with torch.sparse.check_sparse_tensor_invariants():
                layer.merge()
        merged: Tensor = getattr(layer.get_base_layer(), self.leaf).detach().float()
        merged = merged.T if self.leaf == "weight" and self._is_turned else merged
        return merged.reshape(rows.shape)

    def apply(
        self, rows: "Tensor", first_row: int, work: Workspace, surveyed: "Tensor | None"
    ) -> None:
        """Take the merged rows."""
        assert surveyed is not None
        rows.copy_(surveyed[first_row : first_row + rows.shape[0]])

    @property
    def _is_turned(self) -> bool:
        """Whether the stored weight is the transpose of the one that peft's layer has."""
        return self.place.is_transposed and not self.method.TAKES_TRANSPOSED

    def _check_places(self, values: "Tensor", entry: TensorEntry) -> None:
        if not self.method.counts(entry.name):
            return
        reason = self.method.why_not_places(values, self.place.num_out, self.place.num_in)
        if reason is not None:
            raise LlmtuneError(f"{entry.path}: {entry.name!r} {reason}; {COPY_AGAIN}")

    def _layer(self, rows: "Tensor") -> "BaseTunerLayer":
        """Return peft's layer of this module alone, around the base's rows."""
        import torch
        from peft import PeftConfig
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        place, is_bias = self.place, self.leaf == "bias"
        is_conv1d = place.is_transposed and not self._is_turned
        with torch.device("meta"):
            if is_conv1d:
                base: nn.Module = Conv1D(place.num_out, place.num_in)
            else:
                base = nn.Linear(place.num_in, place.num_out, bias=is_bias)
        weight = torch.zeros(base.weight.shape, device=rows.device) if is_bias else rows
        weight = weight.T.contiguous() if self._is_turned and not is_bias else weight
        base.weight = nn.Parameter(weight, requires_grad=False)
        if base.bias is not None:
            bias = rows.view(-1) if is_bias else torch.zeros(place.num_out, device=rows.device)
            base.bias = nn.Parameter(bias, requires_grad=False)
        kept = {k: v for k, v in self.config.items() if k not in (*PLACES, *ELSEWHERE)}
        settings = {**kept, **self.method.settings_for(self.config, self.module)}
        if self.method.TAKES_TRANSPOSED:
            settings["fan_in_fan_out"] = is_conv1d
        config = PeftConfig.from_peft_type(**settings, target_modules=[self.module])
        config.inference_mode = True
        root = _nest(self.module, base)
        with self.method.attaching():
            PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](root, config, adapter_name=ADAPTER)
        layer: BaseTunerLayer = root.get_submodule(self.module)
        return layer


def _nest(name: str, module: "nn.Module") -> "nn.Module":
    """Return a model that holds nothing but this module, under its full name."""
    from torch import nn

    root = nn.Module()
    holder = root
    *parents, last = name.split(".")
    for parent in parents:
        child = nn.Module()
        holder.add_module(parent, child)
        holder = child
    holder.add_module(last, module)
    return root


def _set_part(
    layer: "BaseTunerLayer",
    name: str,
    values: "Tensor",
    entry: TensorEntry,
    method: type[PeftMethod],
) -> None:
    """Set one of a layer's tensors.

    Raises:
        LlmtuneError: it has no such tensor, or one of a different shape.
    """
    owner, _, leaf = name.partition(".")
    held = getattr(layer, owner, None) or {}
    value = held[ADAPTER] if ADAPTER in held else None  # noqa: SIM401 - ModuleDict has no get
    found: Tensor | None = getattr(value, leaf) if leaf and value is not None else value
    if found is not None and name in method.SHARED_PARTS.values():
        held[ADAPTER] = values  # of the whole model's widths, of which the layer takes its own
        return
    if found is None or found.shape != values.shape:
        shape = "none" if found is None else list(found.shape)
        raise LlmtuneError(
            f"{entry.path.parent}: {entry.name!r} is {list(values.shape)}, and the layer that its "
            f"config and the base describe has {shape}; is this the adapter's base?"
        )
    found.data = values.to(found.device, found.dtype)


def _require_all_set(
    layer: "BaseTunerLayer",
    names: Sequence[str],
    first: TensorEntry,
    method: type[PeftMethod],
) -> None:
    own = [name for name, _ in layer.named_parameters() if not name.startswith("base_layer.")]
    own += [part.name for part in method.PARTS if part.is_late]
    for name in own:
        if name.replace(f".{ADAPTER}", "") not in (*names, *method.UNSAVED_PARTS):
            raise LlmtuneError(
                f"{first.path.parent}: beside {first.name!r} there is no {name.split('.')[0]!r}; "
                f"{COPY_AGAIN}"
            )
