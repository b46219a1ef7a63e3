"""A model's shape from config.json: every weight's name and size, no weights and no torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.planning.families import DEFAULTS, FAMILIES, Family

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ModelShape:
    """What a causal LM is made of. Counts are parameters; widths are features."""

    model_type: str
    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    """Width of the feed-forward block, or of one expert's."""
    activation: str
    """Of the feed-forward block, by transformers' name."""
    vocabulary: int
    is_tied: bool
    experts: int
    active_experts: int
    linear: Mapping[str, tuple[int, int]]
    """Linear layers but the head, {full name: (out, in)}."""
    fused_experts: Mapping[str, tuple[int, int, int]]
    """Fused expert weights, {parameter's full name: (experts, out, in)}."""
    linear_biases: int
    biased: frozenset[str]
    """Linear layers that have a bias."""
    norms: Mapping[str, int]
    """Norms, {full name: parameters}; those of a layer are one here, called `norms`."""
    other_parameters: int
    """Norms and routers."""

    @property
    def query_width(self) -> int:
        """Return the width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Return the width of all key heads together, which is that of the values."""
        return self.kv_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Return the parameters of the token embeddings."""
        return self.vocabulary * self.width

    @property
    def head_parameters(self) -> int:
        """Of the LM head; 0 if it is the embedding."""
        bias = self.vocabulary if self.family.head_bias else 0
        return bias + (0 if self.is_tied else self.embedding_parameters)

    @property
    def linear_parameters(self) -> int:
        """Return the weights of all linear layers but the head."""
        return sum(math.prod(shape) for shape in self.linear.values())

    @property
    def expert_parameters(self) -> int:
        """Return the weights of all fused experts."""
        return sum(math.prod(shape) for shape in self.fused_experts.values())

    @property
    def active_parameters(self) -> int:
        """Weights of linear layers and experts that one token is multiplied with, head aside."""
        active = self.expert_parameters * self.active_experts // max(self.experts, 1)
        return self.linear_parameters + active

    @property
    def num_parameters(self) -> int:
        """Return the parameters of the whole model."""
        return (
            self.embedding_parameters
            + self.head_parameters
            + self.linear_parameters
            + self.expert_parameters
            + self.linear_biases
            + self.other_parameters
        )

    @property
    def layer_parameters(self) -> int:
        """Return the parameters of all layers: what is neither embedding nor LM head."""
        return self.num_parameters - self.embedding_parameters - self.head_parameters

    @property
    def largest_linear(self) -> int:
        """Weights of the largest linear layer: what is dequantized at once."""
        return max(math.prod(shape) for shape in self.linear.values())


OPTIONAL_COUNTS = ("head_dim", "decoder_sparse_step")


def read_shape(config: Config, place: str) -> ModelShape:
    """Return the shape that a config.json describes.

    Args:
        config: its content.
        place: where it was read, for messages.

    Raises:
        LlmtuneError: the architecture is not one llmtune knows the parts of, numbers are missing
            (all are named), or the heads do not divide what they share.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise LlmtuneError(
            f"{place}: model type {model_type!r}: the parts of its layers are not known here, so "
            "memory and time cannot be computed. Known are: "
            f"{', '.join(sorted(FAMILIES))}. Training itself measures: llmtune train CONFIG "
            "train.max_steps=1"
        )
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    needed.append(family.expert_width_key if family.experts_key else "intermediate_size")
    if family.experts_key:
        config = _with_key(config, family.experts_key)
        needed += [family.experts_key, "num_experts_per_tok"]
    needed += [key for key in OPTIONAL_COUNTS if config.get(key) is not None]
    missing = [key for key in needed if not _is_count(config.get(key))]
    if missing:
        raise LlmtuneError(
            f"{place}: a {model_type} model needs whole numbers for {', '.join(missing)}; "
            "config.json has none"
        )
    dense = config.get("mlp_only_layers")
    if not isinstance(dense, list | None):
        raise LlmtuneError(f"{place}: mlp_only_layers={dense!r}: expected a list of layers")
    _check_heads(config, family, place)
    return _build(config, model_type, family)


def _check_heads(config: Config, family: Family, place: str) -> None:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if not _is_count(kv_heads) or heads % kv_heads:
        raise LlmtuneError(
            f"{place}: num_key_value_heads={kv_heads}: expected a divisor of "
            f"num_attention_heads={heads}"
        )
    if not (config.get("head_dim") or family.head_dim) and width % heads:
        raise LlmtuneError(
            f"{place}: num_attention_heads={heads}: expected a divisor of hidden_size={width}, as "
            "there is no head_dim"
        )


def _with_key(config: Config, experts_key: str) -> Config:
    """Let either of transformers' two names for the number of experts stand for the other."""
    both = config.get("num_local_experts"), config.get("num_experts")
    return {**config, experts_key: both[0] or both[1]}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _build(config: Config, model_type: str, family: Family) -> ModelShape:
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or family.head_dim or width // heads
    experts = config[family.experts_key] if family.experts_key else 0
    feed_forward = config[family.expert_width_key if experts else "intermediate_size"]
    linear: dict[str, tuple[int, int]] = {}
    fused: dict[str, tuple[int, int, int]] = {}
    biases = others = 0
    biased: set[str] = set()
    norms: dict[str, int] = {}
    norm = (2 if family.has_layer_norm else 1) * width
    for index in range(layers):
        prefix = f"{family.layers}.{index}"
        is_dense = not experts or _is_dense_layer(config, index)
        for name, shape, has_bias in (
            *_attention(config, family, (heads * head_dim, kv_heads * head_dim)),
            *(_feed_forward(config, family, experts) if is_dense else ()),
        ):
            linear[f"{prefix}.{name}"] = shape
            if has_bias:
                biases += shape[0]
                biased.add(f"{prefix}.{name}")
        if not is_dense:
            fused[f"{prefix}.{family.experts}.gate_up_proj"] = (experts, 2 * feed_forward, width)
            fused[f"{prefix}.{family.experts}.down_proj"] = (experts, width, feed_forward)
            others += experts * width
        norms[f"{prefix}.norms"] = family.norms * norm + _head_norms(
            family, (heads, kv_heads, head_dim)
        )
    norms["norm"] = norm
    return ModelShape(
        model_type=model_type,
        family=family,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward=feed_forward,
        activation=_activation(config, family),
        vocabulary=config["vocab_size"],
        is_tied=bool(config.get("tie_word_embeddings", family.ties_embeddings)),
        experts=experts,
        active_experts=config["num_experts_per_tok"] if experts else 0,
        linear=linear,
        fused_experts=fused,
        linear_biases=biases,
        biased=frozenset(biased),
        norms=norms,
        other_parameters=others + sum(norms.values()),
    )


def _activation(config: Config, family: Family) -> str:
    """Return the activation's name; Gemma goes by `hidden_activation`, whatever the other says."""
    return str(config.get("hidden_activation") or config.get("hidden_act") or family.activation)


def _is_dense_layer(config: Config, index: int) -> bool:
    """Whether a mixture model's layer has a plain feed-forward block (Qwen3-MoE's rule)."""
    step = config.get("decoder_sparse_step", 1)
    return index in (config.get("mlp_only_layers") or ()) or (index + 1) % step != 0


def _attention(
    config: Config, family: Family, widths: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, int], bool]]:
    query, kv = widths
    hidden = config["hidden_size"]
    has_bias = _has_bias(config, family.attention_bias)
    out_bias = has_bias if family.out_bias is None else family.out_bias
    *projections, out = family.attention
    outputs = [query + 2 * kv] if len(projections) == 1 else [query, kv, kv]
    for name, output in zip(projections, outputs, strict=True):
        yield name, (output, hidden), has_bias
    yield out, (hidden, query), out_bias


def _feed_forward(
    config: Config, family: Family, experts: int
) -> Iterator[tuple[str, tuple[int, int], bool]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    has_bias = _has_bias(config, family.feed_forward_bias)
    *inputs, down = family.feed_forward
    is_stacked = family.is_gated and len(inputs) == 1
    for name in inputs:
        yield name, (2 * inner if is_stacked else inner, hidden), has_bias
    yield down, (hidden, inner), has_bias


def _has_bias(config: Config, rule: bool | str) -> bool:
    if isinstance(rule, bool):
        return rule
    default = DEFAULTS.get(str(config.get("model_type")), {}).get(rule, False)
    return bool(config.get(rule, default))


def _head_norms(family: Family, heads: tuple[int, int, int]) -> int:
    num_heads, num_kv_heads, head_dim = heads
    if family.head_norms == "head":
        return 2 * head_dim
    if family.head_norms == "width":
        return (num_heads + num_kv_heads) * head_dim
    return 0
