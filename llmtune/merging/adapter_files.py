"""What an adapter directory holds, read from its config and its header; no tensor is loaded."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtune.adapters.manifest import WEIGHTS_NAME, read_adapter_config
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import TensorEntry, read_header
from llmtune.merging.changes import ADAPTER_PREFIX
from llmtune.merging.compare import have_same_bytes

# Settings that change nothing about how the saved tensors are added into a base.
INERT_SETTINGS = frozenset(
    {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "bias",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    }
)

# Settings whose meaning `plan` carries out.
USED_SETTINGS = frozenset(
    {
        "r",
        "lora_alpha",
        "fan_in_fan_out",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "use_dora",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "init_lora_weights",
    }
)

REFUSED_SETTINGS = {
    "alora_invocation_tokens": "activated LoRA switches on in the middle of a text, so no single "
    "set of weights equals it",
    "arrow_config": "Arrow routes every token to other adapters, so no single set of weights "
    "equals it",
    "monteclora_config": "Monte Carlo LoRA samples its weights",
    "kasa_config": "KaSA truncates the base weights the adapter stands on",
    "layer_replication": "it builds a model with more layers than the base has",
    "use_qalora": "QALoRA pools its inputs, which no weight of the base's shape can express",
    "use_bdlora": "block-diagonal LoRA is not laid out as one low-rank product",
}

# Initialisations that leave the base as it is on disk, so that W + B A means what was trained.
KEPT_BASE_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})

LORA_KEY = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?$"
)
TOKENS_KEY = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
SAVED_KEY = re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+)?(?=\.(?:weight|bias)$)")
# PEFT saves an untrained table along where it stands under an adapter or has grown.
BASE_COPY_KEY = re.compile(
    r"(?:\.token_adapter)?\.base_layer(?=\.weight$)|\.original_module(?=\.(?:weight|bias)$)"
)


@dataclass
class LoraGroup:
    """The tensors of one adapted module."""

    module: str  # its path in the model in memory; a wrapped expert parameter keeps `.base_layer`
    a: TensorEntry | None = None  # [rank, in]
    b: TensorEntry | None = None  # [out, rank]
    bias: TensorEntry | None = None  # [out]
    magnitude: TensorEntry | None = None  # [out]
    is_embedding: bool = False  # a is [rank, rows of the table], b is [width, rank]


@dataclass
class AdapterFiles:
    """An adapter directory, its tensors sorted by what they do to the base."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    lora: dict[str, LoraGroup] = field(default_factory=dict)
    tokens: dict[str, TensorEntry] = field(default_factory=dict)  # by module
    replaced: dict[str, TensorEntry] = field(default_factory=dict)  # trained, by tensor name
    base_copies: dict[str, TensorEntry] = field(default_factory=dict)  # saved, not trained

    @classmethod
    def open(cls, directory: Path) -> "AdapterFiles":
        """Read `adapter_config.json` and the header of `adapter_model.safetensors`.

        Raises:
            LlmtuneError: a file is missing or malformed, the adapter is of a kind that cannot be
                added into one set of weights, or a tensor is not one that PEFT writes.
        """
        config = read_adapter_config(directory)
        _refuse_unknown_settings(directory, config)
        tensors = {entry.name: entry for entry in read_header(directory / WEIGHTS_NAME).tensors}
        files = cls(directory, config, tensors)
        for name, entry in tensors.items():
            files._sort_in(name, entry)
        for group in files.lora.values():
            if group.a is None or group.b is None:
                missing = "lora_A" if group.a is None else "lora_B"
                raise LlmtuneError(f"{directory}: module {group.module!r} has no {missing} tensor")
        return files

    def scaling(self, key: str) -> float:
        """Return alpha / rank (rsLoRA: alpha / sqrt(rank)) of the module or parameter `key`."""
        alpha = self._pattern("alpha_pattern", key, self.config.get("lora_alpha", 8))
        rank = self.rank(key)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def rank(self, key: str) -> int:
        """Return the rank that the config gives the module or parameter `key`."""
        return self._pattern("rank_pattern", key, self.config.get("r", 8))

    def _pattern(self, setting: str, key: str, default: Any) -> Any:
        # The first pattern that matches the end of the key wins (peft.utils.other.get_pattern_key).
        for pattern, value in (self.config.get(setting) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", key):
                return value
        return default

    def _sort_in(self, name: str, entry: TensorEntry) -> None:
        if not name.startswith(ADAPTER_PREFIX):
            raise LlmtuneError(
                f"{self.directory}: tensor {name!r} does not begin with {ADAPTER_PREFIX!r}; "
                "expected an adapter of a whole model as peft's `save_pretrained` writes it"
            )
        name = SAVED_KEY.sub("", name.removeprefix(ADAPTER_PREFIX))
        if match := LORA_KEY.match(name):
            self._sort_in_lora(match, entry)
        elif match := TOKENS_KEY.match(name):
            self.tokens[match["module"]] = entry
        elif BASE_COPY_KEY.search(name):
            self.base_copies[BASE_COPY_KEY.sub("", name)] = entry
        elif ".lora_" in name or ".token_adapter." in name:
            raise LlmtuneError(
                f"{self.directory}: tensor {entry.name!r} is of a kind that merging does not know"
            )
        else:
            self._sort_in_replaced(name.replace(".base_layer.", "."), entry)

    def _sort_in_replaced(self, name: str, entry: TensorEntry) -> None:
        other = self.replaced.setdefault(name, entry)
        if other is not entry and not have_same_bytes(other, entry):
            raise LlmtuneError(
                f"{self.directory} holds {name!r} twice, and the two differ: {other.name!r} and "
                f"{entry.name!r}"
            )

    def _sort_in_lora(self, match: re.Match[str], entry: TensorEntry) -> None:
        group = self.lora.setdefault(match["module"], LoraGroup(match["module"]))
        part = match["part"].removeprefix("embedding_")
        slots = {"A": "a", "B": "b", "magnitude_vector": "magnitude"}
        slot = "bias" if match["leaf"] == ".bias" else slots[part]
        if slot == "bias" and part != "B":
            raise LlmtuneError(f"{self.directory}: tensor {entry.name!r} has no place in LoRA")
        group.is_embedding = group.is_embedding or match["part"].startswith("embedding_")
        if getattr(group, slot) is not None:
            raise LlmtuneError(
                f"{self.directory} holds more than one adapter for module {group.module!r}; "
                "save one adapter alone"
            )
        setattr(group, slot, entry)


def _refuse_unknown_settings(directory: Path, config: Mapping[str, Any]) -> None:
    for setting, value in config.items():
        if setting in INERT_SETTINGS | USED_SETTINGS or not value:
            continue
        reason = REFUSED_SETTINGS.get(setting, "merging does not know this setting")
        raise LlmtuneError(f"{directory} cannot be merged: it sets {setting}, and {reason}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in KEPT_BASE_INITS:
        raise LlmtuneError(
            f"{directory} cannot be merged: init_lora_weights={init!r} changed the base weights "
            "before training, so this adapter does not fit the base on disk; save it as plain "
            "LoRA with peft's `save_pretrained(path_initial_model_for_weight_conversion=...)`"
        )
