"""What LoRA and its variants share: the knobs, what they cost, and peft's layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import Field, model_validator

from llmtune.adapters.base import Adapter, SavedConfig
from llmtune.adapters.low_rank_saved import SavedLowRank, first_match
from llmtune.models.quantization.config import members

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import Tensor

    from llmtune.adapters.starts import Sample

Number = TypeVar("Number", int, float)

LOW_RANK = 8

# Initializations that change the base's weights, so that the adapter off is not the base.
REWRITING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Initializations that take their start from the base's weight; see adapters/starts.py.
TWIN_STARTS = ("pissa", "olora", "corda")
# Initializations that look at training rows.
SAMPLED_STARTS = ("eva", "corda")
STARTS = r"^(default|gaussian|orthogonal|olora|pissa(_niter_[1-9]\d?)?|eva|corda(_kpm)?)$"


class LowRankAdapter(SavedLowRank):
    """W + scaling * B A, with A [rank, in] and B [out, rank]; W stays frozen (arXiv:2106.09685)."""

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
    init: Annotated[str, Field(pattern=STARTS)] = "default"
    """default (no effect at first), gaussian, orthogonal; from the base's own weight: pissa,
    pissa_niter_16 (the same, faster), olora; from training rows: eva; from both: corda, corda_kpm
    (keeps what the rows use). pissa, olora and corda are saved as a LoRA of twice the rank."""
    init_rows: Annotated[int, Field(gt=0)] = 128
    """Training rows that init=eva or corda runs before training."""
    lora_bias: bool = False
    """Train a bias with every adapted layer too; merging needs layers that have a bias."""
    trainable_tokens: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Ids of tokens whose rows of the embedding are trained too, such as new special tokens."""

    @model_validator(mode="after")
    def _check_bias(self) -> Self:
        if self.lora_bias and self.init in ("gaussian", "orthogonal"):
            raise ValueError(f"peft has no lora_bias with adapter.init={self.init}: leave one out")
        return self

    def rank_of(self, module: str) -> int:
        """Return the rank for the module of this full name."""
        return first_match(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return alpha for the module of this full name."""
        return first_match(self.alpha_pattern, module, self.alpha)

    @property
    def num_twins(self) -> int:
        """How many pairs of factors a layer has: a start from the weight is kept beside."""
        return 2 if self.init.startswith(TWIN_STARTS) else 1

    def to_peft(
        self,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        *,
        fan_in_fan_out: bool = False,
    ) -> "PeftConfig":
        """Return peft's config for exactly these targets."""
        from peft import LoraConfig

        twins = self.num_twins
        # the alpha that gives the twice as wide pair the same scaling
        more = 1 if twins == 1 else self.scaling(1, 1) / self.scaling(twins, 1)
        start = self.init if self.init in ("gaussian", "orthogonal") else True
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank * twins,
            lora_alpha=self.alpha * more,
            lora_dropout=self.dropout,
            target_modules=list(target_modules),
            target_parameters=list(target_parameters) or None,
            rank_pattern={name: rank * twins for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: alpha * more for name, alpha in self.alpha_pattern.items()},
            modules_to_save=list(self.modules_to_save) or None,
            fan_in_fan_out=fan_in_fan_out,
            bias="none",
            lora_bias=self.lora_bias,
            init_lora_weights=start,
            trainable_token_indices=list(self.trainable_tokens) or None,
            **self._peft_method(),
        )

    def _peft_method(self) -> dict[str, bool]:
        return {}

    def why_no_experts(self) -> str | None:
        """Say why fused expert weights cannot be adapted with these knobs; None if they can."""
        if self.num_twins > 1 or self.init in ("orthogonal", "eva"):
            return f"adapter.init={self.init} has no form for them (adapter.init=default has)"
        if self.lora_bias:
            return "they cannot have a bias of their own (adapter.lora_bias=false)"
        return "they cannot have dropout (adapter.dropout=0)" if self.dropout > 0 else None

    def why_no_decay(self) -> str | None:
        """A start that is kept beside the trained factors must not shrink."""
        if self.num_twins == 1:
            return None
        return (
            f"weight decay would shrink what adapter.init={self.init} starts from; set "
            "train.weight_decay=0"
        )

    @property
    def num_sampled(self) -> int:
        """The knob's, if the start is from rows."""
        return self.init_rows if self.init.startswith(SAMPLED_STARTS) else 0

    def begin(self, layers: "Mapping[str, BaseTunerLayer]", sample: "Sample | None") -> None:
        """Start from the base's weights or from training rows if that is asked for."""
        from llmtune.adapters.starts import start_from_rows, start_from_weight

        if self.num_sampled:
            start_from_rows(layers, self.init, sample)
        elif self.num_twins > 1:
            for layer in layers.values():
                start_from_weight(layer, self.init)

    @property
    def token_rows(self) -> Sequence[int]:
        """The knob's."""
        return self.trainable_tokens

    @property
    def patterns(self) -> Mapping[str, Mapping[str, float]]:
        """The ranks and the alphas of single modules."""
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    def check_layer(self, name: str, layer: "BaseTunerLayer") -> None:
        """Assert that the layer has its rank and scaling."""
        rank, alpha = self.rank_of(name), self.alpha_of(name)
        assert layer.r["default"] == rank * self.num_twins, name
        assert abs(layer.scaling["default"] - self.scaling(rank, alpha)) < 1e-6, name

    @classmethod
    def layer_settings(cls, layer: "BaseTunerLayer") -> dict[str, float]:
        """Return rank, alpha and scaling."""
        return {
            "rank": layer.r["default"],
            "alpha": layer.lora_alpha["default"],
            "scaling": layer.scaling["default"],
        }

    def why_not_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """A rank that no layer has is a slip: a full one already is any update there can be."""
        fullest: dict[int, int] = {}
        for name, shape in shapes.items():
            rank = self.rank_of(name)
            fullest[rank] = max(fullest.get(rank, 0), min(shape[-2:]))
        problems = [
            f"adapter: rank {rank:,} is more than any layer that it is for can use, which is at "
            f"most {full:,}; common ranks are 8 to 64"
            for rank, full in fullest.items()
            if rank > full
        ]
        return problems or self._why_no_start(shapes)

    def _why_no_start(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Name the first layer that has fewer directions to start from than its rank."""
        if self.num_twins == 1 and self.init != "eva":
            return []
        tight: dict[str, tuple[str, int]] = {}
        for name, shape in shapes.items():
            most = shape[-1] if self.init == "eva" else min(shape)
            if self.rank_of(name) > most:
                tight.setdefault(name.rpartition(".")[2], (name, most))
        if not tight:
            return []
        ranks = ", ".join(f"{last}: {most}" for last, (_, most) in tight.items())
        name, most = next(iter(tight.values()))
        return [
            f"adapter.init={self.init} finds at most {most:,} directions in {name}, and its rank "
            f"is {self.rank_of(name):,}; set adapter.rank_pattern={{{ranks}}}"
        ]

    def parameters_of(self, module: str, num_out: int, num_in: int) -> int:
        """Return the numbers in A and B, and in a bias."""
        bias = num_out if self.lora_bias else 0
        return self.thin_width(module) * (num_out + num_in) + bias

    def thin_width(self, module: str) -> int:
        """Return the rank: A's product is kept."""
        return self.rank_of(module) * self.num_twins

    @property
    def drops_inputs(self) -> bool:
        """Whether there is dropout."""
        return self.dropout > 0

    @property
    def is_fusable(self) -> bool:
        """Every layer draws a dropout mask of its own; a bias has no place in the product."""
        return self.dropout == 0 and not self.lora_bias

    def lighter(self) -> tuple[str, Adapter] | None:
        """Return a low rank."""
        if self.rank <= LOW_RANK:
            return None
        return f"adapter.rank={LOW_RANK}", self.model_copy(update={"rank": LOW_RANK})

    @classmethod
    def why_not_fused(cls, layer: "BaseTunerLayer") -> str | None:
        """Only a plain pair of factors without dropout can be fused."""
        from torch import nn

        if type(layer).__name__ not in {member.fusable_layer for member in members()}:
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
        return "hooks are attached" if any(has_hooks(part) for part in parts) else None

    @classmethod
    def factors_of(
        cls, layer: "BaseTunerLayer", adapter: str
    ) -> "tuple[Tensor, Tensor, float] | None":
        """Return A, B and the scaling of a layer that is not a variant of LoRA."""
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
    def weigh(cls, layer: "BaseTunerLayer", weights: Mapping[str, float]) -> None:
        """Multiply the scalings."""
        for adapter, weight in weights.items():
            if adapter in layer.scaling:
                layer.scaling[adapter] *= weight

    @classmethod
    def rewritten_base(cls, config: SavedConfig) -> str | None:
        """Name the initialization if it took a part of the weights out of the base."""
        start = config.get("init_lora_weights", True)
        return start if isinstance(start, str) and start.startswith(REWRITING_STARTS) else None


def has_hooks(module: Any) -> bool:
    """Whether something else listens to a torch module's passes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
