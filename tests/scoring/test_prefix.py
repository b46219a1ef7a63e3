"""What all prompts begin with runs once, with the same result, or says why it cannot."""

import json
import logging
import random

import pytest
import torch

from llmtune.evaluation.requests import encode_prompts
from llmtune.evaluation.suite import load_suite
from llmtune.scoring import batches, generate, likelihood
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.scoring.likelihood import count_forward_tokens, score_continuations
from llmtune.scoring.prefix import NO_PREFIX, common_prefix
from llmtune.scoring.requests import ContinuationRequest
from tests.conftest import write_jsonl
from tests.tiny import FAMILIES, make_model

SHARED = 150


@pytest.fixture
def requests():
    source = random.Random(3)

    def draw(count):
        return tuple(source.randrange(4, 512) for _ in range(count))

    start = draw(SHARED)
    return [
        ContinuationRequest(start + draw(source.randint(1, 20)), (draw(1), draw(3)))
        for _ in range(10)
    ]


def count_tokens_run(monkeypatch, *modules):
    """Count the ids that forward passes are given, padding left out."""
    seen = []

    def run(model, batch, **keywords):
        width = batch.input_ids.shape[1]
        seen.append(int(batch.attention_mask[:, -width:].sum()))
        return batches.run_forward(model, batch, **keywords)

    for module in modules:
        monkeypatch.setattr(f"llmtune.scoring.{module}.run_forward", run)
    return seen


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
def test_scores_after_a_shared_prefix_are_those_without_one(family, requests, monkeypatch):
    model = make_model(family)
    seen = count_tokens_run(monkeypatch, "prefix", "writing", "likelihood")
    shared = score_continuations(model, requests, token_budget=100)
    assert sum(seen) == count_forward_tokens(requests) < 700
    seen.clear()
    monkeypatch.setattr(likelihood, "share_prefix", lambda *_, **__: NO_PREFIX)
    alone = score_continuations(model, requests, token_budget=2000)
    assert sum(seen) > 10 * SHARED
    for first, second in zip(shared, alone, strict=True):
        for a, b in zip(first, second, strict=True):
            assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-4)
            assert a.is_greedy == b.is_greedy


def test_texts_after_a_shared_prefix_are_those_without_one(requests, tokenizer, llama, monkeypatch):
    prompts = [request.prompt_ids for request in requests]
    seen = count_tokens_run(monkeypatch, "prefix", "writing")
    decoding = Decoding(6, (3,))
    shared = generate_texts(llama, tokenizer, prompts, decoding, token_budget=100)
    assert sum(seen) < 2 * SHARED + 10 * 20
    monkeypatch.setattr(generate, "share_prefix", lambda *_, **__: NO_PREFIX)
    alone = generate_texts(llama, tokenizer, prompts, decoding, token_budget=2000)
    assert shared == alone


def test_the_cost_of_written_answers_counts_a_short_shared_beginning_once(
    tokenizer, llama, tmp_path, monkeypatch
):
    items = write_jsonl(tmp_path / "items.jsonl", [{"w": w, "answer": w} for w in "abcdef"])
    declared = {
        "task": "exact",
        "items": items.name,
        "answer": "answer",
        "prompt": "The quick brown fox saw {{ w }}",
        "chat": False,
        "max_new_tokens": 1,
    }
    (tmp_path / "suite.yaml").write_text(json.dumps(declared))
    suite = load_suite(tmp_path / "suite.yaml")
    prompts = encode_prompts(tokenizer, suite)
    assert 4 <= common_prefix(prompts) < 64
    seen = count_tokens_run(monkeypatch, "prefix", "writing")
    generate_texts(llama, tokenizer, prompts, Decoding(1, (3,)), token_budget=1000)
    assert suite.config.count_tokens(tokenizer, suite) == sum(seen) + len(prompts)


@pytest.mark.parametrize(
    ("family", "reason"), [("mamba", "state cannot be copied"), ("gemma2", "only 64 tokens back")]
)
def test_a_model_that_cannot_share_says_so_and_scores_all_the_same(
    family, reason, requests, caplog
):
    model = make_model(family)
    with caplog.at_level(logging.WARNING):
        [scores, *_] = score_continuations(model, requests, token_budget=2000)
    assert reason in caplog.text and "150 tokens that all 10 prompts begin with" in caplog.text
    ids = [*requests[0].prompt_ids, *requests[0].choice_ids[1]]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(requests[0].prompt_ids) - 1, len(ids) - 1)
    expected = sum(logits[place, ids[place + 1]].item() for place in places)
    assert scores[1].log_likelihood == pytest.approx(expected, abs=1e-3)


def test_the_common_prefix_leaves_every_prompt_a_token():
    assert common_prefix([(1, 2, 3), (1, 2, 4)]) == 2
    assert common_prefix([(1, 2), (1, 2, 4)]) == 1
    assert common_prefix([(1,), (2,)]) == 0


def test_a_model_without_a_cache_still_writes_its_greedy_text(requests, tokenizer):
    model = make_model("mamba")
    prompts = [request.prompt_ids for request in requests[:3]]
    written = generate_texts(model, tokenizer, prompts, Decoding(4, (3,)), token_budget=1000)
    for prompt, text in zip(prompts, written, strict=True):
        ids = list(prompt)
        for token in text.token_ids:
            with torch.no_grad():
                assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_rows_on_both_sides_of_a_rotary_switch_are_scored_and_written_as_alone(tokenizer):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    source = random.Random(5)

    def draw(count):
        return tuple(source.randrange(4, 512) for _ in range(count))

    start = draw(45)
    rows = [ContinuationRequest(start + draw(count), (draw(1), draw(2))) for count in (5, 9, 40)]
    together = score_continuations(model, rows, token_budget=4000)
    alone = [score_continuations(model, [row], token_budget=4000)[0] for row in rows]
    for scores, expected in zip(together, alone, strict=True):
        for one, other in zip(scores, expected, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
    prompts = [row.prompt_ids for row in rows]
    written = generate_texts(model, tokenizer, prompts, Decoding(5, ()), token_budget=4000)
    for prompt, text in zip(prompts, written, strict=True):
        (apart,) = generate_texts(model, tokenizer, [prompt], Decoding(5, ()), token_budget=4000)
        assert text.token_ids == apart.token_ids
