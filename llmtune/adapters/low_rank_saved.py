"""What LoRA and its variants share in their saved form: the settings, and the factors A and B."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

from llmtune.adapters.base import Adapter, SavedConfig, matches_pattern
from llmtune.adapters.low_rank_update import BiasUpdate, LowRankUpdate
from llmtune.adapters.update import Factors, ModuleTensors, Part, Place, WeightUpdate, Widths
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import TensorEntry

Number = TypeVar("Number", int, float)

DEFAULT_RANK = 8  # peft's, if a saved config names none
DEFAULT_ALPHA = 8

NO_TARGETS = "dummy-target-modules"
"""What peft calls the targets of an adapter that only has `modules_to_save`."""

# Initializations that leave the base as it is on disk, so that W + B A means what was trained.
KEPT_BASE_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
KEY = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?$"
)


class SavedLowRank(Adapter):
    """How the saved factors of W + scaling * B A are read and merged."""

    PEFT_TYPE: ClassVar[str] = "LORA"
    TENSOR_MARK: ClassVar[str] = ".lora_"
    USED_SETTINGS: ClassVar[frozenset[str]] = frozenset(
        {
            "r",
            "lora_alpha",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
            "use_dora",
            "lora_bias",
            "target_parameters",
            "init_lora_weights",
        }
    )
    INERT_SETTINGS: ClassVar[frozenset[str]] = frozenset(
        {
            "lora_dropout",
            "bias",
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
    REFUSED_SETTINGS: ClassVar[Mapping[str, str]] = {
        "alora_invocation_tokens": "activated LoRA switches on in the middle of a text, so no "
        "single set of weights equals it",
        "arrow_config": "Arrow routes every token to other adapters, so no single set of weights "
        "equals it",
        "monteclora_config": "Monte Carlo LoRA samples its weights",
        "kasa_config": "KaSA truncates the base weights under the adapter",
        "layer_replication": "it builds a model with more layers than the base has",
        "use_qalora": "QALoRA pools its inputs, which no weight of the base's shape can express",
        "use_bdlora": "block-diagonal LoRA is not laid out as one low-rank product",
    }
    SHAPE_KNOBS: ClassVar[Mapping[str, str]] = {
        "r": "rank",
        "lora_alpha": "alpha",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
        "use_rslora": "method",
        "use_dora": "method",
    }

    @classmethod
    def owns(cls, config: SavedConfig) -> bool:
        """Whether it is a LoRA on some module."""
        return super().owns(config) and config.get("target_modules") != NO_TARGETS

    @classmethod
    def scaling(cls, rank: int, alpha: float) -> float:
        """Return the factor before B A."""
        return alpha / rank

    @classmethod
    def check_settings(cls, directory: Path, config: SavedConfig) -> None:
        """Check also that the adapter was made for the base as it is on disk."""
        super().check_settings(directory, config)
        init = config.get("init_lora_weights", True)
        if isinstance(init, str) and init not in KEPT_BASE_INITS:
            raise LlmtuneError(
                f"{directory} cannot be merged: init_lora_weights={init!r} changed the base "
                "weights before training, so this adapter does not fit the base on disk; save it "
                "as plain LoRA with peft's "
                "`save_pretrained(path_initial_model_for_weight_conversion=...)`"
            )

    @classmethod
    def has_strength(cls, config: SavedConfig) -> bool:
        """A trained bias has no strength."""
        return super().has_strength(config) and config.get("bias", "none") == "none"

    @classmethod
    def target_parameters(cls, config: SavedConfig) -> tuple[str, ...]:
        """Return the fused parameters that a saved adapter is on."""
        return tuple(config.get("target_parameters") or ())

    @classmethod
    def neutral_value(cls, name: str) -> float | None:
        """B is zero without effect."""
        return 0.0 if "lora_B" in name or "lora_embedding_B" in name else None

    @classmethod
    def part_of(cls, name: str) -> Part | None:
        """Return A, B, embedding_A, embedding_B, bias or magnitude_vector."""
        match = KEY.match(name)
        if match is None:
            return None
        part = match["part"]
        if match["leaf"] == ".bias":
            if not part.endswith("B"):
                raise ValueError("has no place in LoRA")
            part = "bias"
        return Part(match["module"], part)

    @classmethod
    def missing_part(cls, tensors: ModuleTensors) -> str | None:
        """Both factors are needed."""
        parts = tensors.parts
        if "A" not in parts and "embedding_A" not in parts:
            return "lora_A"
        return "lora_B" if "B" not in parts and "embedding_B" not in parts else None

    @classmethod
    def widths(cls, tensors: ModuleTensors) -> Widths:
        """Return the height of B and the width of A."""
        a, b, is_embedding = _pair(tensors)
        return Widths(b.shape[0], a.shape[-1], is_table=is_embedding)

    @classmethod
    def fits_experts(cls, tensors: ModuleTensors, place: Place, config: SavedConfig) -> bool:
        """Whether A is [experts * rank, in] and B [out, experts * rank]."""
        a, b, _ = _pair(tensors)
        stacked = place.num_experts * cls.saved_rank(config, place.key)
        return a.shape == (stacked, place.num_in) and b.shape == (place.num_out, stacked)

    @classmethod
    def plan_updates(
        cls, tensors: ModuleTensors, place: Place, config: SavedConfig, strength: float
    ) -> dict[str, WeightUpdate]:
        """Return the low-rank update, and that of LoRA's own bias if there is one."""
        a, b, _ = _pair(tensors)
        rank = cls.saved_rank(config, place.key)
        scaling = cls.saved_scaling(config, place.key)
        if place.num_experts == 1 and (a.shape[0] != rank or b.shape[1:] != (rank,)):
            raise ValueError(
                f"{a.name!r} is {list(a.shape)} and its B is {list(b.shape)}, but the adapter's "
                f"config gives that module rank {rank}"
            )
        updates: dict[str, WeightUpdate] = {
            "weight": LowRankUpdate(a, b, scaling, place, weight=strength)
        }
        bias = tensors.parts.get("bias")
        if bias is not None:
            if not place.has_bias:
                raise ValueError(
                    f"{bias.name!r} is a bias (lora_bias) for module {tensors.module!r}, which has "
                    "none in the base; it cannot be merged. Train without lora_bias, or only "
                    "layers that have a bias (target_modules)"
                )
            updates["bias"] = BiasUpdate(bias, scaling * strength)
        return updates

    @classmethod
    def why_only_alone(cls, config: SavedConfig) -> str | None:
        """A low-rank product can be added to others."""
        return None

    @classmethod
    def why_no_factors(cls, tensors: ModuleTensors) -> str | None:
        """Name LoRA's own biases."""
        return "biases (lora_bias)" if "bias" in tensors.parts else None

    @classmethod
    def factors(cls, tensors: ModuleTensors, config: SavedConfig) -> Factors:
        """Return A, B and the scaling."""
        a, b, is_embedding = _pair(tensors)
        return Factors(a, b, cls.saved_scaling(config, tensors.module), is_embedding)

    @classmethod
    def usual_alpha(cls, config: SavedConfig) -> float:
        """Return alpha for modules to which no pattern gives a different one."""
        return float(config.get("lora_alpha", DEFAULT_ALPHA))

    @classmethod
    def saved_rank(cls, config: SavedConfig, key: str) -> int:
        """Return the rank that a saved config gives the module or parameter `key`."""
        patterns: Mapping[str, int] = config.get("rank_pattern") or {}
        usual: int = config.get("r", DEFAULT_RANK)
        return first_match(patterns, key, usual)

    @classmethod
    def saved_scaling(cls, config: SavedConfig, key: str) -> float:
        """Return the factor before B A that a saved config gives the module or parameter `key`."""
        patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
        alpha = first_match(patterns, key, config.get("lora_alpha", DEFAULT_ALPHA))
        return cls.scaling(cls.saved_rank(config, key), alpha)


def _pair(tensors: ModuleTensors) -> tuple[TensorEntry, TensorEntry, bool]:
    """Return A, B and whether they are an embedding's."""
    parts = tensors.parts
    is_embedding = "embedding_A" in parts
    prefix = "embedding_" if is_embedding else ""
    return parts[f"{prefix}A"], parts[f"{prefix}B"], is_embedding


def first_match(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    """Return the value of the first pattern that matches the name."""
    # The first pattern that matches the end of the name wins (peft.utils.other.get_pattern_key).
    for pattern, value in patterns.items():
        if matches_pattern(pattern, module):
            return value
    return otherwise
