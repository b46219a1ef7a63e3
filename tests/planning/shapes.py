"""Small configs of every family the planner knows."""

from typing import Any


def small_config(family: str, *, layers: int = 2) -> dict:
    """Return a small model's config values for `CONFIG_MAPPING[family]`."""
    config: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family not in {"phi", "gpt_neox"}:
        config |= {"num_key_value_heads": 2, "head_dim": 16}
    if family in {"gemma2", "gemma3_text"}:
        config["query_pre_attn_scalar"] = 16
    if family in {"mixtral", "minimax_m2", "phimoe"}:
        config |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family == "qwen3_moe":
        config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
        config["mlp_only_layers"] = [1]
    return config
