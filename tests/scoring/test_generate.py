"""Batched, streamed and plain decoding write the same text, and only the given settings count."""

from typing import Any

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.scoring.generate import (
    Decoding,
    generate_texts,
    stream_text,
)
from tests.tiny import FAMILIES, make_model

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16], [40], [300, 200, 100, 50]]


MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
# Families whose cache holds recurrent or convolution states: {family: its config's own keys}
HYBRIDS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_chunk_size": 16},
    "falcon_h1": {**MAMBA, "head_dim": 16, "mamba_d_ssm": 128, "mamba_chunk_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": {**DELTA, "head_dim": 16},
    "olmo_hybrid": {**DELTA, "num_key_value_heads": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 16,
        "chunk_size": 16,
    },
}


def continue_plainly(model, prompt, num_tokens):
    ids = list(prompt)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_plain_decoding_in_every_family(family, tokenizer):
    model = make_model(family)
    decoding = Decoding(max_new_tokens=8, stop_token_ids=())
    found = generate_texts(model, tokenizer, PROMPTS, decoding, token_budget=40)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        assert list(generation.token_ids) == continue_plainly(model, prompt, 8)
        assert generation.text == tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        assert not generation.stopped


def test_rows_stop_at_a_stop_token_and_the_others_go_on(llama, tokenizer):
    plain = [continue_plainly(llama, prompt, 8) for prompt in PROMPTS]
    stop = plain[0][3]
    decoding = Decoding(max_new_tokens=8, stop_token_ids=(stop,))
    found = generate_texts(llama, tokenizer, PROMPTS, decoding, token_budget=1000)
    for generation, ids in zip(found, plain, strict=True):
        cut = ids.index(stop) if stop in ids else len(ids)
        assert list(generation.token_ids) == ids[:cut]
        assert generation.stopped == (stop in ids)


@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_that_stop_first_do_not_disturb_recurrent_states(family, tokenizer):
    model = make_model(family, **{"num_key_value_heads": 2, **HYBRIDS[family]})
    plain = [continue_plainly(model, prompt, 8) for prompt in PROMPTS]
    stop = plain[0][3]
    decoding = Decoding(max_new_tokens=8, stop_token_ids=(stop,))
    found = generate_texts(model, tokenizer, PROMPTS, decoding, token_budget=1000)
    for generation, ids in zip(found, plain, strict=True):
        cut = ids.index(stop) if stop in ids else len(ids)
        assert list(generation.token_ids) == ids[:cut]
        assert generation.stopped == (stop in ids)


def test_sampling_is_repeatable_and_independent_of_the_batches(llama, tokenizer):
    decoding = Decoding(max_new_tokens=6, stop_token_ids=(), temperature=1.0, seed=3)
    together = generate_texts(llama, tokenizer, PROMPTS, decoding, token_budget=1000)
    apart = generate_texts(llama, tokenizer, PROMPTS, decoding, token_budget=1)
    other = Decoding(max_new_tokens=6, stop_token_ids=(), temperature=1.0, seed=4)
    assert together == apart
    assert together != generate_texts(llama, tokenizer, PROMPTS, other, token_budget=1000)


def test_a_tiny_nucleus_is_greedy(llama, tokenizer):
    greedy = Decoding(max_new_tokens=6, stop_token_ids=())
    nucleus = Decoding(max_new_tokens=6, stop_token_ids=(), temperature=2.0, top_p=1e-6)
    settings: dict[str, Any] = {"token_budget": 1000}
    assert generate_texts(llama, tokenizer, PROMPTS, greedy, **settings) == generate_texts(
        llama, tokenizer, PROMPTS, nucleus, **settings
    )


def test_the_generation_config_of_the_model_is_not_read(llama, tokenizer, recwarn):
    decoding = Decoding(max_new_tokens=6, stop_token_ids=())
    plain = generate_texts(llama, tokenizer, PROMPTS, decoding, token_budget=1000)
    llama.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=2, eos_token_id=1
    )
    assert generate_texts(llama, tokenizer, PROMPTS, decoding, token_budget=1000) == plain
    assert not recwarn.list


def test_the_stream_is_the_generation_in_pieces(llama, tokenizer):
    decoding = Decoding(max_new_tokens=40, stop_token_ids=(3,), temperature=1.5, seed=1)
    [whole] = generate_texts(llama, tokenizer, PROMPTS[:1], decoding, token_budget=1000)
    pieces = list(stream_text(llama, tokenizer, PROMPTS[0], decoding))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 5


def test_the_stream_leaves_gradients_on_between_its_pieces(llama, tokenizer):
    for _ in stream_text(llama, tokenizer, PROMPTS[0], Decoding(4, ())):
        assert torch.is_grad_enabled()


def test_a_prompt_that_leaves_no_room_is_refused(llama, tokenizer):
    with pytest.raises(LlmtuneError, match="positions"):
        generate_texts(llama, tokenizer, [[5] * 512], Decoding(8, ()), token_budget=1000)


def test_a_text_ends_at_the_models_last_position(llama, tokenizer):
    prompts = [[5] * 510, [6, 7]]
    found = generate_texts(llama, tokenizer, prompts, Decoding(8, ()), token_budget=4000)
    assert [len(each.token_ids) for each in found] == [2, 8]
    assert [each.stopped for each in found] == [False, False]
    assert list(found[0].token_ids) == continue_plainly(llama, prompts[0], 2)
    assert list(found[1].token_ids) == continue_plainly(llama, prompts[1], 8)
    assert len(list(stream_text(llama, tokenizer, prompts[0], Decoding(8, ())))) <= 2


def test_new_prompts_take_the_place_of_finished_rows(llama, tokenizer, monkeypatch):
    prompts = [[5 + row, 6, 7, 8][: 2 + row % 3] for row in range(12)]
    plain = [continue_plainly(llama, prompt, 12) for prompt in prompts]
    stops = tuple({ids[row % 4] for row, ids in enumerate(plain)})
    rows = []
    llama.model.embed_tokens.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    found = generate_texts(llama, tokenizer, prompts, Decoding(12, stops), token_budget=16)
    for generation, ids in zip(found, plain, strict=True):
        cut = next((place for place, token in enumerate(ids) if token in stops), 12)
        assert list(generation.token_ids) == ids[:cut]
    assert max(rows) <= 4
    assert len(rows) < 12 * 12 / 4
