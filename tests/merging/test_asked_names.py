"""Where an adapter's tensors belong is asked of the model, so unusual names merge right too."""

import json

import pytest

from llmtune.cli import run_command
from tests.merging.adapters import load_adapter, load_base, logits, make_adapter, make_base

TIED = {"tie_word_embeddings": True}
HYBRID = {
    "layers_block_type": ["mamba", "attention"],
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "ssm_state_size": 16,
    "chunk_size": 16,
}
SQUARE_EXPERTS = {  # hidden 64, gate and up 2 x 32 and down 64 x 64: only the model knows
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "intermediate_size_mlp": 128,
}


def merge_and_compare(tmp_path, base, config, capsys):
    """Merge by the command; return the largest error and the adapter's largest effect."""
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    out = tmp_path / "out"
    code = run_command(["merge", str(adapter), f"model.base={base}", "--out", str(out), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    live, before = logits(load_adapter(base, adapter)), logits(load_base(base))
    error = (logits(load_base(out)) - live).abs().max().item()
    return error, (live - before).abs().max().item(), json.loads(captured.out)


@pytest.mark.parametrize(
    ("family", "options", "config"),
    [
        ("llama", TIED, {"target_modules": ["lm_head"], "trainable_token_indices": [5, 17]}),
        ("llama", TIED, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17]}),
        (
            "mamba",
            {"state_size": 8},
            {"target_modules": ["in_proj"], "modules_to_save": ["embeddings"]},
        ),
        ("openai-gpt", {}, {"target_modules": ["c_attn"], "modules_to_save": ["tokens_embed"]}),
        ("ctrl", {"dff": 128}, {"target_modules": ["Wq"], "modules_to_save": ["w"]}),
        (
            "llama4_text",
            {**SQUARE_EXPERTS, "intermediate_size": 64},
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["experts.down_proj"],
            },
        ),
        ("llama", {}, {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", TIED, {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {}, {"target_modules": ["embed_tokens", "lm_head"]}),
        ("llama", TIED, {"target_modules": ["embed_tokens"]}),
    ],
)
def test_merge_equals_the_live_adapter(tmp_path, capsys, family, options, config):
    base = make_base(tmp_path / "base", family, **options)
    error, effect, _ = merge_and_compare(tmp_path, base, config, capsys)
    assert error < 1e-3 * effect
