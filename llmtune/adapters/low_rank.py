"""What LoRA and its variants share: the knobs, peft's layers, and the saved factors A and B."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from llmtune.adapters.base import Adapter, SavedConfig, matches_pattern
from llmtune.adapters.low_rank_update import BiasUpdate, LowRankUpdate
from llmtune.adapters.update import Factors, ModuleTensors, Part, Place, WeightUpdate, Widths
from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import TensorEntry

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor

Number = TypeVar("Number", int, float)

LOW_RANK = 8
DEFAULT_RANK = 8  # peft's, where a saved config names none
DEFAULT_ALPHA = 8

# Initializations that leave the base as it is on disk, so that W + B A means what was trained.
KEPT_BASE_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
# Initializations that change the base's weights, so that the adapter off is not the base.
REWRITING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

KEY = re.compile(
    r"^(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?$"
)


class LowRankAdapter(Adapter):
    """W + scaling * B A, with A [rank, in] and B [out, rank]; W stays frozen (arXiv:2106.09685)."""

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

    rank: Annotated[int, Field(gt=0)] = 16
    """Rows of A: the width of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Strength of the update before it is divided by (a function of) the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs dropped while training."""
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """A different rank for some modules: {name or regex: rank}; the first match counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """A different alpha for some modules: {name or regex: alpha}; the first match counts."""

    @classmethod
    def scaling(cls, rank: int, alpha: float) -> float:
        """Return the factor before B A."""
        return alpha / rank

    def rank_of(self, module: str) -> int:
        """Return the rank for the module of this full name."""
        return _first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return alpha for the module of this full name."""
        return _first_match(self.alpha_pattern, module, self.alpha)

    # Injecting

    def to_peft(
        self,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        *,
        fan_in_fan_out: bool = False,
    ) -> "PeftConfig":
        """Return peft's config for exactly these targets."""
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(target_modules),
            target_parameters=list(target_parameters) or None,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            modules_to_save=list(self.modules_to_save) or None,
            fan_in_fan_out=fan_in_fan_out,
            bias="none",
            **self._peft_method(),
        )

    def _peft_method(self) -> dict[str, bool]:
        return {}

    def why_no_experts(self) -> str | None:
        """Say why fused expert weights cannot be adapted with these knobs; None if they can."""
        return "they cannot have dropout (adapter.dropout=0)" if self.dropout > 0 else None

    @property
    def patterns(self) -> Mapping[str, Mapping[str, float]]:
        """The ranks and the alphas of single modules."""
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def check_layer(self, name: str, layer: "BaseTunerLayer") -> None:
        """Assert that the layer has its rank and scaling."""
        rank, alpha = self.rank_of(name), self.alpha_of(name)
        assert layer.r["default"] == rank, name
        assert abs(layer.scaling["default"] - self.scaling(rank, alpha)) < 1e-6, name

    @classmethod
    def layer_settings(cls, layer: "BaseTunerLayer") -> dict[str, float]:
        """Return rank, alpha and scaling."""
        return {
            "rank": layer.r["default"],
            "alpha": layer.lora_alpha["default"],
            "scaling": layer.scaling["default"],
        }

    # Planning

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the numbers in A and B."""
        return self.rank_of(module) * (num_out + num_in)

    def thin_width(self, module: str) -> int:
        """Return the rank: A's product is kept."""
        return self.rank_of(module)

    @property
    def drops_inputs(self) -> bool:
        """Whether there is dropout."""
        return self.dropout > 0

    @property
    def is_fusable(self) -> bool:
        """Every layer draws a dropout mask of its own."""
        return self.dropout == 0

    def lighter(self) -> tuple[str, Adapter] | None:
        """Return a low rank."""
        if self.rank <= LOW_RANK:
            return None
        return f"adapter.rank={LOW_RANK}", self.model_copy(update={"rank": LOW_RANK})

    # A live adapter

    @classmethod
    def why_not_fused(cls, layer: "BaseTunerLayer") -> str | None:
        """Only a plain pair of factors without dropout can be fused."""
        from peft.tuners.lora import Linear
        from torch import nn

        if type(layer) is not Linear and type(layer).__name__ != "Linear4bit":
            return super().why_not_fused(layer)
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) != 1:
            return f"{len(active)} active adapters"
        (name,) = active
        if name in layer.lora_variant:
            return f"{type(layer.lora_variant[name]).__name__} is a variant of LoRA"
        if not isinstance(layer.lora_dropout[name], nn.Identity):
            return "every layer draws a dropout mask of its own"
        if layer.lora_B[name].bias is not None:
            return "its adapter has a bias"
        parts = (layer.lora_A[name], layer.lora_B[name])
        return "hooks are attached" if any(_has_hooks(part) for part in parts) else None

    @classmethod
    def factors_of(
        cls, layer: "BaseTunerLayer", adapter: str
    ) -> "tuple[Tensor, Tensor, float] | None":
        """Return A, B and the scaling of a layer that is no variant of LoRA."""
        if adapter in layer.lora_variant or adapter not in layer.lora_A:
            return None
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        return a, b, float(layer.scaling[adapter])

    @classmethod
    def learns_at_once(cls, name: str) -> bool:
        """B does; it starts at zero, so A gets its first gradient once B has moved."""
        return ".lora_B." in name

    @classmethod
    def weaken(cls, layer: "BaseTunerLayer", strength: float) -> Callable[[], None] | None:
        """Multiply the scaling, which costs nothing; variants of LoRA are blended."""
        if layer.lora_variant:
            return None
        known = layer.scaling
        layer.scaling = {name: value * strength for name, value in known.items()}

        def undo() -> None:
            layer.scaling = known

        return undo

    @classmethod
    def rewritten_base(cls, config: SavedConfig) -> str | None:
        """Name the initialization if it took a part of the weights out of the base."""
        start = config.get("init_lora_weights", True)
        return start if isinstance(start, str) and start.startswith(REWRITING_STARTS) else None

    # A saved adapter

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
                    "none in the base; it cannot be merged"
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
        """Return alpha where no pattern gives a different one."""
        return float(config.get("lora_alpha", DEFAULT_ALPHA))

    @classmethod
    def saved_rank(cls, config: SavedConfig, key: str) -> int:
        """Return the rank that a saved config gives the module or parameter `key`."""
        patterns: Mapping[str, int] = config.get("rank_pattern") or {}
        usual: int = config.get("r", DEFAULT_RANK)
        return _first_match(patterns, key, usual)

    @classmethod
    def saved_scaling(cls, config: SavedConfig, key: str) -> float:
        """Return the factor before B A that a saved config gives the module or parameter `key`."""
        patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
        alpha = _first_match(patterns, key, config.get("lora_alpha", DEFAULT_ALPHA))
        return cls.scaling(cls.saved_rank(config, key), alpha)


def active_factors(layer: "BaseTunerLayer") -> "tuple[Tensor, Tensor, float]":
    """Return A, B and the scaling of a layer's one active adapter."""
    (name,) = (one for one in layer.active_adapters if one in layer.lora_A)
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _pair(tensors: ModuleTensors) -> tuple[TensorEntry, TensorEntry, bool]:
    """Return A, B and whether they are an embedding's."""
    parts = tensors.parts
    is_embedding = "embedding_A" in parts
    prefix = "embedding_" if is_embedding else ""
    return parts[f"{prefix}A"], parts[f"{prefix}B"], is_embedding


def _has_hooks(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _first_match(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    # The first pattern that matches the end of the name wins (peft.utils.other.get_pattern_key).
    for pattern, value in patterns.items():
        if matches_pattern(pattern, module):
            return value
    return otherwise
