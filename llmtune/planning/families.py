"""How each model family names its parts, and which parts it has: what config.json leaves unsaid."""

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Family:
    """One transformers model type's decoder layer.

    Names are relative to a layer. `attention` is (q, k, v, out) or (qkv, out), `feed_forward` is
    (gate, up, down), (gate_up, down) or, without a gate, (in, out).
    """

    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    layers: str = "model.layers"
    norms: int = 2
    """Norms of a layer over the hidden width."""
    has_layer_norm: bool = False
    """LayerNorm with a bias; otherwise RMSNorm."""
    adds_one_to_norm: bool = False
    """Gemma's RMSNorm scales by 1 + weight, in float32."""
    head_norms: str = ""
    """Norms on queries and keys: `head` has one weight a head dimension, `width` one a feature."""
    activation: str = "silu"
    """The feed-forward block's, if config.json names none."""
    attention_bias: bool | str = False
    """Whether q, k, v and out have a bias; a text names the config key that says so."""
    out_bias: bool | None = None
    """Whether the attention's output has one, if that differs."""
    feed_forward_bias: bool | str = False
    head_bias: bool = False
    ties_embeddings: bool = False
    """What holds when config.json does not say `tie_word_embeddings`."""
    head_dim: int | None = None
    """What holds when config.json does not say `head_dim`; None is hidden_size / heads."""
    experts_key: str | None = None
    """The config key with the number of experts; None if the family has none."""
    expert_width_key: str = "intermediate_size"
    experts: str = "mlp.experts"

    @property
    def has_plain_norm(self) -> bool:
        """Whether llmtune's own RMSNorm can stand in for the library's."""
        return not (self.has_layer_norm or self.adds_one_to_norm)

    @property
    def is_gated(self) -> bool:
        """Say whether the feed-forward block has a gate."""
        return len(self.feed_forward) == 3 or "gate_up" in self.feed_forward[0]


_SPLIT_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_STACKED = ("mlp.gate_up_proj", "mlp.down_proj")
_LLAMA = Family(
    _SPLIT_ATTENTION, _GATED, attention_bias="attention_bias", feed_forward_bias="mlp_bias"
)

FAMILIES = MappingProxyType(
    {
        "llama": _LLAMA,
        "granite": _LLAMA,
        "mistral": Family(_SPLIT_ATTENTION, _GATED),
        "smollm3": Family(
            _SPLIT_ATTENTION,
            _GATED,
            attention_bias="attention_bias",
            feed_forward_bias="mlp_bias",
            ties_embeddings=True,
        ),
        "qwen2": Family(_SPLIT_ATTENTION, _GATED, attention_bias=True, out_bias=False),
        "qwen3": Family(
            _SPLIT_ATTENTION,
            _GATED,
            head_norms="head",
            attention_bias="attention_bias",
            head_dim=128,
        ),
        "olmo2": Family(
            _SPLIT_ATTENTION, _GATED, head_norms="width", attention_bias="attention_bias"
        ),
        "olmo3": Family(
            _SPLIT_ATTENTION, _GATED, head_norms="width", attention_bias="attention_bias"
        ),
        "ministral": Family(_SPLIT_ATTENTION, _GATED),
        "ministral3": Family(_SPLIT_ATTENTION, _GATED, head_dim=128),
        "hunyuan_v1_dense": Family(
            _SPLIT_ATTENTION, _GATED, head_norms="head", attention_bias="attention_bias"
        ),
        "exaone4": Family(_SPLIT_ATTENTION, _GATED, head_norms="head"),
        "glm": Family(
            _SPLIT_ATTENTION,
            _STACKED,
            attention_bias="attention_bias",
            out_bias=False,
            head_dim=128,
        ),
        "glm4": Family(
            _SPLIT_ATTENTION,
            _STACKED,
            norms=4,
            attention_bias="attention_bias",
            out_bias=False,
            head_dim=128,
        ),
        "gemma2": Family(
            _SPLIT_ATTENTION,
            _GATED,
            norms=4,
            adds_one_to_norm=True,
            activation="gelu_pytorch_tanh",
            attention_bias="attention_bias",
            ties_embeddings=True,
            head_dim=256,
        ),
        "gemma3_text": Family(
            _SPLIT_ATTENTION,
            _GATED,
            norms=4,
            adds_one_to_norm=True,
            activation="gelu_pytorch_tanh",
            head_norms="head",
            attention_bias="attention_bias",
            ties_embeddings=True,
            head_dim=256,
        ),
        "phi3": Family(("self_attn.qkv_proj", "self_attn.o_proj"), _STACKED),
        "phi": Family(
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
            ("mlp.fc1", "mlp.fc2"),
            norms=1,
            has_layer_norm=True,
            activation="gelu_new",
            attention_bias=True,
            feed_forward_bias=True,
            head_bias=True,
        ),
        "gpt_neox": Family(
            ("attention.query_key_value", "attention.dense"),
            ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            layers="gpt_neox.layers",
            has_layer_norm=True,
            activation="gelu",
            attention_bias="attention_bias",
            feed_forward_bias=True,
        ),
        "mixtral": Family(_SPLIT_ATTENTION, _GATED, experts_key="num_local_experts"),
        "phimoe": Family(
            _SPLIT_ATTENTION,
            _GATED,
            has_layer_norm=True,
            attention_bias="attention_bias",
            experts_key="num_local_experts",
        ),
        "minimax_m2": Family(
            _SPLIT_ATTENTION, _GATED, head_norms="width", experts_key="num_local_experts"
        ),
        "qwen3_moe": Family(
            _SPLIT_ATTENTION,
            _GATED,
            head_norms="head",
            attention_bias="attention_bias",
            experts_key="num_experts",
            expert_width_key="moe_intermediate_size",
        ),
    }
)
"""By transformers' `model_type`."""

DEFAULTS = MappingProxyType({"gpt_neox": {"attention_bias": True}})
"""What a family's config assumes for a bias key that config.json leaves out; else False."""
